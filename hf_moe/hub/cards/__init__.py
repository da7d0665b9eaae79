"""Model cards: facts are read, checked to be of one model, and written as Markdown with a YAML head.

From files to a card:

    card.py               `model_card`, `write_card`: all of it, in the template card.md.j2
    quickstart.py         the card of the quickstart

Facts, each from one kind of file:

    facts.py              take values from JSON that somebody else wrote
    checkpoint_facts.py   a saved model or adapter
    training_facts.py     a training report, of a recipe, the quickstart or Trainer
    emissions_facts.py    codecarbon's record of energy and emissions
    routing_facts.py      a routing trace, or its metrics
    same_model.py         refuse facts of another model
    beside.py             the report and the results that lie beside a checkpoint, and an earlier card

Parts of the card:

    metadata.py           the YAML head, and what the author chooses
    sections/             the text, a function for each heading
    plots.py              loss, bits per byte, load of the experts
    benchmarks.py         results files for the Hub's leaderboards
    markdown.py           tables, cells and code blocks that data cannot break
"""
