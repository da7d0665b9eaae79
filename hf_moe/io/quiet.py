"""What other libraries say and a user can do nothing about: left out, in one place."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

MESSAGES = (
    # PEFT asks transformers by a name that is deprecated there
    "`is_gradient_checkpointing` is deprecated",
    # for machines with a GPU
    "'pin_memory' argument is set as true but no accelerator is found",
)
"""How warnings begin that are left out."""
RECORDS = {
    # texts are cut into windows, or to the row length, after they were tokenised
    "transformers.tokenization_utils_base": ("Token indices sequence length is longer than",),
    # the error that follows says the same
    "huggingface_hub.utils._http": ("Retrying in", "'HTTPError", "'(MaxRetryError", "'[Errno"),
}
"""By logger, how log records begin that are left out."""


class _Leaves(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]):
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or not record.getMessage().startswith(self.beginnings)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Leave out `MESSAGES` and `RECORDS`; errors are shown."""
    filters = {name: _Leaves(beginnings) for name, beginnings in RECORDS.items()}
    for name, leaves in filters.items():
        logging.getLogger(name).addFilter(leaves)
    try:
        with warnings.catch_warnings():
            for message in MESSAGES:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for name, leaves in filters.items():
            logging.getLogger(name).removeFilter(leaves)
