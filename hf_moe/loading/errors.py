"""Words for what the Hub answers, and the exceptions of other libraries for files that do not fit them."""

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_moe.io.error_text import one_line

HUB_ERRORS = (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, HTTPError, ConnectionError)
"""Raised by the Hub's client where a repository cannot be had."""

MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)
"""Raised by transformers, PEFT and torch where a value or tensor of a file has another type, size or shape than they
expect. Where they are caught, ValueError, OSError, MemoryError and what the file's own reader raises come on top."""


def hub_sentence(error: BaseException, name: str, revision: str | None = None) -> str:
    """Say in one sentence, with the way out, why nothing called `name` could be had.

    Args:
        error: One of `HUB_ERRORS`.
        name: What was asked for; no folder here.
        revision: Commit, tag or branch that was asked for.
    """
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no branch, tag or commit {revision!r}. Take one from its page."
    if isinstance(error, GatedRepoError):
        return f"{name} is gated and this account has no access. Ask for it on its page."
    return f"no folder here is called {name!r:.200}, and {_clause(error)}"


def _clause(error: BaseException) -> str:
    if isinstance(error, HFValidationError):
        return "it is no name on the Hub (owner/name). Check the path."
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub has none that this account may see. Check the spelling, or `hf auth whoami`."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: nothing of it is in the cache. Check the spelling."
    if isinstance(error, HfHubHTTPError | LocalEntryNotFoundError):
        return f"the Hub does not give it: {one_line(error)}"
    return f"the Hub cannot be reached ({type(error).__name__}: {error}). Check the spelling and the connection."
