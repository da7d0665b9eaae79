"""Surroundings of a recipe: versions and machine, and what it changes around itself and puts back."""

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from hf_moe.adapters.frozen_router import RouterNotFrozenError
from hf_moe.adapters.readable import UnreadableAdapterError
from hf_moe.data.bad_rows import DataError
from hf_moe.finetuning.arguments import RecipeError
from hf_moe.io.console import print_to_stderr
from hf_moe.io.quiet import quiet_libraries
from hf_moe.io.run_lock import RunRefusedError
from hf_moe.loading.pretrained import ModelError

LIBRARIES = ("hf-moe", "torch", "transformers", "peft", "accelerate", "datasets")
# printed in one line, without a traceback
_REFUSALS = (
    DataError,
    ImportError,
    ModelError,
    OSError,
    RecipeError,
    RouterNotFrozenError,
    RunRefusedError,
    UnreadableAdapterError,
)


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in (*LIBRARIES, *more)}}


def machine(arguments: TrainingArguments) -> dict[str, Any]:
    """The machine that a recipe runs on, as JSON values; `torch_threads` of one process."""
    device = arguments.device
    return {
        "architecture": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": arguments.world_size,
        "torch_threads": torch.get_num_threads(),
    }


@contextmanager
def recipe_errors() -> Iterator[None]:
    """Print what cannot be used in one line, and exit with 2."""
    try:
        with quiet_libraries():
            yield
    except _REFUSALS as error:
        print_to_stderr(f"error: {error}")
        sys.exit(2)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: two gain little on small matrices, and on a busy machine they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def quiet() -> Iterator[None]:
    """`quiet_libraries`, and without the bars of reading and writing files."""
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet_libraries():
            yield
    finally:
        if had_bars:
            logging.enable_progress_bar()
