"""Evaluate a model: how good it is, on what, and by which experts.

Standard benchmarks, a run from names to `results.json`:

    plan.py             what to evaluate, and how
    tasks.py            tasks of lm-evaluation-harness by name, pattern or file
    local_data.py       their data from a folder in place of the Hub
    harness.py          lm-eval's Hugging Face model, for hf_moe models, adapters and backends
    scoring.py          one task through lm-eval
    measure.py          one task or domain: its entry in results.json
    runner.py           all of them, one after the other; interrupted, the same call resumes
    results.py          results.json and the samples beside it, checked when they are read
    model_facts.py      facts about the model, and its fingerprint
    tables.py           tables for the terminal
    errors.py           EvaluationError

Text by domain and single experts, in the same run:

    domains.py          the entry of a domain of text in results.json
    bits_per_byte.py    bits per byte of a text, document by document
    expert_metrics.py   which experts a benchmark uses, and what it loses without them
    masking.py          switch experts off while a model runs

Differences between two evaluations:

    paired.py           document by document, with confidence intervals (`hf-moe compare-results`)

For code that uses the `evaluate` library:

    metrics/            modules that `evaluate.load` takes by path
"""
