"""Find every Mixture-of-Experts layer of a model by transformers' contracts, whatever the family and what wraps it.

*Experts* are a module whose class went through transformers' decorator `use_experts_implementation`. It leaves its
marks on every instance (`has_gate`, `has_bias`, `is_transposed`, `is_concatenated`, `config`; `_apply_gate` on the
class), and these marks survive PEFT, `torch.compile`, quantisation and parallel wrappers. No class name is known here.

The *router* is a sibling of the experts in the same block. Every decorated family of transformers 5.23 has one: it
returns `(logits, weights, indices, ...)`, and these very weights and indices reach the experts. Older versions have
exceptions (5.17: Jamba's yields logits only, Granite's returns the indices first). What holds everywhere is the call
of the experts, `(hidden_states, top_k_index, top_k_weights)`. Among the siblings the router is the one that, in this
order:

1. the model records as `router_logits` (transformers' `_can_record_outputs`);
2. declares an integer `top_k` (DeepSeek-V4's hash router, the routers of Ernie-VL and of Dots3's vision tower, which
   their models do not record);
3. holds a matrix with a row for each expert (blocks that choose the top k themselves: this sibling yields logits).

Source: transformers 5.23, `integrations/moe.py::use_experts_implementation`, `utils/output_capturing.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_moe.layers.geometry import GeometryError, declared_size
from hf_moe.layers.skipped_slots import may_skip_slots
from hf_moe.layers.storage import storage_of

_DECORATOR_MARKS = ("config", "has_gate", "has_bias", "is_transposed", "is_concatenated")
# where PyTorch and PEFT wrappers keep the module they wrap
_WRAPPED_AS = (
    "base_layer",  # PEFT tuner layers, ParamWrapper among them; experts of which some are trained
    "trained_slices",  # the latter's copy of those: the base, which comes first, stands for both
    "original_module",  # PEFT modules_to_save
    "modules_to_save",
    "module",  # DistributedDataParallel
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)
# the names that model configs of transformers use for the experts of one token
_TOP_K_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer: the block's router and experts as live modules, and the geometry of the routed experts.

    Attributes:
        name: Path of the block in the model that was searched; the experts are one of its children.
        router: The child that the block calls to route, with whatever wraps it. None where no sibling qualifies: the
            block then routes by itself.
        experts: The module that carries transformers' marks and the weights, without what wraps it.
        num_experts: Experts that the router chooses among, without null and shared experts.
        top_k: Experts per token, at most.
        hidden_size: Width of the rows that experts read and write. Less than the model's hidden size in families
            that project down before the experts (Muse Spark, latent Nemotron-H).
        expert_width: Inner width of one expert (`moe_intermediate_size` in most configs).
        router_name: Path of `router` in the model, None without a router.
        experts_name: Path of `experts` in the model, through whatever wraps it.
    """

    name: str
    router: nn.Module | None
    experts: nn.Module
    num_experts: int
    top_k: int
    hidden_size: int
    expert_width: int
    router_name: str | None
    experts_name: str

    @property
    def plain_name(self) -> str:
        """The block's path in the model without the prefixes that wrappers add."""
        return plain_name(self.name)

    @property
    def called_experts_name(self) -> str:
        """Path of the module that the block calls as its experts, with whatever wraps them."""
        child = self.experts_name[len(self.name) :].strip(".").split(".")[0]
        return _join(self.name, child)

    @property
    def num_expert_parameters(self) -> int:
        """Parameters of one routed expert, biases included; from the geometry, so that packed weights count fully."""
        projections = 2 if self.experts.has_gate else 1
        count = (projections + 1) * self.hidden_size * self.expert_width
        if self.experts.has_bias:
            count += projections * self.expert_width + self.hidden_size
        return count


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """All MoE layers of `model`, in module order.

    Works on any module that contains the layers: a native or hf_moe model, the same under PEFT, `torch.compile` or a
    parallel wrapper, with quantised weights, on the meta device. No weight is read, only shapes.

    Returns:
        One record for each experts module in use; an empty list for a dense model. MoE blocks outside of transformers'
        experts interface (Switch, DBRX, Llama 4, experts as a ModuleList) are not found; `hf_moe.explain` names them.

    Raises:
        ValueError: If neither the router nor the config says how many experts a token takes, or neither the weights
            nor the experts module tell their geometry.
    """
    modules = dict(model.named_modules())
    recorded = {id(module) for module in recorded_routers(model).values()}
    found: dict[str, MoeLayer] = {}
    for path, module in modules.items():
        if is_experts(module):
            block, child = _block_of(path)
            siblings = _siblings(modules[block], child)
            router = _find_router(siblings, recorded, declared_size(module, "num_experts"))
            found.setdefault(_join(block, child), _layer(block, router, _active(modules, path), modules))
    return list(found.values())


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' `use_experts_implementation` decorator made this module's class."""
    # instance attributes only: wrappers that forward attribute access are not the experts
    return all(mark in vars(module) for mark in _DECORATOR_MARKS) and hasattr(type(module), "_apply_gate")


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside PEFT, `torch.compile` and parallel wrappers."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def recorded_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose output the models inside `model` record as `router_logits`, by path."""
    return recorded_modules(model, "router_logits")


def recorded_modules(model: nn.Module, output: str) -> dict[str, nn.Module]:
    """The modules that the models inside `model` record for `output` (`router_logits`, `attentions`), by path.

    Source: transformers 5.23, `utils/output_capturing.py::recursively_install_hooks`.
    """
    found: dict[str, nn.Module] = {}
    for path, submodel in model.named_modules():
        if isinstance(submodel, PreTrainedModel):
            declared: Any = (getattr(submodel, "_can_record_outputs", None) or {}).get(output, [])
            recorders = declared if isinstance(declared, list) else [declared]
            for name, module in submodel.named_modules():
                if any(_records(recorder, name, module) for recorder in recorders):
                    found[_join(path, name)] = module
    return found


def _records(recorder: Any, name: str, module: nn.Module) -> bool:
    """`recorder` is a class, the end of a path, or an `OutputRecorder` of either with an optional part of the path."""
    target = getattr(recorder, "target_class", None if isinstance(recorder, str) else recorder)
    ending = getattr(recorder, "class_name", recorder if isinstance(recorder, str) else None)
    part = getattr(recorder, "layer_name", None)
    is_target = target is not None and isinstance(module, target)
    is_named = ending is not None and name.endswith(ending)
    return (is_target or is_named) and (part is None or f".{part.strip('.')}." in f".{name}.")


def check_index_range(layer: MoeLayer, top_k_index: Tensor) -> None:
    """Verify the expert ids that a router returned.

    Args:
        top_k_index: `[T, K]` or `[..., K]`, an integer dtype. Ids lie in `[0, num_experts)`; the id `num_experts`
            ("skip this slot") is in range only where the experts declare it (`skipped_slots`).

    Raises:
        TypeError: If the ids are not integers.
        ValueError: If an id is out of range.
    """
    if top_k_index.dtype.is_floating_point or top_k_index.dtype in (torch.bool, torch.complex64):
        raise TypeError(f"Expert ids of layer {layer.name!r} must be integers, got {top_k_index.dtype}.")
    if top_k_index.numel() == 0:
        return
    may_skip = may_skip_slots(layer.experts)
    low, high = (int(bound) for bound in top_k_index.aminmax())
    last = layer.num_experts if may_skip else layer.num_experts - 1
    if low < 0 or high > last:
        skip = (
            f"{layer.num_experts} marks a skipped slot"
            if may_skip
            else f"id {layer.num_experts} may mark a skipped slot only if the experts set `may_skip_slots = True`"
        )
        raise ValueError(
            f"Expert ids of layer {layer.name!r} must lie in [0, {last}] ({layer.num_experts} experts; {skip}), "
            f"got {low if low < 0 else high}. Correct the router ({layer.router_name}) that returned them."
        )


@contextmanager
def checked_routing(model: nn.Module) -> Iterator[list[MoeLayer]]:
    """While active, every forward of `model` verifies the ids that each MoE layer hands to its experts.

    Yields:
        The layers under watch. The check reads a minimum and a maximum per layer and forward, so it synchronises the
        device: for tests and debugging.

    Raises:
        ValueError, TypeError: As in `check_index_range`, from inside the forward.
    """
    layers = moe_layers(model)
    handles = [layer.experts.register_forward_pre_hook(_range_check_hook(layer), with_kwargs=True) for layer in layers]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def _range_check_hook(layer: MoeLayer) -> Any:
    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_index_range(layer, kwargs["top_k_index"] if "top_k_index" in kwargs else args[1])

    return check


def plain_name(path: str) -> str:
    """A module's path without the prefixes that PEFT, `torch.compile` and DistributedDataParallel add."""
    return path.replace("_orig_mod.", "").removeprefix("module.").removeprefix("base_model.model.")


def _join(*path: str) -> str:
    return ".".join(part for part in path if part)


def _block_of(experts_path: str) -> tuple[str, str]:
    """Path of the block and name of its child that holds the experts, wrappers skipped."""
    parts = experts_path.split(".")
    while len(parts) > 1 and (parts[-1] in _WRAPPED_AS or parts[-2] == "modules_to_save"):
        parts.pop()
    return ".".join(parts[:-1]), parts[-1]


def _active(modules: dict[str, nn.Module], experts_path: str) -> str:
    """Path of the experts in use: PEFT's `modules_to_save` keeps the original beside one copy for each adapter."""
    head, found, tail = experts_path.partition(".original_module")
    if not found:
        return experts_path
    wrapper: Any = modules[head]
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return experts_path
    in_use = f"{head}.modules_to_save.{wrapper.active_adapters[0]}{tail}"
    return in_use if in_use in modules else experts_path


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside PEFT, `torch.compile` and parallel wrappers."""
    while True:
        inner = next((module._modules[name] for name in _WRAPPED_AS if name in module._modules), None)
        if inner is None:
            return module
        module = inner


def _siblings(block: nn.Module, child: str) -> dict[str, nn.Module]:
    return {name: module for name, module in block.named_children() if name != child}


def _find_router(siblings: dict[str, nn.Module], recorded: set[int], num_experts: int | None) -> str | None:
    """Name of the one sibling that qualifies as router, by the first rule that exactly one sibling meets."""
    rules = (
        lambda module: id(module) in recorded,
        lambda module: declared_size(module, "top_k") is not None,
        lambda module: any(p.dim() == 2 and p.shape[0] == num_experts for p in module.parameters()),
    )
    for meets in rules:
        names = [name for name, module in siblings.items() if meets(unwrapped(module))]
        if len(names) == 1:
            return names[0]
    return None


def _layer(block: str, router_child: str | None, experts_path: str, modules: dict[str, nn.Module]) -> MoeLayer:
    experts = modules[experts_path]
    router_name = None if router_child is None else _join(block, router_child)
    router = None if router_name is None else modules[block].get_submodule(router_child or "")
    inner = None if router is None else unwrapped(router)
    try:
        storage = storage_of(experts)
        hidden_size, expert_width = storage.shape("down")
    except GeometryError as error:
        raise ValueError(f"Cannot tell the size of the experts at {experts_path!r}: {error}") from None
    return MoeLayer(
        name=block,
        router=router,
        experts=experts,
        # under expert parallelism the experts hold a part, the router chooses among all
        num_experts=declared_size(inner, "num_experts")
        or declared_size(experts, "num_experts")
        or storage.num_experts,
        top_k=_top_k(inner, experts, block),
        hidden_size=hidden_size,
        expert_width=expert_width,
        router_name=router_name,
        experts_name=experts_path,
    )


def _top_k(router: nn.Module | None, experts: nn.Module, block: str) -> int:
    declared = declared_size(router, "top_k")
    if declared is not None:
        return declared
    config = experts.config
    for field in _TOP_K_FIELDS:
        value = getattr(config, field, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    raise ValueError(
        f"Cannot tell how many experts a token of layer {block!r} takes: its router declares no integer `top_k`, and "
        f"{type(config).__name__} has none of {', '.join(_TOP_K_FIELDS)}. Set `top_k` on the router module."
    )
