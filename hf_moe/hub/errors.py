"""Errors of a push: a folder that is refused, and what the Hub or the connection to it answered, in one line each."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_moe.loading.errors import hub_sentence


class PushRefusedError(ValueError):
    """The folder is not pushed as it is; says what is wrong and the way out."""


class LoadsBackError(PushRefusedError):
    """The folder, or what was downloaded, does not load as the model that it should be."""


class HubError(RuntimeError):
    """The Hub refused, or could not be reached; says what it means and the way out."""


@contextmanager
def hub_errors(endpoint: str, repo_id: str, revision: str | None = None, *, sends: bool = False) -> Iterator[None]:
    """Raise what the client raises as `HubError`, with the cause kept.

    Args:
        sends: Whether files are on their way; if not, there is nothing that could have arrived.
    """
    again = _AGAIN_FROM_THERE if sends else _AGAIN
    try:
        yield
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no name of a repository (owner/name): {error}") from error
    except HfHubHTTPError as error:
        raise HubError(_explain(error, endpoint, repo_id, revision, again)) from error
    except LocalTokenNotFoundError as error:
        raise HubError(_NO_TOKEN) from error
    except OfflineModeIsEnabled as error:
        raise HubError(
            "HF_HUB_OFFLINE is set: nothing is sent, and a dry run has nothing to compare with. Unset it."
        ) from error
    except (HTTPError, ConnectionError) as error:
        needed = "" if sends else "; a dry run needs it as well, to compare"
        raise HubError(f"{endpoint} cannot be reached ({type(error).__name__}: {error}){needed}. {again}") from error
    except (RuntimeError, ValueError) as error:  # what uploads of large files raise
        raise HubError(f"the upload broke off ({error}). {again}") from error


_NO_TOKEN = "there is no token. Log in with `hf auth login`, or set HF_TOKEN."
_AGAIN = "Give the same command again."
_AGAIN_FROM_THERE = "Give the same command again: what has arrived is not sent twice."
_STATUS = {
    409: "{repo} is being changed by somebody else. Give the same command again.",
    412: "{repo} was changed after its files were compared with yours; nothing was sent. Give the same command again.",
    413: "the Hub refuses a commit of this size ({answer}). Split the weights into smaller shards (max_shard_size).",
    429: "the Hub asks to wait ({answer}). {again}",
}


def _explain(error: HfHubHTTPError, endpoint: str, repo: str, revision: str | None, again: str) -> str:
    status, answer = error.response.status_code, error.server_message or error.response.reason_phrase
    if isinstance(error, GatedRepoError | RevisionNotFoundError):
        return hub_sentence(error, repo, revision)
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo} does not exist, or it is private and this account may not see it. Check `hf auth whoami`."
    if "authorization" not in error.response.request.headers and status in (401, 403):
        return _NO_TOKEN
    if status == 401:
        return (
            f"{endpoint} does not accept the token ({answer}). Log in with `hf auth login`, or set a valid HF_TOKEN."
        )
    if status == 403:
        return (
            f"this token may not write to {repo} ({answer}). Use one with write access "
            f"({endpoint}/settings/tokens), or open a pull request with --create-pr."
        )
    if status in _STATUS:
        return _STATUS[status].format(repo=repo, answer=answer, again=again)
    return f"the Hub answered {status} ({answer}) for {repo}. {again}"
