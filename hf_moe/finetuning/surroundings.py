"""What a recipe changes around itself while it runs, and puts back."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging


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
def without_host_warnings() -> Iterator[None]:
    """Leave out warnings that a recipe's user can do nothing about: one is meant for PEFT, one for who has a GPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator is found")
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """`without_host_warnings`, and without the bars of reading and writing files."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with without_host_warnings():
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
