"""The command `hf-moe`: each module parses, calls and prints.

Heavy imports wait until a command runs.

    common.py       the application, common options, errors in one line
    words.py        other names of options are errors that say ours
    quickstart.py   train, adapt and evaluate a small model
    finetune.py     the fine-tuning recipes, by method
    generate.py     see what a model, or an adapter on it, writes
    info.py         describe a model by its config
    evaluate.py     score a model on benchmarks and on text by domain
    compare_results.py  compare the scores of two evaluations
    trace.py        record the routing over a text: page, verdict, metrics, plots
    compare.py      compare two models on the same texts
    monitor.py      compare the expert counts of a serving process with a trace
    card.py         write a model card
    push.py         push a model or an adapter to the Hub
    __main__.py     the same command as `python -m hf_moe.cli`
"""

# ruff: noqa: F401, I001
# in the order in which `hf-moe --help` lists them
from hf_moe.cli import (
    quickstart,
    info,
    finetune,
    generate,
    trace,
    compare,
    monitor,
    evaluate,
    compare_results,
    card,
    push,
)
from hf_moe.cli.common import app, main

__all__ = ["app", "main"]
