"""The sections of a card, each a function from facts to Markdown.

What comes first:

    summary.py      the title in words, and the first sentences

Under headings:

    loading.py      code that loads it and writes a text
    about.py        the table of facts, limits, citation, versions
    samples.py      what it writes, before and after training
    evaluation.py   benchmarks, masked experts, bits per byte, TRL's metrics
    routing.py      health, balance, agreement with the base
    training.py     recipe, stages, settings, energy, data

`card.py` puts them in order.
"""
