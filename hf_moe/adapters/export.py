"""Write an expert adapter with a pair of factors for every expert, as servers and older tools read them.

What is written is read back: folded, it must be the adapter that it came from, and where the base's config can be
read, stock PEFT must find a place for every tensor of it. What reads it (their code was read in November 2026; PEFT
alone is run in the tests):

- PEFT on the fused experts of transformers 5 and on the single experts of transformers 4: `adapter_config.json` names
  the modules as `experts.3.up_proj`, which no shared expert or dense layer matches. Families that PEFT's importer does
  not know get the fused parameters and their doubled rank as well.
- vLLM, for models whose checkpoints hold single experts: the names of tensors, whatever the config targets. Where the
  config has a doubled rank, `--max-lora-rank` must cover it.
- SGLang: the last part of each target, `gate_proj`, `up_proj`, `down_proj` or the fused `gate_up_proj`; other names
  (Mixtral's `w1`) get the fused ones beside them.
- `hf_moe.load_adapter`: folds it, so that the rank is not doubled.
"""

import importlib
import importlib.util
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_moe.adapters import per_expert
from hf_moe.adapters.adapter_files import CONFIG, WEIGHTS
from hf_moe.adapters.frozen_router import HASH_FILE
from hf_moe.adapters.per_expert import FUSED_PATTERN, Experts, Layout, PerExpertError, Stack
from hf_moe.io.json_files import read_object
from hf_moe.io.whole_files import whole_folder, write_json
from hf_moe.loading.config_files import ModelError, load_config
from hf_moe.loading.pretrained import read_config

FORMATS = ("per_expert",)
_REPORT = "Report this with the adapter's config."
_INNER = ".base_layer.lora_A.weight"
_LIBRARY = re.compile(r"(?:transformers|hf_moe)\.models\.(?:modeling_)?(\w+)(?:\.modeling_\w+)?")


class AdapterExportError(ValueError):
    """A folder that is no adapter on fused experts, or one that the format cannot hold."""


def export_adapter(
    path: str | Path, output: str | Path, format: str = "per_expert", *, model_type: str | None = None
) -> Path:
    """Convert the PEFT adapter in `path` to another format, with its record of the routers if it has one.

    `per_expert` gives every expert factors of its own, under the names of the family's checkpoints; gate and up share
    A and have half of B each. Stock PEFT reads it with the rank of the fused projection doubled, which changes no
    output; a rank-stabilised scale is written as a plain `lora_alpha`, because doubling would change it.

    Args:
        path: Folder that PEFT saved, of an adapter on both projections of fused experts with one rank and alpha.
        output: Folder to write: absent or empty. It appears whole or not at all.
        format: `per_expert`.
        model_type: Of the base; needed where neither the adapter nor its base model says it.

    Returns:
        `output`.

    Raises:
        AdapterExportError: If the folder holds no such adapter, the family's checkpoints hold fused experts, or no
            reader would apply what was written.
        FileExistsError: If `output` exists and is not an empty folder.
        ValueError: If the format is unknown.
    """
    folder, output = Path(path), Path(output)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists already: name a new folder, or empty this one.")
    config, tensors = _read(folder)
    model_type = model_type or _model_type(config, folder)
    layout = _layout(model_type, folder)
    experts, others = _experts(tensors, config["r"], layout, folder)
    written = dict(others)
    for root, both in experts.items():
        written |= per_expert.unfold(root, both, config["r"], layout)
    num_experts = next(iter(experts.values())).up.a.shape[0] // config["r"]
    exported = _exported_config(config, model_type, layout, num_experts, others)
    with whole_folder(output) as temporary:
        save_file(written, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / CONFIG, dict(sorted(exported.items())))
        if (folder / HASH_FILE).is_file():
            shutil.copy(folder / HASH_FILE, temporary)
        _read_back(temporary, layout, experts, others)
        base = _base(config, model_type)
        if base is not None:
            _refuse_unread(temporary, base, experts, config)
    return output


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterExportError(f"{folder} holds no {name}: give the folder that PEFT's save_pretrained wrote.")
    try:
        config = read_object(folder / CONFIG)
    except ValueError as error:
        raise AdapterExportError(f"{folder / CONFIG} is not valid JSON ({error}): save the adapter again.") from error
    if config.get("peft_type") != "LORA":
        raise AdapterExportError(f"{folder} holds an adapter of type {config.get('peft_type')!r}, not LORA.")
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name):
            raise AdapterExportError(
                f"{folder} has {name}={config[name]}: readers of per-expert files take one rank and one alpha. Train "
                "without it."
            )
    return config, load_file(folder / WEIGHTS)


def _model_type(config: dict[str, Any], folder: Path) -> str:
    """Of the adapted model, from what PEFT noted of its class, or from the base's own config."""
    adapted = _adapted_class(config)
    library = (config.get("auto_mapping") or {}).get("parent_library") or ""
    if adapted is not None and adapted.config_class is not None:
        # another family may run on the class (Sarvam on GLM-4-MoE's): then only the base can tell
        if [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()].count(adapted.__name__) < 2:
            return adapted.config_class.model_type
    elif found := _LIBRARY.fullmatch(library):
        return found[1]
    base = config.get("base_model_name_or_path")
    if base:
        try:
            return read_config(base).model_type
        except ModelError as error:
            raise AdapterExportError(
                f"the base model of {folder}, {base!r}, cannot be read ({error}): give its model_type."
            ) from error
    raise AdapterExportError(f"{folder} does not say which model it adapts: give its model_type, such as 'qwen3_moe'.")


def _adapted_class(config: dict[str, Any]) -> type[PreTrainedModel] | None:
    """The class that PEFT noted, if it is one of transformers or of hf_moe."""
    noted = config.get("auto_mapping") or {}
    library, name = noted.get("parent_library") or "", noted.get("base_model_class") or ""
    if not _LIBRARY.fullmatch(library) or importlib.util.find_spec(library) is None:
        return None
    found = getattr(importlib.import_module(library), name, None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _layout(model_type: str, folder: Path) -> Layout:
    layout = per_expert.layout_of(model_type)
    way_out = f"use the files in {folder} as they are, or merge the adapter."
    if layout is None:
        raise AdapterExportError(
            f"checkpoints of {model_type!r} hold no expert by itself, so its servers read the fused factors: {way_out}"
        )
    if len(layout.up) == 1:
        raise AdapterExportError(
            f"experts of {model_type!r} have no gate, and PEFT reads single experts' factors only where gate and up "
            f"are one parameter: {way_out}"
        )
    return layout


def _experts(
    tensors: dict[str, Tensor], rank: int, layout: Layout, folder: Path
) -> tuple[dict[str, Experts], dict[str, Tensor]]:
    """The factors of experts by their module's path, and the other tensors."""
    others = dict(tensors)
    experts = {}
    for root in sorted(key.removesuffix(_INNER) for key in tensors if key.endswith(_INNER)):
        inner, outer = (
            Stack(*(others.pop(f"{root}{nesting}.lora_{factor}.weight") for factor in "AB"))
            for nesting in (".base_layer", "")
        )
        experts[root] = _which(inner, outer, layout, root)
        _check_rank(rank, *experts[root], root)
    if not experts:
        raise AdapterExportError(
            f"{folder} has no factors of two projections of fused experts: train with expert_lora_config, or use the "
            "files as they are."
        )
    if alone := [key for key in others if re.search(r"\.experts\.lora_[AB]\.weight", key)]:
        raise AdapterExportError(f"{alone[0]!r} is of one projection alone: readers of single experts take both.")
    return experts, others


def _which(inner: Stack, outer: Stack, layout: Layout, root: str) -> Experts:
    """The up and the down projection. PEFT's keys name neither; where weights are parametrised, down is the inner."""
    for up, down in ((inner, outer), (outer, inner)):
        if up.a.shape[1] == len(down.b) and len(up.b) == len(layout.up) * down.a.shape[1]:
            return Experts(up, down)
    raise AdapterExportError(
        f"the factors of {root} fit no experts of two projections: in/out {inner.a.shape[1]}/{len(inner.b)} and "
        f"{outer.a.shape[1]}/{len(outer.b)}. Is this the adapter of another family?"
    )


def _check_rank(rank: int, up: Stack, down: Stack, root: str) -> None:
    rows = {up.a.shape[0], up.b.shape[1], down.a.shape[0], down.b.shape[1]}
    if len(rows) > 1 or rows.pop() % rank:
        raise AdapterExportError(
            f"the factors of {root} are {tuple(up.a.shape)}, {tuple(up.b.shape)}, {tuple(down.a.shape)} and "
            f"{tuple(down.b.shape)}: all must have experts * r rows or columns, r={rank} as the config says."
        )


def _exported_config(
    config: dict[str, Any], model_type: str, layout: Layout, num_experts: int, others: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The config with the experts' projections among the modules; other targeted parameters stay."""
    if isinstance(config.get("target_modules"), str):
        raise AdapterExportError(
            f"target_modules is the pattern {config['target_modules']!r}: only a list can take the experts in."
        )
    alpha = config["lora_alpha"] * (math.sqrt(config["r"]) if config.get("use_rslora") else 1)
    modules, parameters = per_expert.without_experts(config, (), others)
    fused = [name for name in config.get("target_parameters") or () if per_expert.is_of_experts(name)]
    exported = config | {
        "target_modules": [*modules, *per_expert.targets(num_experts, layout)],
        "target_parameters": parameters or None,
        "lora_alpha": alpha,
        "use_rslora": False,
    }
    if _is_known_to_peft(exported["target_modules"], model_type):
        return exported
    joined = len(layout.up)
    return exported | {
        "target_parameters": [*parameters, *fused],
        "rank_pattern": {FUSED_PATTERN: joined * config["r"]},
        "alpha_pattern": {FUSED_PATTERN: joined * alpha},
    }


def _scale(config: Mapping[str, Any]) -> float:
    rank = config["r"]
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _is_known_to_peft(modules: list[str], model_type: str) -> bool:
    """True if PEFT turns the names of single experts into the fused parameters of this family by itself."""
    probe = LoraConfig(target_modules=modules)
    convert_peft_config_for_transformers(probe, SimpleNamespace(config=SimpleNamespace(model_type=model_type)), None)
    return bool(probe.target_parameters)


def _read_back(folder: Path, layout: Layout, experts: Mapping[str, Experts], others: Mapping[str, Tensor]) -> None:
    """Raise if the file, folded, is not bit for bit what it was made of."""
    try:
        found, rest = per_expert.fold(load_file(folder / WEIGHTS), layout)
    except PerExpertError as error:
        raise AdapterExportError(f"what was written is no adapter: {error} {_REPORT}") from error
    written, meant = _flat(found, rest), _flat(experts, others)
    if written.keys() != meant.keys() or not all(torch.equal(written[key], meant[key]) for key in meant):
        raise AdapterExportError(f"what was written is not what the adapter holds. {_REPORT}")


def _flat(experts: Mapping[str, Experts], others: Mapping[str, Tensor]) -> dict[Any, Tensor]:
    factors = {
        (root, projection, factor): value
        for root, both in experts.items()
        for projection, stack in both._asdict().items()
        for factor, value in stack._asdict().items()
    }
    return factors | dict(others)


def _base(config: dict[str, Any], model_type: str) -> PreTrainedModel | None:
    """The adapted model without its weights, if the base's config is on this machine."""
    name = config.get("base_model_name_or_path")
    if not name:
        return None
    try:
        base = load_config(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):  # not here, damaged, or of a type that transformers does not know
        return None
    adapted = _adapted_class(config)
    if adapted is None:
        if type(base) not in AutoModelForCausalLM._model_mapping:
            return None
        adapted = AutoModelForCausalLM._model_mapping[type(base)]
    if not isinstance(base, adapted.config_class):
        base = base.get_text_config()
    if not isinstance(base, adapted.config_class) or base.model_type != model_type:
        return None
    with torch.device("meta"):
        return adapted(base)


def _refuse_unread(
    folder: Path, base: PreTrainedModel, experts: Mapping[str, Experts], config: Mapping[str, Any]
) -> None:
    """Raise unless stock PEFT puts every tensor into a place of its own, and every expert's product is the same."""
    read_config = LoraConfig.from_pretrained(folder)
    tuned = get_peft_model(base, read_config, low_cpu_mem_usage=True)
    read = convert_peft_adapter_state_dict_for_transformers(tuned, read_config, load_file(folder / WEIGHTS))
    places = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    name = type(base).__name__
    if odd := sorted(places.keys() ^ read.keys()):
        what = "finds nothing in the file for" if odd[0] in places else "has no place for"
        raise AdapterExportError(
            f"stock PEFT {what} {odd[0]!r} of {name} ({len(odd)} in all): use the files as they are, or merge."
        )
    for root, both in experts.items():
        for wrapper, key in _wrappers(tuned, root):
            stack = both.down if wrapper.parameter_name == "down_proj" else both.up
            loaded = Stack(read[f"{key}.lora_A.weight"], read[f"{key}.lora_B.weight"])
            expected = _products(stack, config["r"], _scale(config))
            actual = _products(loaded, wrapper.r["default"], wrapper.scaling["default"])
            # float64: block by block the same sums, in another order
            if actual.shape != expected.shape or (actual - expected).abs().max() > 1e-9 * expected.abs().max():
                raise AdapterExportError(
                    f"stock PEFT would apply other factors to {key} of {name} than the adapter has: use the files as "
                    "they are, or merge."
                )


def _wrappers(tuned: Any, root: str) -> list[tuple[Any, str]]:
    """PEFT's wrappers of an experts module, each with the path of its factors."""
    found = []
    wrapper, key = tuned.get_submodule(root), root
    while isinstance(wrapper, ParamWrapper):
        found.append((wrapper, key))
        wrapper, key = wrapper.base_layer, f"{key}.base_layer"
    return found


def _products(stack: Stack, rank: int, scale: float) -> Tensor:
    """`scale * B A x` of every expert for one vector, `[E, out]`."""
    a, b = (factor.double() for factor in stack.split(rank))
    x = torch.randn(a.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return scale * (b @ (a @ x).unsqueeze(-1)).squeeze(-1)
