"""Push a model or an adapter to the Hub: all of it in one commit, checked before and, if asked, after.

What a repository then holds is what the folder holds: weights, configs and results of an earlier push that the folder
lacks are deleted in the same commit. Notes, images and code that others put there stay.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoFile

from hf_moe.hub.card import model_card
from hf_moe.hub.errors import plain_errors
from hf_moe.hub.load_check import check_loads
from hf_moe.hub.secrets import holds_token
from hf_moe.hub.upload_files import (
    ADAPTER_CONFIG,
    CARD,
    CONFIG,
    LeftOut,
    LoadsBackError,
    PushRefusedError,
    Upload,
    checkpoint_folder,
    collect,
    kind_of,
    read_json,
)
from hf_moe.models.hub_upload import superseded_weights

# kinds whose old files would describe other weights
_REPLACED = ("config", "router", "results")
# kinds that are replaced if the push brings some
_REPLACED_IF_SENT = ("tokenizer", "plots")
_BASE_FILES = ["*.json", "*.safetensors", "*.py", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Change:
    """One row of the plan. `state`: new, changed, unchanged or deleted; `size` in bytes."""

    path: str
    size: int
    state: str


@dataclass(frozen=True)
class PushPlan:
    """What a push does.

    Attributes:
        repo_id: owner/name.
        revision: Branch, or None for the default one.
        head: Commit that the files were compared with, and that the new one follows; None without a repository.
        new_branch: Whether the branch has to be created, at `head`.
        changes: A row for each file that is there afterwards or is deleted.
        left_out: What stays behind, and why.
        loads: What loading it back showed.
    """

    repo_id: str
    revision: str | None
    create_pr: bool
    private: bool
    head: str | None
    new_branch: bool
    uploads: tuple[Upload, ...]
    changes: tuple[Change, ...]
    left_out: tuple[LeftOut, ...]
    loads: str
    base: Path | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the repository holds all of it already."""
        return all(change.state == "unchanged" for change in self.changes)


@dataclass(frozen=True)
class Pushed:
    """Where it lies now: `commit` is the id to pin (`revision=`), `url` the page of the commit or the pull request."""

    commit: str
    url: str


def plan_push(
    folder: str | Path,
    repo_id: str,
    *,
    api: HfApi | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    base: str | None = None,
    add: Sequence[Path] = (),
    trust_remote_code: bool = False,
) -> PushPlan:
    """Choose the files, load them back, and compare them with what is on the Hub. Sends nothing.

    A folder without a model card gets one from its facts (`model_card`).

    Args:
        folder: What `save_pretrained` wrote, or the results folder of a recipe.
        api: Whose endpoint and token are used; default: those of the environment.
        private: Ask for a private repository.
        revision: Branch to commit to; it is created if it is not there.
        create_pr: Open a pull request instead.
        base: Name on the Hub of the model that an adapter adapts, where `adapter_config.json` names a local folder.
        add: Files and folders to send as well, under their own names.
        trust_remote_code: Run code of the folder, or of the base, for the check.

    Raises:
        PushRefusedError: If the folder is not fit to be pushed.
        CardError: If a report or results in the folder are damaged.
        HubError: If the Hub refuses, or cannot be reached.
    """
    api = api or HfApi()
    if create_pr and revision is not None:
        raise PushRefusedError("a pull request goes to the default branch: leave out the revision.")
    folder = Path(folder)
    checkpoint = checkpoint_folder(folder)
    uploads, left_out = collect(folder, add)
    uploads, base_folder = _with_base(api, checkpoint, uploads, base)
    uploads = _with_card(checkpoint, uploads, repo_id, base)
    _refuse_tokens(uploads, api)
    loads = check_loads(checkpoint, base_folder, trust_remote_code=trust_remote_code)
    with plain_errors(api.endpoint, repo_id, revision):
        repo_id, info, new_branch = _remote(api, repo_id, revision)
        files = _files(api, repo_id, info)
    if info is None and create_pr:
        raise PushRefusedError(f"{repo_id} does not exist: there is nothing to open a pull request against.")
    if info is not None and private and not info.private:
        raise PushRefusedError(f"{repo_id} exists and is public. Make it private in its settings, then push.")
    _refuse_mixture(checkpoint, repo_id, files)
    return PushPlan(
        repo_id,
        revision,
        create_pr,
        private,
        None if info is None else info.sha,
        new_branch,
        tuple(uploads),
        tuple(_changes(uploads, files)),
        tuple(left_out),
        loads.said,
        base_folder,
    )


def send(plan: PushPlan, *, api: HfApi | None = None, message: str | None = None) -> Pushed:
    """Carry out the plan: one commit, or none if everything is there. After a break, call it again.

    Raises:
        HubError: If the Hub refuses, cannot be reached, or the repository has changed since the plan was made.
    """
    api = api or HfApi()
    with plain_errors(api.endpoint, plan.repo_id, plan.revision):
        head = plan.head
        if head is None:
            api.create_repo(plan.repo_id, private=plan.private or None)
            head = api.model_info(plan.repo_id).sha
        if plan.new_branch and plan.revision is not None:
            api.create_branch(plan.repo_id, branch=plan.revision, revision=head)
        if plan.is_empty:
            return Pushed(str(head), f"{api.endpoint}/{plan.repo_id}/commit/{head}")
        done = api.create_commit(
            plan.repo_id,
            _operations(plan),
            commit_message=message or "Upload with hf-moe",
            revision=plan.revision,
            create_pr=plan.create_pr,
            parent_commit=head,
        )
    return Pushed(done.oid, done.pr_url or done.commit_url)


def verify(plan: PushPlan, pushed: Pushed, *, api: HfApi | None = None, trust_remote_code: bool = False) -> str:
    """Download the commit into an empty folder, compare every byte that was sent, and load it.

    Raises:
        LoadsBackError: If a file differs, or what was downloaded does not load.
        HubError: If it cannot be downloaded.
    """
    api = api or HfApi()
    with tempfile.TemporaryDirectory() as cache:
        # an empty cache: a file that was cached before would hide that it cannot be downloaded
        with plain_errors(api.endpoint, plan.repo_id, pushed.commit):
            found = api.snapshot_download(plan.repo_id, revision=pushed.commit, cache_dir=cache)
        for upload in plan.uploads:
            path = Path(found, upload.path)
            if not path.is_file() or _digest(path) != _digest(upload.source):
                raise LoadsBackError(f"{upload.path} of {plan.repo_id} at {pushed.commit} is not what was sent.")
        return check_loads(Path(found), plan.base, trust_remote_code=trust_remote_code).said


def _with_base(
    api: HfApi, checkpoint: Path, uploads: list[Upload], base: str | None
) -> tuple[list[Upload], Path | None]:
    """For an adapter: the uploads with the base's public name, and the base in the cache."""
    if not (checkpoint / ADAPTER_CONFIG).is_file():
        if base is not None:
            raise PushRefusedError(f"--base is for adapters; {str(checkpoint)!r} is a model.")
        return uploads, None
    config = read_json(checkpoint / ADAPTER_CONFIG)
    name = str(base or config.get("base_model_name_or_path") or "")
    if not name or name.startswith(("/", ".", "~")) or (base is None and Path(name).exists()):
        raise PushRefusedError(
            f"{ADAPTER_CONFIG} names {name!r} as the base, which nobody else has. Push the base first, then give its "
            "name with --base owner/name."
        )
    pinned = config.get("revision") if base is None else None
    with plain_errors(api.endpoint, name, pinned):
        folder = Path(api.snapshot_download(name, revision=pinned, allow_patterns=_BASE_FILES))
    if base is not None:
        config |= {"base_model_name_or_path": base, "revision": None}
        text = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
        uploads = [replace(up, source=text) if up.path == ADAPTER_CONFIG else up for up in uploads]
    return uploads, folder


def _with_card(checkpoint: Path, uploads: list[Upload], repo_id: str, base: str | None) -> list[Upload]:
    """The uploads with a card: the folder's own, or one from the facts that are sent."""
    sources = {upload.path: upload.source for upload in uploads}
    if CARD in sources:
        return uploads
    training, results = (
        path if isinstance(path := sources.get(name), Path) else None for name in ("report.json", "results.json")
    )
    card = model_card(
        checkpoint,
        training=training,
        results=results,
        repo_id=repo_id,
        base_model=base,
        plots=[upload.path for upload in uploads if upload.kind == "plots"],
    )
    return [Upload(CARD, str(card).encode(), "card"), *uploads]


def _refuse_tokens(uploads: Sequence[Upload], api: HfApi) -> None:
    known = [token for token in (api.token, get_token()) if isinstance(token, str)]
    for upload in uploads:
        if holds_token(upload.source, known):
            raise PushRefusedError(
                f"{upload.path} holds an access token. Take it out, and revoke the token if anybody else has the file."
            )


def _remote(api: HfApi, repo_id: str, revision: str | None) -> tuple[str, ModelInfo | None, bool]:
    """owner/name; the commit that ours follows, None without a repository; whether the branch is yet to be made."""
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    try:
        return repo_id, api.model_info(repo_id, revision=revision), False
    except RevisionNotFoundError:
        if str(revision).startswith("refs/"):
            raise
        return repo_id, api.model_info(repo_id), True
    except RepositoryNotFoundError as error:
        if error.response.status_code == 403:  # gated: it exists
            raise
        return repo_id, None, revision is not None


def _files(api: HfApi, repo_id: str, info: ModelInfo | None) -> dict[str, RepoFile]:
    if info is None:
        return {}
    entries = api.list_repo_tree(repo_id, revision=info.sha, recursive=True)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _changes(uploads: Sequence[Upload], files: dict[str, RepoFile]) -> list[Change]:
    sent = {upload.path for upload in uploads}
    replaced = {*_REPLACED, *({upload.kind for upload in uploads} & {*_REPLACED_IF_SENT})}
    stale = {path for path in files.keys() - sent if kind_of(path) in replaced}
    stale |= set(superseded_weights(files, sent))
    changes = [Change(upload.path, _size(upload.source), _state(upload, files.get(upload.path))) for upload in uploads]
    return sorted([*changes, *(Change(path, files[path].size, "deleted") for path in stale)], key=lambda c: c.path)


def _state(upload: Upload, remote: RepoFile | None) -> str:
    if remote is None:
        return "new"
    if remote.size != _size(upload.source):
        return "changed"
    same = _digest(upload.source) == remote.lfs.sha256 if remote.lfs else _git_digest(upload.source) == remote.blob_id
    return "unchanged" if same else "changed"


def _refuse_mixture(checkpoint: Path, repo_id: str, files: dict[str, RepoFile]) -> None:
    """A model and an adapter in one repository: the host would load one of them as part of the other."""
    is_adapter = (checkpoint / ADAPTER_CONFIG).is_file()
    other = CONFIG if is_adapter else ADAPTER_CONFIG
    if other in files:
        ours, theirs = ("an adapter", "a model") if is_adapter else ("a model", "an adapter")
        raise PushRefusedError(
            f"{repo_id} holds {theirs} ({other}), and this is {ours}; one repository, one of them. Push it to another "
            "repository or branch, or delete the old files there."
        )


def _operations(plan: PushPlan) -> list[CommitOperationAdd | CommitOperationDelete]:
    sources = {upload.path: upload.source for upload in plan.uploads}
    return [
        CommitOperationDelete(change.path)
        if change.state == "deleted"
        else CommitOperationAdd(change.path, sources[change.path])
        for change in plan.changes
        if change.state != "unchanged"
    ]


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _digest(source: Path | bytes) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_digest(source: Path | bytes) -> str:
    data = source if isinstance(source, bytes) else source.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
