"""Files of a checkpoint: the tensors that they claim to hold, and checks that they are whole."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# A whole single-file checkpoint that a save into the same folder has put aside
SUPERSEDED = ".superseded"

FLOATING = {"F64", "F32", "F16", "BF16"}
_SHOWN = 5


class CheckpointError(ValueError, RuntimeError):
    """A checkpoint that would not give the model that was saved.

    Also a RuntimeError, which transformers' own loader raises for tensors of another shape.
    """


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: in a safetensors `file`, or, where that is `None`, a `value` of a state dict."""

    name: str
    shape: tuple[int, ...]
    floating: bool
    dtype: str
    file: str | None = None
    value: Tensor | None = None

    @property
    def origin(self) -> str:
        return self.file or "the state_dict"

    @property
    def where(self) -> str:
        return f"{self.name} in {self.origin}"


def member(folder: Path, name: str) -> Path:
    """Path of a file that an index names: a bare name, so that it lies in `folder`.

    Raises:
        CheckpointError: If `name` has a directory part, is hidden, or has characters outside of `[A-Za-z0-9_.-]`.
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise CheckpointError(
            f"The index in {folder} names the file {name!r}; it must be a plain file name (letters, digits, '.', '_', "
            "'-') in the same folder. Do not load this checkpoint: get it again from a source that you trust."
        )
    return folder / name


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` (tensor name -> file name) of a safetensors index, with every file name checked."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Copy or save the checkpoint again.") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not weight_map or not isinstance(weight_map, dict) or not isinstance(index.get("metadata"), dict):
        raise CheckpointError(
            f'{path} must hold {{"metadata": {{...}}, "weight_map": {{tensor: file, ...}}}}. Copy or save the '
            "checkpoint again."
        )
    for name in weight_map.values():
        member(path.parent, name)
    return weight_map


def check_folder(folder: Path, variant: str | None) -> None:
    """Refuse what transformers would misread in a local folder, before it opens a file there."""
    single, index = (folder / with_variant(name, variant) for name in (SINGLE_FILE, INDEX_FILE))
    if single.exists() and index.exists():
        raise CheckpointError(
            f"{folder} holds {single.name} and {index.name}, which may be two models (a new save beside an old one). "
            "Delete the one that does not belong there."
        )
    if index.exists():
        read_index(index)
    if single.exists() or index.exists() or (folder / "adapter_config.json").exists():
        return
    superseded = single.with_name(single.name + SUPERSEDED)
    if superseded.exists():
        raise CheckpointError(
            f"{folder} holds an unfinished save. Save again; the model that was there before is {superseded.name}."
        )
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin*"))
    if pickles:
        raise CheckpointError(
            f"{folder} holds {pickles[0]} and no {SINGLE_FILE}: hf_moe reads safetensors only, a pickle can run code. "
            "Load it with torch.load(weights_only=True) and write it with safetensors.torch.save_file."
        )


def refuse_links(folder: Path) -> None:
    """Refuse to save into a folder where a symbolic link stands for a file of a checkpoint.

    Raises:
        CheckpointError: Naming the link and what it points to.
    """
    for path in sorted(folder.glob("*")):
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a symbolic link to {os.readlink(path)}, which a save would write over. Remove the "
                "link, or save into another folder."
            )


def with_variant(name: str, variant: str | None) -> str:
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def read_headers(files: Iterable[str]) -> list[StoredTensor]:
    """Every tensor of the safetensors `files`, without its values."""
    stored: dict[str, StoredTensor] = {}
    for file in map(str, files):
        for tensor in _read_header(file):
            if tensor.name in stored:
                raise CheckpointError(
                    f"{tensor.where} is also in {stored[tensor.name].file}: which one counts is unknown. Delete the "
                    "file that does not belong there."
                )
            stored[tensor.name] = tensor
    return list(stored.values())


def _read_header(file: str) -> list[StoredTensor]:
    if not file.endswith(".safetensors"):
        raise CheckpointError(
            f"{file} is not a safetensors file, and hf_moe reads no other: a pickle can run code. Load it with "
            "torch.load(weights_only=True) and write it with safetensors.torch.save_file."
        )
    if not os.path.isfile(file):
        raise CheckpointError(f"{file} is missing, and the index names it. Copy or download the checkpoint again.")
    if os.path.getsize(file) == 0:
        raise CheckpointError(f"{file} is empty. Copy or download it again.")
    try:
        with safe_open(file, framework="pt") as opened:
            slices = [(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118 (not a mapping)
            headers = [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices]
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file: {_damage(file)} ({error}). Copy or download it again."
        ) from error
    return [StoredTensor(name, shape, dtype in FLOATING, dtype, file) for name, shape, dtype in headers]


def _damage(file: str) -> str:
    """The damage of a file that safetensors refused, as far as its first bytes show it."""
    size = os.path.getsize(file)
    with open(file, "rb") as opened:
        start = opened.read(8)
        if start == b"version ":
            return "it is a Git-LFS pointer, not the weights; run `git lfs pull`"
        header_size = int.from_bytes(start, "little")
        if header_size > min(size - 8, 100_000_000):
            return "its header is cut off or damaged"
        try:
            header = json.loads(opened.read(header_size))
            ends = {name: int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError):
            return "its header is damaged"
    held = size - 8 - header_size
    cut = [name for name, end in sorted(ends.items(), key=lambda item: item[1]) if end > held]
    if cut:
        return f"{max(ends.values()) - held} bytes are missing at its end, from {cut[0]} on"
    return f"it has {held - max(ends.values(), default=0)} bytes too many, or its header is damaged"


def from_state_dict(state_dict: dict[str, Tensor]) -> list[StoredTensor]:
    """The same view of tensors that the caller holds in memory."""
    return [
        StoredTensor(name, tuple(value.shape), value.is_floating_point(), str(value.dtype), value=value)
        for name, value in state_dict.items()
    ]


def check_index(weight_map: dict[str, str], stored: list[StoredTensor]) -> None:
    """The index and the files must name the same tensors in the same places: else they are of two saves."""
    files = {tensor.name: str(tensor.file) for tensor in stored}
    folder = Path(next(iter(files.values()), ".")).parent
    problems = []
    for name, file in weight_map.items():
        member(folder, file)
        if name not in files:
            problems.append(f"{name} is missing in {folder / file}, where the index says it is")
        elif os.path.basename(files[name]) != file:
            problems.append(f"{name} is in {files[name]}, the index says {file}")
    problems += [f"{name} in {file} is not in the index" for name, file in files.items() if name not in weight_map]
    refuse(problems, "The index and the files do not belong together. Copy, download or save the checkpoint again.")


def refuse(problems: list[str], way_out: str) -> None:
    if not problems:
        return
    more = f"\n- and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    listed = "".join(f"\n- {problem}" for problem in problems[:_SHOWN])
    raise CheckpointError(f"The checkpoint is not the one of this model:{listed}{more}\n{way_out}")
