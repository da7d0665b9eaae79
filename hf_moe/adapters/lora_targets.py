"""Parameters and modules that a LoRA config names: experts, attention, shared experts, and never a router."""

import copy
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from hf_moe.layers.geometry import parametrization_of, up_name
from hf_moe.layers.moe_layers import MoeLayer, recorded_modules


def base_model(model: nn.Module) -> nn.Module:
    """The model that PEFT's names start from."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def plain_path(path: str) -> str:
    """A path without what PEFT's wrappers insert."""
    return path.replace(".base_layer", "")


class LayerFilter:
    """The paths that `layers_to_transform`, `layers_pattern` and `exclude_modules` take, as PEFT reads them.

    PEFT reads them for modules alone, so that of parameters is asked here.

    Args:
        model: Whose paths.
        options: Of `LoraConfig`.
        named: `target_modules` of the caller.

    Raises:
        ValueError: If no layer is named or one does not exist, or a module is named by its whole path, which PEFT
            adapts in any layer.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, Any], named: Iterable[str] = ()):
        names = ("layers_to_transform", "layers_pattern", "exclude_modules")
        self.options = {name: options[name] for name in names if options.get(name) is not None}
        paths = [plain_path(path) for path, _ in model.named_modules()]
        layers = self.options.get("layers_to_transform", [])
        if "layers_to_transform" in self.options and layers == []:
            raise ValueError(
                "layers_to_transform=[] names no layer, and PEFT takes it for all. Leave it out, or name some."
            )
        for layer in [layers] if isinstance(layers, int) else layers:
            if not any(f".{layer}." in f".{path}." for path in paths):
                raise ValueError(
                    f"layers_to_transform names layer {layer!r}, which {type(model).__name__} has not. Take it out."
                )
        if whole := sorted(path for path in set(named).intersection(paths) if not self(path)):
            raise ValueError(
                f"target_modules names {whole[0]!r} by its whole path, which PEFT adapts whatever {self} say. Take it "
                "out, or give a shorter name."
            )

    def __str__(self) -> str:
        return " and ".join(f"{name}={value!r}" for name, value in self.options.items())

    def __call__(self, path: str) -> bool:
        if not self.options:
            return True
        probe = LoraConfig(target_modules=[path.rpartition(".")[2]], **self.options)
        return bool(check_target_module_exists(probe, path))


def expert_parameters(model: nn.Module, layers: list[MoeLayer], chosen: LayerFilter | None = None) -> list[str]:
    """Names for `target_parameters` that match both projections of the chosen layers' experts, and nothing else.

    Short names (`mlp.experts.down_proj`) where they are unambiguous. PEFT finds parametrised weights by their full
    names only.

    Raises:
        ValueError: If experts are not stored as parameters, or none is chosen.
    """
    chosen = chosen or LayerFilter(model, {})
    wanted: set[str] = set()
    parametrised_paths: set[str] = set()
    for layer in layers:
        for name in (up_name(layer.experts), "down_proj"):
            is_parametrised = parametrization_of(layer.experts, name) is not None
            if name not in layer.experts._parameters and not is_parametrised:
                raise ValueError(
                    f"{layer.experts_name} holds no parameter {name}: PEFT adapts experts that are stored as one "
                    "parameter for each projection. Load the model without this quantisation."
                )
            path = f"{plain_path(layer.experts_name)}.{name}"
            if chosen(plain_path(layer.experts_name)) and chosen(path):
                wanted.add(path)
                parametrised_paths |= {path} if is_parametrised else set()
    if not wanted:
        raise ValueError(f"{chosen} leave no experts to adapt: use LoraConfig itself for other modules.")
    everything = {plain_path(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    return _compact(wanted, everything, parametrised_paths)


def attention_modules(model: nn.Module, layers: list[MoeLayer]) -> set[str]:
    """Paths of the linear layers in the attention of the stack of layers that has the MoE layers.

    Not those that choose what sparse attention looks at (indexers): a choice has no gradient.
    """
    stacks = {_stack(layer.name) for layer in layers}
    attention = [path for path in recorded_modules(model, "attentions") if _stack(path) in stacks]
    found = {path for path in _linear_paths(model, attention) if "indexer" not in path.split(".")}
    if not found:
        raise ValueError(
            f"{type(model).__name__} does not say which modules are its attention: name its projections in "
            "target_modules instead of attention=True."
        )
    return found


def shared_expert_modules(model: nn.Module, layers: list[MoeLayer]) -> set[str]:
    """Paths of the linear layers in shared experts: beside the routed experts, or beside the block that holds them."""
    modules = dict(model.named_modules())
    homes = []
    for layer in layers:
        for parent in (layer.name, layer.name.rpartition(".")[0]):
            children = modules[parent].named_children()
            homes += [f"{parent}.{name}".lstrip(".") for name, _ in children if "shared" in name]
    # a single column is the gate of a shared expert
    found = {path for path in _linear_paths(model, homes) if modules[path].out_features != 1}
    if not found:
        raise ValueError(f"{type(model).__name__} has no shared experts: leave out shared_experts=True.")
    return found


def module_targets(model: nn.Module, wanted: set[str]) -> tuple[list[str], list[str]]:
    """Names for `target_modules`, and for `target_parameters` where PEFT would take a module's name for an expert's.

    PEFT renames targets that the per-expert checkpoints of transformers 4 had (`gate_proj`, `up_proj`, `down_proj`,
    `gate`) to the fused parameters, in whatever module they stand.
    """
    names = _compact(wanted, {plain_path(path) for path, _ in model.named_modules()})
    renamed = [name for name in names if _is_renamed(name, model)]
    return [name for name in names if name not in renamed], [f"{name}.weight" for name in renamed]


def refuse_router_targets(config: LoraConfig, model: nn.Module, layers: list[MoeLayer]) -> None:
    """Raise if the config, as PEFT will read it, trains a router or a part of one.

    Raises:
        ValueError: Naming the router and the target.
    """
    read = copy.deepcopy(config)
    convert_peft_config_for_transformers(read, model, None)
    for layer in layers:
        if layer.router is None or layer.router_name is None:
            continue
        root = plain_path(layer.router_name)
        modules = [plain_path(f"{root}.{name}").rstrip(".") for name, _ in layer.router.named_modules()]
        parameters = [plain_path(f"{root}.{name}") for name, _ in layer.router.named_parameters()]
        hit = [path for path in modules if check_target_module_exists(read, path)]
        hit += [path for path in parameters if _matching(path, read.target_parameters or ())]
        hit += [path for path in modules if _is_copied(path, read.modules_to_save or ())]
        if hit:
            raise ValueError(
                f"the targets would train the router {hit[0]}: an expert adapter leaves the routers as they are. Take "
                "its name out of target_modules and modules_to_save."
            )
    for layer in layers:
        if _is_copied(plain_path(layer.experts_name), read.modules_to_save or ()):
            raise ValueError(
                f"modules_to_save={config.modules_to_save} would train a whole copy of {layer.experts_name} beside "
                "its factors: take its name out."
            )


def refuse_unused_patterns(config: LoraConfig, model: nn.Module) -> None:
    """Raise if a `rank_pattern` or `alpha_pattern` matches nothing that PEFT will adapt, and would be ignored."""
    read = copy.deepcopy(config)
    convert_peft_config_for_transformers(read, model, None)
    paths = [plain_path(path) for path, _ in model.named_modules()]
    targets = [path for path in paths if check_target_module_exists(read, path)]
    parameters = {plain_path(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    targets += [path for path in parameters if _matching(path, read.target_parameters or ())]
    # parametrised weights are no parameters of their own name
    targets += read.target_parameters or ()
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, name) or {}:
            if not any(get_pattern_key([pattern], path) == pattern for path in targets):
                raise ValueError(
                    f"{name} {pattern!r} matches nothing that is adapted and would be ignored: the ends of the names "
                    f"are {', '.join(sorted({'.'.join(path.split('.')[-2:]) for path in targets}))}."
                )


def _matching(path: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that PEFT takes for `path`."""
    return [name for name in names if path == name or path.endswith(f".{name}")]


def _is_copied(path: str, names: Iterable[str]) -> bool:
    """Whether PEFT, which looks at the ends of paths, takes a module in `modules_to_save` for `path` or a parent."""
    parts = path.split(".")
    parents = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(parent.endswith(name) for parent in parents for name in names)


def _compact(wanted: set[str], everything: set[str], whole: Collection[str] = ()) -> list[str]:
    """Names that match all of `wanted` and nothing else of `everything`; paths in `whole` are not shortened.

    Raises:
        ValueError: If even a whole path matches something else.
    """
    short = {path: re.sub(r".*\.\d+\.", "", path) for path in wanted}
    rest = everything - wanted
    ambiguous = {name for name in set(short.values()) if any(_matching(other, [name]) for other in rest)}
    names = {path if path in whole or name in ambiguous else name for path, name in short.items()}
    for other in rest:
        if name := _matching(other, names):
            raise ValueError(f"PEFT would take the target {name[0]} for {other} as well: pass the submodel it is in.")
    return sorted(names)


def _stack(path: str) -> str:
    """Where a layer's list of layers is: `model.layers` of `model.layers.3.mlp`."""
    found = re.match(r"(.*)\.\d+(\.|$)", path)
    return "" if found is None else found[1]


def _linear_paths(model: nn.Module, homes: list[str]) -> set[str]:
    """Paths of the linear layers in `homes`, without those that PEFT added."""
    starts = tuple(f"{home}." for home in homes)
    linear = {path for path, module in model.named_modules() if _is_linear(module)}
    return {plain_path(path) for path in linear if f"{path}.".startswith(starts) and ".lora_" not in path}


def _is_linear(module: nn.Module) -> bool:
    # a model's own subclass multiplies in some way of its own (DeepSeek-V4's in groups), which PEFT does not know
    return isinstance(module, nn.Linear) and not type(module).__module__.startswith("transformers.models.")


def _is_renamed(name: str, model: nn.Module) -> bool:
    probe = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(probe, model, None)
    except ValueError:  # one of two names that are fused into one parameter
        return True
    return probe.target_modules != {name}
