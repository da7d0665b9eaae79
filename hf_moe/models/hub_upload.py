"""Pushes that leave one model behind: new files and the deletion of old weights are one commit."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel as _Base
else:
    _Base = object

_WEIGHTS = re.compile(r"(adapter_)?(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


def superseded_weights(remote: Iterable[str], present: Iterable[str]) -> list[str]:
    """Weight files at a repository's root that a push of the files `present` replaces and does not overwrite.

    An old `model.safetensors` beside new shards would be loaded in their place, an old index names old shards. Weights
    of an adapter replace those of an adapter, weights of a model those of a model. Variants (`model.fp16.safetensors`)
    stay.
    """
    names = set(present)
    kinds = {match[1] for name in names if (match := _WEIGHTS.fullmatch(name))}
    found = ((name, _WEIGHTS.fullmatch(name)) for name in remote if name not in names)
    return sorted(name for name, match in found if match and match[1] in kinds)


class OneCommitPushMixin(_Base):
    """`push_to_hub` and `save_pretrained(push_to_hub=True)` in one commit that deletes what it supersedes.

    Before `PreTrainedModel` among the bases.
    """

    def _upload_modified_files(
        self,
        working_dir: str | os.PathLike,
        repo_id: str,
        files_timestamps: dict[str, float],
        commit_message: str | None = None,
        token: bool | str | None = None,
        create_pr: bool = False,
        revision: str | None = None,
        commit_description: str | None = None,
    ) -> CommitInfo:
        """Hook of transformers, which itself leaves old weight files, that are then loaded in place of new ones.

        If somebody commits meanwhile, the Hub refuses (412) and nothing is changed.
        """
        api, folder = HfApi(token=token), Path(working_dir)
        if revision is not None and not revision.startswith("refs/pr"):
            _create_branch(api, repo_id, revision, create_pr)
        head = api.model_info(repo_id, revision=revision)
        changed = [path for path in folder.iterdir() if path.stat().st_mtime > files_timestamps.get(path.name, 0)]
        files = [file for path in changed for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
        remote = [file.rfilename for file in head.siblings or []]
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in sorted(files)),
                *map(CommitOperationDelete, superseded_weights(remote, os.listdir(folder))),
            ],
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=head.sha,
        )


def _create_branch(api: HfApi, repo_id: str, branch: str, create_pr: bool) -> None:
    try:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    except HfHubHTTPError as error:
        # a pull request to a repository of others: its branch is there, or the commit says that it is not
        if not (create_pr and error.response.status_code == 403):
            raise
