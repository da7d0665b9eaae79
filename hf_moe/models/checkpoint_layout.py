"""Layout of an hf_moe checkpoint on disk, and the checks that it passes before a model is made of it.

On disk every expert has its own tensors, the layout of Qwen3-MoE, OLMoE and DeepSeek that other tools read:
`mlp.experts.3.gate_proj.weight [I, H]`, `up_proj [I, H]`, `down_proj [H, I]`. In memory they are fused:
`mlp.experts.gate_up_proj [E, 2I, H]` (gate rows first), `down_proj [E, H, I]`. transformers converts in both
directions, bit for bit; `save_pretrained(save_original_format=False)` writes the fused tensors, which load as well.

transformers initialises what a checkpoint lacks, and loads NaN, integers and files outside of the folder, silently.
 `VerifiedCheckpointMixin` refuses instead, with the tensor's and the file's name:

- safetensors only; every file whole; the index and the files name the same tensors; no index entry leaves the folder;
- every tensor of the base model there exactly once, in the shape of the config, as F64, F32, F16 or BF16, and finite;
  no tensor that the config does not describe;
- a task head may be absent, or left over, as transformers allows (and reports): absent where the config's
  `architectures` do not name the class that is loaded, left over where they name the class that has it (or none).
  `ignore_mismatched_sizes=True` holds for heads alone;
- where the config ties `lm_head` to the embeddings, a stored `lm_head.weight` has the same values.

The same holds for `state_dict=`. A checkpoint stored quantised, which has other tensors, is checked for whole files,
a tensor for every module, and finite values. Not checked: GGUF files, adapters, and distributed checkpoints (which
transformers loads strictly).

Cost: the headers are read once more, and every loaded parameter is read once where it lies (no copy, no mask). What is
not in memory as floating point afterwards (offloaded to disk, quantised) is read once more from its file.
"""

import json
import logging
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from itertools import groupby, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from .checkpoint_files import (
    FLOATING,
    INDEX_FILE,
    SINGLE_FILE,
    SUPERSEDED,
    CheckpointError,
    StoredTensor,
    check_folder,
    check_index,
    from_state_dict,
    read_headers,
    refuse,
    refuse_links,
    with_variant,
)
from .shipped_code import code_note

logger = logging.getLogger(__name__)

MODEL_TYPE = "hf_moe"
# what each class has beside the base model, by its name
HEAD_TENSORS = {
    "HfMoeForCausalLM": ("lm_head.weight",),
    "HfMoeForSequenceClassification": ("score.weight",),
    "HfMoeForTokenClassification": ("score.weight", "score.bias"),
    "HfMoeForQuestionAnswering": ("qa_outputs.weight", "qa_outputs.bias"),
}
_FUSED = re.compile(r"(?P<experts>(?:.*\.)?experts)\.(?P<projection>gate_up_proj|down_proj)")
_PER_EXPERT = re.compile(r"(?P<experts>(?:.*\.)?experts)\.(?P<expert>\d+)\.(?P<projection>gate|up|down)_proj\.weight")


if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel as _Base
else:
    _Base = object


def register_conversion_mapping() -> None:
    """Register the per-expert layout of `hf_moe` with transformers. Adds, never replaces; may be called again."""
    if get_checkpoint_conversion_mapping(MODEL_TYPE) is not None:
        return
    gate_and_up = ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"]
    register_checkpoint_conversion_mapping(
        MODEL_TYPE,
        [
            WeightConverter(gate_and_up, "mlp.experts.gate_up_proj", [MergeModulelist(dim=0), Concatenate(dim=1)]),
            WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", [MergeModulelist(dim=0)]),
        ],
    )


def fuse_experts(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with per-expert tensors, where it has them, fused as the model holds them.

    Raises:
        CheckpointError: If an expert, or one of its three projections, is missing.
    """
    fused: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[str, int], Tensor]] = defaultdict(dict)
    for name, tensor in state_dict.items():
        if match := _PER_EXPERT.fullmatch(name):
            experts[match["experts"]][match["projection"], int(match["expert"])] = tensor
        else:
            fused[name] = tensor
    for path, tensors in experts.items():
        count = 1 + max(expert for _, expert in tensors)
        for expert, projection in product(range(count), ("gate", "up", "down")):
            if (projection, expert) not in tensors:
                raise CheckpointError(
                    f"{path}.{expert}.{projection}_proj.weight is missing in the state_dict. Save it again."
                )
        gate, up, down = (torch.stack([tensors[name, e] for e in range(count)]) for name in ("gate", "up", "down"))
        fused |= {f"{path}.gate_up_proj": torch.cat([gate, up], dim=1), f"{path}.down_proj": down}
    return fused


@dataclass(frozen=True)
class Target:
    """A parameter or buffer of the model, and the tensors on disk that make it."""

    name: str
    shape: tuple[int, ...]
    floating: bool

    @cached_property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every per-expert tensor of fused expert weights; of other tensors the tensor itself."""
        fused = _FUSED.fullmatch(self.name)
        if fused is None or len(self.shape) != 3:
            return {self.name: self.shape}
        num_experts, rows, columns = self.shape
        projections, rows = (("down",), rows) if fused["projection"] == "down_proj" else (("gate", "up"), rows // 2)
        return {
            f"{fused['experts']}.{expert}.{projection}_proj.weight": (rows, columns)
            for expert in range(num_experts)
            for projection in projections
        }

    @cached_property
    def known(self) -> dict[str, tuple[int, ...]]:
        """Every stored name that this target accepts: per expert, or fused."""
        return self.parts | {self.name: self.shape}


def targets_of(model: nn.Module) -> dict[str, Target]:
    """Tensors that a checkpoint must hold for `model`, by name."""
    tensors = model.state_dict(keep_vars=True)
    # DeepSpeed ZeRO-3 leaves an empty parameter with its full shape beside it
    shapes = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors.items()}
    return {name: Target(name, shapes[name], tensor.is_floating_point()) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Assignment:
    """Stored tensors by the target that they go into, and those without one by the name that `key_mapping` gives."""

    stored: dict[str, dict[str, StoredTensor]]
    unexpected: dict[str, StoredTensor]


def assign(
    stored: list[StoredTensor], targets: dict[str, Target], prefix: str, renamings: list[WeightRenaming]
) -> Assignment:
    """Match names as transformers does: the caller's `key_mapping`, then `prefix` ("model") added or taken away."""
    owner = {name: target.name for target in targets.values() for name in target.known}
    assigned: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    unexpected: dict[str, StoredTensor] = {}
    for tensor in stored:
        name = tensor.name
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        spellings = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        known = next((spelling for spelling in spellings if spelling in owner), None)
        if known is None:
            unexpected[name] = tensor
        elif known in assigned[owner[known]]:
            raise CheckpointError(
                f"{tensor.where} and {assigned[owner[known]][known].where} are both {known} of the model. Delete the "
                "one that does not belong there."
            )
        else:
            assigned[owner[known]][known] = tensor
    return Assignment(dict(assigned), unexpected)


def check_layout(
    model: PreTrainedModel, checkpoint: Assignment, targets: dict[str, Target], resize_heads: bool
) -> None:
    """Raise unless `checkpoint` gives every tensor of the base model, and of the heads that it must have.

    Raises:
        CheckpointError: Names each tensor and its file; see this module's docstring for the rules.
    """
    files = sorted({tensor.origin for parts in checkpoint.stored.values() for tensor in parts.values()})
    held = f"{files[0]} and {len(files) - 1} more files" if len(files) > 1 else "".join(files) or "an empty checkpoint"
    problems = []
    for target in targets.values():
        found = checkpoint.stored.get(target.name, {})
        if not found:
            if _must_be_there(model, target.name):
                first, *others = target.parts
                problems.append(f"{first} is missing in {held}" + (f" (and {len(others)} more)" if others else ""))
            continue
        problems += _wrong_dtypes(target, found)
        if not _is_head(model, target.name):
            problems += _mismatches(target, found)
        elif not resize_heads:
            hint = " (ignore_mismatched_sizes=True makes a new head)"
            problems += [mismatch + hint for mismatch in _mismatches(target, found)]
    problems += _left_over(model, checkpoint.unexpected)
    problems += _untied(model, checkpoint)
    refuse(
        problems,
        "Nothing new is initialised in their place. Load the checkpoint with the config.json that it was saved "
        "with, or copy, download or save it again.",
    )


def check_modules(model: PreTrainedModel, stored: list[StoredTensor], targets: dict[str, Target]) -> None:
    """Raise unless every module that has parameters has some tensor: all that holds for every quantised format."""
    prefix = f"{model.base_model_prefix}."
    modules = set()
    for tensor in stored:
        path = tensor.name.removeprefix(prefix).split(".")
        modules |= {".".join(path[:depth]) for depth in range(1, len(path))}
    absent = []
    for target in targets.values():
        needed = dict.fromkeys(name.rpartition(".")[0] for name in target.parts)
        found = [module for module in needed if module.removeprefix(prefix) in modules]
        fused = target.name.rpartition(".")[0]
        if (not found and fused.removeprefix(prefix) in modules) or not _must_be_there(model, target.name):
            continue
        absent += [module for module in needed if module not in found]
    files = sorted({tensor.origin for tensor in stored})
    refuse(
        [f"{module} has no tensor in {', '.join(files)}" for module in absent],
        "Nothing new is initialised in their place. Copy, download or quantise the checkpoint again.",
    )


def _mismatches(target: Target, found: dict[str, StoredTensor]) -> list[str]:
    problems = []
    if target.name not in found:
        held = ", ".join(sorted({tensor.origin for tensor in found.values()}))
        problems = [f"{name} is missing in {held}" for name in target.parts if name not in found]
    elif len(found) > 1:
        problems = [f"{found[target.name].where} is there once more, per expert"]
    for name, tensor in found.items():
        if tensor.shape != target.known[name]:
            problems.append(f"{tensor.where} has shape {list(tensor.shape)}, not {list(target.known[name])}")
    return problems


def _wrong_dtypes(target: Target, found: dict[str, StoredTensor]) -> list[str]:
    return [
        f"{tensor.where} has dtype {tensor.dtype}, not one of {', '.join(sorted(FLOATING))}"
        for tensor in found.values()
        if target.floating and not tensor.floating
    ]


def _is_head(model: PreTrainedModel, name: str) -> bool:
    """True if `name` is outside of the base model."""
    return model.base_model is not model and not name.startswith(f"{model.base_model_prefix}.")


def _must_be_there(model: PreTrainedModel, name: str) -> bool:
    if name in model.all_tied_weights_keys or _matches(model._keys_to_ignore_on_load_missing, name):
        return False
    return not _is_head(model, name) or type(model).__name__ in (model.config.architectures or [])


def _left_over(model: PreTrainedModel, unexpected: Mapping[str, StoredTensor]) -> list[str]:
    """Tensors outside of the config, other than heads of the saved class and layers of other pipeline stages."""
    # transformers 5.17 has no pipeline stages
    if getattr(model, "_pp_stage", None) is not None:
        return []
    saved_as = model.config.architectures or list(HEAD_TENSORS)
    heads = {name for saved in saved_as if saved != type(model).__name__ for name in HEAD_TENSORS.get(saved, ())}
    return [
        f"{tensor.where} has no place in the model that the config describes"
        for name, tensor in unexpected.items()
        if name not in heads and not _matches(model._keys_to_ignore_on_load_unexpected, name)
    ]


def _untied(model: PreTrainedModel, checkpoint: Assignment) -> list[str]:
    """Stored tensors that the config ties to others, and that differ from them: transformers would untie them."""
    problems = []
    for name, source in model.all_tied_weights_keys.items():
        tied, held = (checkpoint.stored.get(key, {}).get(key) for key in (name, source))
        if tied is None or held is None:
            continue
        values = [value for _, value in _values([tied, held])]
        if len(values) == 2 and (values[0].dtype != values[1].dtype or not torch.equal(*values)):
            problems.append(f"{tied.where} differs from {held.where}, and the config says that they are one")
    return problems


def _matches(patterns: Iterable[str] | None, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def is_finite(tensor: Tensor) -> bool:
    """True if no element is NaN or infinite. One pass, no copy: NaN and infinities survive a minimum and a maximum."""
    if tensor.numel() == 0:
        return True
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def check_finite(model: nn.Module, checkpoint: Assignment, in_memory: bool) -> None:
    """Raise if a loaded tensor has NaN or infinite elements.

    Args:
        in_memory: Read the model's own tensors where they are there as floating point; else every stored one.
    """
    loaded = model.state_dict(keep_vars=True) if in_memory else {}
    unread: list[StoredTensor] = []
    for name, parts in checkpoint.stored.items():
        tensor = loaded.get(name)
        # of a tensor spread over processes, each one checks what it holds
        tensor = getattr(tensor, "_local_tensor", tensor)
        if tensor is None or tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
            unread += parts.values()
        elif not is_finite(tensor):
            raise CheckpointError(_why_not_finite(list(parts.values()), tensor.dtype))
    if (broken := _first_not_finite(unread)) is not None:
        raise CheckpointError(_not_finite(broken))


def _not_finite(tensor: StoredTensor) -> str:
    return (
        f"{tensor.where} has NaN or infinite elements: a training run that diverged saves such weights. Use an "
        "earlier checkpoint, or copy or download this one again."
    )


def _why_not_finite(parts: list[StoredTensor], dtype: torch.dtype) -> str:
    broken = _first_not_finite(parts)
    if broken is not None:
        return _not_finite(broken)
    largest, tensor = max(
        ((float(value.abs().max()), tensor) for tensor, value in _values(parts)), key=lambda item: item[0]
    )
    return f"{tensor.where} has elements up to {largest:g}, too large for {dtype}. Load it with dtype=torch.bfloat16."


def _first_not_finite(parts: list[StoredTensor]) -> StoredTensor | None:
    return next((tensor for tensor, value in _values(parts) if not is_finite(value)), None)


def _values(parts: list[StoredTensor]) -> Iterator[tuple[StoredTensor, Tensor]]:
    """The floating point values of `parts`, one tensor at a time, each file opened once."""
    readable = sorted((part for part in parts if part.floating), key=lambda part: str(part.file))
    for file, group in groupby(readable, key=lambda part: part.file):
        if file is None:
            yield from ((part, part.value) for part in group if part.value is not None and not part.value.is_meta)
            continue
        with safe_open(file, framework="pt") as opened:
            for part in group:
                yield part, opened.get_tensor(part.name)


def _without_quantizer(model: PreTrainedModel) -> PreTrainedModel:
    """The model that the config alone describes, without storage: a quantizer adds and reshapes parameters."""
    with torch.device("meta"):
        return type(model)(model.config)


def _auto_map(model_class: type[PreTrainedModel], known: dict[str, str] | None) -> dict[str, str]:
    """`known`, and every Auto class that the modeling file of `model_class` serves."""
    entries = dict(known or {})
    module = sys.modules[model_class.__module__]
    for member_class in vars(module).values():
        if isinstance(member_class, type) and member_class.__module__ == module.__name__:
            auto_class = getattr(member_class, "_auto_class", None)
            if auto_class is not None:
                entries[auto_class] = f"{module.__name__.split('.')[-1]}.{member_class.__name__}"
    return entries


@contextmanager
def _under_own_name(model_class: type) -> Iterator[None]:
    """FSDP2 makes a class of its own in a module of torch, whose code transformers would save in place of ours."""
    made, parents = (model_class.__module__, model_class.__name__), model_class.__mro__
    if parents[1].__name__ != "FSDPModule":
        yield
        return
    model_class.__module__, model_class.__name__ = parents[2].__module__, parents[2].__name__
    try:
        yield
    finally:
        model_class.__module__, model_class.__name__ = made


def _put_aside(model: PreTrainedModel, folder: Path, variant: str | None) -> Path:
    """Make the checkpoint in `folder`, if there is one, not load any more; the path of its single file."""
    single, index = (folder / with_variant(name, variant) for name in (SINGLE_FILE, INDEX_FILE))
    superseded = single.with_name(single.name + SUPERSEDED)
    if not single.exists() and not index.exists():
        return superseded
    if (
        "disk" in getattr(model, "hf_device_map", {}).values()
        and folder.resolve() == Path(model.name_or_path).resolve()
    ):
        raise CheckpointError(
            f"{folder} holds weights that this model still reads from disk (device_map). Save into another folder."
        )
    # what transformers refuses to write must not cost the old checkpoint
    with tempfile.TemporaryDirectory() as trial:
        model.config.save_pretrained(trial)
        if model.can_generate():
            model.generation_config.save_pretrained(trial)
    index.unlink(missing_ok=True)
    if single.exists():
        single.replace(superseded)
    return superseded


class VerifiedCheckpointMixin(_Base):
    """Loading that refuses a damaged checkpoint, and saving that cannot leave a mixture of two. First among the bases.

    Source: `from_pretrained`, `_load_pretrained_model` and `save_pretrained` of `PreTrainedModel`, whose arguments and
    results stay as they are.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load as `PreTrainedModel.from_pretrained` does, from safetensors files alone.

        Raises:
            CheckpointError: If the checkpoint is damaged or is not the one of this model; names tensor and file.
        """
        path = pretrained_model_name_or_path
        if path is not None and kwargs.get("gguf_file") is None:
            if kwargs.setdefault("use_safetensors", True) is False:
                raise CheckpointError(
                    "use_safetensors=False: hf_moe reads safetensors only, a pickle can run code. Leave it out."
                )
            kwargs["use_safetensors"] = True
            if os.path.isdir(path):
                check_folder(Path(path, kwargs.get("subfolder") or ""), kwargs.get("variant"))
        try:
            return super().from_pretrained(path, *model_args, **kwargs)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{INDEX_FILE} of {path} is not valid JSON ({error}). Download it again.") from error

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Load as `nn.Module.load_state_dict` does, from either layout.

        The Trainer resumes through here, with the tensors as they lie on disk and `strict=False`: for native models it
        trains on with newly initialised experts and a warning (transformers 5.23).
        """
        return super().load_state_dict(fuse_experts(state_dict), *args, **kwargs)

    @classmethod
    def _load_pretrained_model(
        cls,
        model: PreTrainedModel,
        state_dict: dict[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> Any:
        """Hook of transformers, called with the files that it resolved and the model still without weights."""
        load = super()._load_pretrained_model
        quantizer = load_config.hf_quantizer
        # expected_keys: the tensors of an adapter; files and a state dict: those of a GGUF file
        if expected_keys is not None or (state_dict is not None and checkpoint_files):
            return load(model, state_dict, checkpoint_files, load_config, expected_keys)
        stored = from_state_dict(state_dict) if state_dict is not None else read_headers(checkpoint_files or [])
        weight_map = (load_config.sharded_metadata or {}).get("weight_map")
        if weight_map is not None:
            check_index(weight_map, stored)
        targets = targets_of(model if quantizer is None else _without_quantizer(model))
        if quantizer is not None and quantizer.pre_quantized:
            checkpoint = Assignment({"": {tensor.name: tensor for tensor in stored}}, {})
            check_modules(model, stored, targets)
        else:
            renamings = [rule for rule in load_config.weight_mapping or [] if isinstance(rule, WeightRenaming)]
            checkpoint = assign(stored, targets, model.base_model_prefix, renamings)
            check_layout(model, checkpoint, targets, load_config.ignore_mismatched_sizes)
        if checkpoint_files and (note := code_note(Path(checkpoint_files[0]).parent)) is not None:
            logger.warning(note)
        result = load(model, state_dict, checkpoint_files, load_config, expected_keys)
        check_finite(model, checkpoint, in_memory=quantizer is None)
        return result

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as `PreTrainedModel.save_pretrained` does; a save that is cut off leaves a folder that does not load.

        transformers writes over the old files one by one, index or single file last. Those two go first here, so that
        no moment has an old index beside new shards or a new config; an old single file is kept as
        `model.safetensors.superseded` until the save is done. `auto_map` names every class of the modeling file, not
        the saved one alone.

        Raises:
            CheckpointError: If a file of the folder is a symbolic link: transformers would write over its target.
        """
        save = super().save_pretrained
        given = signature(save).bind(save_directory, *args, **kwargs).arguments
        if self._hf_peft_config_loaded or not self.should_save_on_this_rank(given.get("is_main_process", True)):
            return save(save_directory, *args, **kwargs)
        with _under_own_name(type(self)):
            if self._auto_class is not None and type(self).__module__ != "__main__":
                self.config.auto_map = _auto_map(type(self), getattr(self.config, "auto_map", None))
            refuse_links(Path(save_directory))
            superseded = _put_aside(self, Path(save_directory), given.get("variant"))
            save(save_directory, *args, **kwargs)
        superseded.unlink(missing_ok=True)
