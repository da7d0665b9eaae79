"""Push a model or an adapter to the Hub: all of it in one commit, checked before and, if asked, after.

Afterwards the repository holds what the folder holds: weights, configs and results of an earlier push that the folder
lacks are deleted in the same commit. Notes, images and code that others put there stay.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from hf_moe.hub.cards.card import model_card
from hf_moe.hub.errors import LoadsBackError, PushRefusedError, hub_errors
from hf_moe.hub.load_check import check_loads, check_sent
from hf_moe.hub.remote import Change, Remote, changes, read_remote, sha256
from hf_moe.hub.renew_code import with_new_code
from hf_moe.hub.secrets import secret_in
from hf_moe.hub.upload_files import (
    ADAPTER_CONFIG,
    CARD,
    CONFIG,
    LeftOut,
    Upload,
    checkpoint_folder,
    collect,
    read_json,
)

_BASE_FILES = ["*.json", "*.safetensors", "*.py", "*.model", "*.txt", "*.jinja"]
_NOT_OF_THE_BASE = ["*/*", "consolidated*"]  # the same weights in other forms


@dataclass(frozen=True)
class PushPlan:
    """Plan of a push.

    Attributes:
        repo_id: owner/name.
        revision: Branch, or None for the default one.
        head: Commit that the files were compared with, and that the new one follows; None without a repository.
        new_branch: Whether the branch has to be created, at `head`.
        changes: A row for each file that is there afterwards or is deleted.
        left_out: Files that are not sent, and why.
        loads: Result of loading it back, in one sentence.
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
        """True if the repository holds all of it already."""
        return all(change.state == "unchanged" for change in self.changes)


@dataclass(frozen=True)
class Pushed:
    """Result of a push: `commit` is the id to pin (`revision=`), `url` the page of the commit or the pull request.

    If everything was there already, both are of the commit that was there: no pull request is opened.
    """

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

    A folder without a model card gets one from its facts (`model_card`). Of a folder that carries the code of another
    version of hf_moe, the code of the installed one is sent.

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
        ImportError: Without the extra `push`.
        HubError: If the Hub refuses, or cannot be reached.
    """
    api = api or HfApi()
    if create_pr and revision is not None:
        raise PushRefusedError("a pull request goes to the default branch: leave out the revision.")
    checkpoint = checkpoint_folder(Path(folder))
    uploads, left_out = collect(Path(folder), add)
    uploads, old_code = with_new_code(checkpoint, uploads)
    with hub_errors(api.endpoint, repo_id, revision):
        remote = read_remote(api, repo_id, revision)
    _refuse_repository(remote, checkpoint, private=private, create_pr=create_pr)
    uploads, base_folder = _with_base(api, checkpoint, uploads, base)
    uploads = _with_card(checkpoint, uploads, remote.repo_id, base)
    _refuse_secrets(uploads, api)
    loads = check_sent(checkpoint, uploads, base_folder, trust_remote_code=trust_remote_code)
    return PushPlan(
        repo_id=remote.repo_id,
        revision=revision,
        create_pr=create_pr,
        private=private,
        head=remote.head,
        new_branch=remote.new_branch,
        uploads=tuple(uploads),
        changes=tuple(changes(uploads, remote.files)),
        left_out=(*left_out, *old_code),
        loads=loads.summary,
        base=base_folder,
    )


def send(plan: PushPlan, *, api: HfApi | None = None, message: str | None = None) -> Pushed:
    """Carry out the plan: one commit, or none if everything is there. If it is interrupted, call it again.

    Raises:
        HubError: If the Hub refuses, cannot be reached, or the repository has changed since the plan was made.
    """
    api = api or HfApi()
    with hub_errors(api.endpoint, plan.repo_id, plan.revision, sends=True):
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
        with hub_errors(api.endpoint, plan.repo_id, pushed.commit):
            found = api.snapshot_download(plan.repo_id, revision=pushed.commit, cache_dir=cache)
        for upload in plan.uploads:
            path = Path(found, upload.path)
            if not path.is_file() or sha256(path) != sha256(upload.source):
                raise LoadsBackError(f"{upload.path} of {plan.repo_id} at {pushed.commit} is not what was sent.")
        return check_loads(Path(found), plan.base, trust_remote_code=trust_remote_code).summary


def _refuse_repository(remote: Remote, checkpoint: Path, *, private: bool, create_pr: bool) -> None:
    if remote.head is None and create_pr:
        raise PushRefusedError(f"{remote.repo_id} does not exist: there is nothing to open a pull request against.")
    if remote.head is not None and private and not remote.private:
        raise PushRefusedError(f"{remote.repo_id} exists and is public. Make it private in its settings, then push.")
    # transformers would load one of them as a part of the other
    is_adapter = (checkpoint / ADAPTER_CONFIG).is_file()
    other = CONFIG if is_adapter else ADAPTER_CONFIG
    if other in remote.files:
        ours, theirs = ("an adapter", "a model") if is_adapter else ("a model", "an adapter")
        raise PushRefusedError(
            f"{remote.repo_id} holds {theirs} ({other}), and this is {ours}; one repository, one of them. Push it to "
            "another repository or branch, or delete the old files there."
        )


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
    with hub_errors(api.endpoint, name, pinned):
        folder = Path(
            api.snapshot_download(name, revision=pinned, allow_patterns=_BASE_FILES, ignore_patterns=_NOT_OF_THE_BASE)
        )
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


def _refuse_secrets(uploads: Sequence[Upload], api: HfApi) -> None:
    known = [token for token in (api.token, get_token()) if isinstance(token, str)]
    for upload in uploads:
        if found := secret_in(upload.source, known):
            raise PushRefusedError(
                f"{upload.path} holds {found}. Take it out, and revoke it if anybody else has the file. If it is "
                "none, send that file with `hf upload`, which does not look."
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
