"""Read what a repository on the Hub holds now, and list what a push of some files changes there."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from hf_moe.hub.upload_files import Upload, kind_of
from hf_moe.models.hub_upload import superseded_weights

# kinds whose old files would describe other weights
_REPLACED = frozenset({"config", "router", "results"})
# kinds that are replaced if the push brings some
_REPLACED_IF_SENT = frozenset({"tokenizer", "plots"})


@dataclass(frozen=True)
class Remote:
    """A repository before a push.

    Attributes:
        repo_id: owner/name.
        head: Commit that the files were read at, and that the new one follows; None without a repository.
        private: Whether it is private now.
        new_branch: Whether the branch has to be created, at `head`.
        files: By path, at `head`.
    """

    repo_id: str
    head: str | None = None
    private: bool = False
    new_branch: bool = False
    files: Mapping[str, RepoFile] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """One row of a plan. `state`: new, changed, unchanged or deleted; `size` in bytes."""

    path: str
    size: int
    state: str


def read_remote(api: HfApi, repo_id: str, revision: str | None) -> Remote:
    """The repository at the branch, or at the default one if the branch is yet to be created."""
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    new_branch = False
    try:
        info = api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        if str(revision).startswith("refs/"):
            raise
        info, new_branch = api.model_info(repo_id), True
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return Remote(repo_id, new_branch=revision is not None)
    entries = api.list_repo_tree(repo_id, revision=info.sha, recursive=True)
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    return Remote(repo_id, info.sha, bool(info.private), new_branch, files)


def changes(uploads: Sequence[Upload], files: Mapping[str, RepoFile]) -> list[Change]:
    """A row for each file that is there after the push or is deleted by it, in the order of the paths."""
    sent = {upload.path for upload in uploads}
    replaced = _REPLACED | ({upload.kind for upload in uploads} & _REPLACED_IF_SENT)
    stale = {path for path in files.keys() - sent if kind_of(path) in replaced}
    stale |= set(superseded_weights(files, sent))
    rows = [Change(upload.path, _size(upload.source), _state(upload, files.get(upload.path))) for upload in uploads]
    return sorted([*rows, *(Change(path, files[path].size, "deleted") for path in stale)], key=lambda row: row.path)


def sha256(source: Path | bytes) -> str:
    """SHA-256 in hexadecimal, of a file or of bytes."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(upload: Upload, remote: RepoFile | None) -> str:
    if remote is None:
        return "new"
    if remote.size != _size(upload.source):
        return "changed"
    same = sha256(upload.source) == remote.lfs.sha256 if remote.lfs else _git_sha(upload.source) == remote.blob_id
    return "unchanged" if same else "changed"


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _git_sha(source: Path | bytes) -> str:
    data = source if isinstance(source, bytes) else source.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
