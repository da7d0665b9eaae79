"""Give a saved model the code of the installed hf_moe, in its folder or in what is pushed of it."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from hf_moe.hub.upload_files import CONFIG, LeftOut, Upload, read_json
from hf_moe.io.whole_files import write_text
from hf_moe.models.checkpoint_files import refuse_links
from hf_moe.models.shipped_code import MODELING_FILE, code_note, other_files, shipped_files


def renew_code(folder: str | Path) -> list[str]:
    """Write the installed hf_moe's code over the code that `folder` carries; the weights are not read.

    Returns:
        Names of the files that changed or came new; empty if the folder was up to date.

    Raises:
        PushRefusedError: If config.json is damaged.
        ValueError: If the folder holds no hf_moe model that carries code.
        CheckpointError: If a file there is a link, such as in the cache of the Hub.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or read_json(folder / CONFIG).get("model_type") != "hf_moe":
        raise ValueError(f"{folder} holds no model of the hf_moe architecture; other models carry no code of hf_moe.")
    if not (folder / MODELING_FILE).is_file():
        raise ValueError(f"{folder} carries no {MODELING_FILE}. Load the model and save_pretrained it.")
    refuse_links(folder)
    others = set(other_files(folder))
    renewed = [name for name in shipped_files() if name in others or not (folder / name).exists()]
    # the modeling file first in `shipped_files`, and last here: it imports the others
    for name in reversed(renewed):
        write_text(folder / name, shipped_files()[name].read_text(encoding="utf-8"))
    return sorted(renewed)


def note_of(model: str) -> str | None:
    """`code_note` of a folder, or of a model on the Hub, of which only the code is downloaded."""
    if Path(model).is_dir():
        return code_note(Path(model))
    note = code_note(folder := Path(snapshot_download(model, allow_patterns=list(shipped_files()))))
    return None if note is None else note.replace(str(folder), model)


def with_new_code(checkpoint: Path, uploads: Sequence[Upload]) -> tuple[list[Upload], list[LeftOut]]:
    """`uploads` with the installed hf_moe's code in place of another's that the folder carries, and what stays."""
    others = set(other_files(checkpoint))
    if not others or MODELING_FILE not in {upload.path for upload in uploads}:
        return list(uploads), []
    own = shipped_files()
    kept = [upload for upload in uploads if upload.path not in own]
    new = [Upload(name, path, "code") for name, path in own.items()]
    left = [LeftOut(name, "code of another version of hf_moe: this one's is sent instead") for name in sorted(others)]
    return sorted([*kept, *new], key=lambda upload: upload.path), left
