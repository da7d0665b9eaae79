"""The command `hf-moe`: each module parses, calls and prints. Heavy imports wait until a command runs."""

# in the order in which `hf-moe --help` lists them
from hf_moe.cli import quickstart, info, evaluate, trace, compare, monitor, card, push  # noqa: F401, I001
from hf_moe.cli.common import app, main

__all__ = ["app", "main"]
