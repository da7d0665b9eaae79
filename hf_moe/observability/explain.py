"""Explain a Mixture-of-Experts model, its parts and the backend that runs it: `print(explain(model))`."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_moe.experts.backends import BACKENDS, HF_MOE, Choice, choose, refusals
from hf_moe.experts.request import request_for
from hf_moe.layers.moe_layers import MoeLayer, inner_model, is_experts, moe_layers
from hf_moe.layers.packed_storages import UnreadableStorage
from hf_moe.layers.path_ranges import join_ranges, split_path
from hf_moe.layers.storage import DENSE_DTYPES, ExpertStorage, attached_storage, storage_of
from hf_moe.layers.unseen_experts import unseen_experts
from hf_moe.loading.config_files import config_errors
from hf_moe.loading.pretrained import build_empty, read_config
from hf_moe.models.configuration_hf_moe import refuse_huge
from hf_moe.observability.unquantised_experts import quantisation_method, unquantised_experts

_FP8_SCALES = ("_scale_inv", "activation_scale")
ACTIVE_RULE = (
    "active = all parameters outside of the routed experts (embeddings and output head counted whole, tied ones once) "
    "+ top_k / num_experts of the routed experts and of adapters on them"
)


@dataclass(frozen=True)
class LayerGroup:
    """MoE layers of one shape; `layers` is like "model.layers.0-15.mlp", the geometry as in `MoeLayer`."""

    layers: str
    count: int
    num_experts: int
    top_k: int
    hidden_size: int
    expert_width: int
    router: str
    backend: str

    def __str__(self) -> str:
        return (
            f"{self.layers}: {self.num_experts} experts, top-{self.top_k}, width {self.expert_width}, "
            f"hidden {self.hidden_size}, router {self.router}"
        )


@dataclass(frozen=True)
class Explanation:
    """Result of `explain`; `str()` is a text to read, `describe(verbose=True)` all of it, `to_dict()` is for JSON.

    Attributes:
        model_class: Class of the model inside all wrappers.
        model_type: Of its config.
        dtype: Of the expert weights as stored; of the first parameter in a dense model.
        total_parameters: Each once, packed weights with the count that they stand for.
        active_parameters: At most so many for one token; see `ACTIVE_RULE`. None where some experts cannot be seen.
        trainable_parameters: Those that require a gradient.
        router: "trainable", "frozen", "partly trainable", or "none" (no layer has a router module).
        layers: MoE layers, those of one shape together.
        backend: The experts implementations that run, joined by ", "; "" without MoE layers.
        choices: The implementation that `hf_moe` chooses where it is the backend, with the reason; a sentence for each
            kind of layer, and one more where many rows lead to another choice.
        with_hf_moe: What it would choose where another backend is set, each with the reason in brackets.
        refusals: Implementation -> reason why it cannot run this model. Empty for quantised experts: their quantiser
            decides. Of a model without weights (meta device), as `choices`, for the device of this machine.
        warnings: Whatever deserves attention, one sentence each.
    """

    model_class: str
    model_type: str
    dtype: str
    total_parameters: int
    active_parameters: int | None
    trainable_parameters: int
    router: str
    layers: tuple[LayerGroup, ...]
    backend: str
    choices: tuple[str, ...]
    with_hf_moe: tuple[str, ...]
    refusals: dict[str, str]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return self.describe()

    def describe(self, *, verbose: bool = False) -> str:
        """A text to read, one line for each point.

        Args:
            verbose: Also how active parameters are counted, and which backends refuse the model and why.
        """
        active = "not known" if self.active_parameters is None else _count(self.active_parameters)
        lines = [
            f"{self.model_class} ({self.model_type}), {self.dtype}",
            f"parameters: total {_count(self.total_parameters)}, active per token {active}, "
            f"trainable {_count(self.trainable_parameters)}",
            *([f"  {ACTIVE_RULE}"] if verbose and self.active_parameters is not None else []),
            f"router: {self.router}",
            f"MoE layers: {sum(group.count for group in self.layers)}",
            *(f"  {group}" for group in self.layers),
            *self._what_runs(),
        ]
        if verbose:
            lines += [f"  refused: {name}: {reason}" for name, reason in self.refusals.items()]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def _what_runs(self) -> list[str]:
        if not self.layers:
            return []
        other = f' With experts_implementation="hf_moe": {"; ".join(self.with_hf_moe)}.' if self.with_hf_moe else ""
        return [f"runs now: {self.backend}.{other}", *(f"  {choice}" for choice in self.choices)]


def explain(model: nn.Module) -> Explanation:
    """Describe `model`: parameters, MoE layers, the experts backend that runs and those that refuse it.

    Works on native and hf_moe models, also under PEFT, `torch.compile` or a parallel wrapper, with quantised experts,
    and on the meta device. Reads shapes only.

    Raises:
        ValueError: As `hf_moe.moe_layers`.
        TypeError: If `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"explain() takes a model (torch.nn.Module), got {type(model).__name__}; for a config or a checkpoint "
            f"folder use explain_config()."
        )
    return explain_layers(model, moe_layers(model))


def explain_layers(model: nn.Module, layers: list[MoeLayer]) -> Explanation:
    """`explain` a model whose `moe_layers` have been found before."""
    inner = inner_model(model)
    config = getattr(inner, "config", None)
    total, active = _count_parameters(model, layers)
    refused, warnings = _refusals(layers)
    unseen = unseen_experts(model, layers)
    more = [unseen, unquantised_experts(model, layers, config), _fp8_to_come(layers, config)]
    return Explanation(
        model_class=type(inner).__name__,
        model_type=getattr(config, "model_type", "unknown"),
        dtype=_dtype_name(model, layers),
        total_parameters=total,
        active_parameters=None if unseen else active,
        trainable_parameters=sum(p.numel() for name, p in model.named_parameters() if _can_train(name, p)),
        router=_router_state(layers),
        layers=tuple(_groups(layers)),
        backend=", ".join(dict.fromkeys(_backend(layer) for layer in layers)),
        choices=tuple(dict.fromkeys(choice for layer in layers for choice in _choices(model, layer))),
        with_hf_moe=tuple(dict.fromkeys(text for layer in layers for text in _with_hf_moe(model, layer))),
        refusals=refused,
        warnings=(*warnings, *(warning for warning in more if warning)),
    )


def explain_config(config: PreTrainedConfig | str) -> Explanation:
    """`explain` the whole model that `config` describes, without its weights: it is built on the meta device.

    Args:
        config: A config, or what `AutoConfig.from_pretrained` takes: a checkpoint folder or a name on the Hub.

    Raises:
        OSError: If there is no config at `config`.
        ValueError: If it is damaged, or no auto class has a model for it.
    """
    name = config if isinstance(config, str) else type(config).__name__
    if isinstance(config, str):
        config = read_config(config)
    else:
        refuse_huge(vars(config))
    with config_errors(name):
        return explain(build_empty(config))


def _count_parameters(model: nn.Module, layers: list[MoeLayer]) -> tuple[int, int]:
    share: dict[int, float] = {}
    stored: set[int] = set()
    total, active = 0, 0.0
    for layer in layers:
        fraction = layer.top_k / layer.num_experts
        total += layer.num_experts * layer.num_expert_parameters
        active += layer.top_k * layer.num_expert_parameters
        stored.update(id(p) for p in _expert_weights(layer.experts))
        wrapper = _experts_child(model, layer)
        share.update((id(p), fraction) for p in wrapper.parameters() if wrapper is not layer.experts)
        for copy in (module for module in wrapper.modules() if is_experts(module) and module is not layer.experts):
            share.update((id(p), 0.0) for p in copy.parameters())
    for parameter in model.parameters():
        if id(parameter) not in stored:
            count = _numel(parameter)
            total += count
            active += count * share.get(id(parameter), 1.0)
    return total, round(active)


def _expert_weights(experts: nn.Module) -> Iterable[nn.Parameter]:
    """Parameters that the geometry counts: the projections in any storage, and all with an entry for each expert."""
    for name, parameter in experts.named_parameters():
        owner, _, leaf = name.rpartition(".")
        is_projection = leaf in ("gate_up_proj", "up_proj", "down_proj") or owner.startswith("parametrizations")
        if is_projection or parameter.shape[:1] == (vars(experts).get("num_experts"),):
            yield parameter


def _experts_child(model: nn.Module, layer: MoeLayer) -> nn.Module:
    """The child of the block that holds the experts: they themselves, or what wraps them."""
    child = layer.experts_name.removeprefix(layer.name).strip(".").split(".")[0]
    return model.get_submodule(f"{layer.name}.{child}".strip("."))


def _numel(parameter: nn.Parameter) -> int:
    # bitsandbytes packs 4-bit values; its state knows the shape
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else shape.numel()


def _can_train(name: str, parameter: nn.Parameter) -> bool:
    """Transformers loads fp8 weights and their scales as if they were trained; they have no gradient."""
    is_of_fp8 = (parameter.is_floating_point() and parameter.itemsize == 1) or name.endswith(_FP8_SCALES)
    return parameter.requires_grad and not is_of_fp8


def _router_state(layers: list[MoeLayer]) -> str:
    states = {_trainable(layer) for layer in layers if layer.router is not None}
    if not states:
        return "none"
    return states.pop() if len(states) == 1 else "partly trainable"


def _trainable(layer: MoeLayer) -> str:
    if layer.router is None:
        return "none"
    return "trainable" if any(p.requires_grad for p in layer.router.parameters()) else "frozen"


def _backend(layer: MoeLayer) -> str:
    return getattr(layer.experts.config, "_experts_implementation", None) or "eager"


def _storage(layer: MoeLayer) -> torch.Tensor | None:
    """A tensor that holds expert weights, as stored."""
    for name, tensor in [*layer.experts.named_parameters(), *layer.experts.named_buffers()]:
        if "down_proj" in name and "scale" not in name and "bias" not in name:
            return tensor
    return None


def _dtype_name(model: nn.Module, layers: list[MoeLayer]) -> str:
    stored = _storage(layers[0]) if layers else next(model.parameters(), None)
    return "unknown dtype" if stored is None else str(stored.dtype).removeprefix("torch.")


def _refusals(layers: list[MoeLayer]) -> tuple[dict[str, str], list[str]]:
    """Reasons by backend, from the first layer that has one, and warnings about the backends in use."""
    refused: dict[str, str] = {}
    warnings: dict[str, list[str]] = {}
    for layer in layers:
        weight, backend, storage = _storage(layer), _backend(layer), storage_of(layer.experts)
        is_attached, is_fp8 = attached_storage(layer.experts) is not None, storage.format == "fp8"
        if _is_of_a_quantiser(layer):
            kind = "in a form of their own" if weight is None else f"as {weight.dtype}"
            text = f"Expert weights are stored {kind}: their quantiser decides which backends run them."
            warnings.setdefault(text, []).append(layer.name)
            continue
        if storage.format != "dense":
            who = (
                "hf_moe's backends run them"
                if is_attached or is_fp8
                else "it decides which of transformers' own backends run them"
            )
            text = f"Expert weights are stored as {storage.format}: {who}."
            warnings.setdefault(text, []).append(layer.name)
        reasons = refusals(request_for(layer.experts, storage, _device(storage)))
        refused = {**reasons, **refused}
        if backend in reasons and storage.device.type != "meta":
            warnings.setdefault(f"The backend in use refuses: {reasons[backend]}", []).append(layer.name)
        if backend not in BACKENDS:
            text = f"Backend {backend!r} is not in hf_moe's table: what it refuses is not known."
            warnings.setdefault(text, []).append(layer.name)
    return refused, [f"{join_ranges(names)}: {text}" for text, names in warnings.items()]


def _is_of_a_quantiser(layer: MoeLayer) -> bool:
    """Whether the weights are in a form that only what quantised them knows."""
    if attached_storage(layer.experts) is not None or storage_of(layer.experts).format == "fp8":
        return False
    weight = _storage(layer)
    return weight is None or weight.dtype not in DENSE_DTYPES


def _fp8_to_come(layers: list[MoeLayer], config: Any) -> str | None:
    """Of a model without weights: its checkpoint is of fp8, and what is described is not."""
    storages = [storage_of(layer.experts) for layer in layers]
    is_dense = any(storage.device.type == "meta" and storage.format == "dense" for storage in storages)
    if not is_dense or quantisation_method(config) != "fp8":
        return None
    return (
        "The checkpoint stores fp8. On a GPU from SM89 on its experts stay so, and more backends refuse them than are "
        "named here: explain(model) tells. Elsewhere transformers unpacks them while it loads, as is described here."
    )


def _device(storage: ExpertStorage) -> torch.device:
    """Device of the weights; of those on the meta device, that on which this machine would put them."""
    where = storage.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if where.type == "meta" else where


def _choices(model: nn.Module, layer: MoeLayer) -> Iterable[str]:
    if _backend(layer) == HF_MOE:
        few, *many = _choices_of_hf_moe(model, layer) or (None,)
        yield from [] if few is None else [str(few)]
        yield from (f"With many rows, {choice}" for choice in many)


def _with_hf_moe(model: nn.Module, layer: MoeLayer) -> Iterable[str]:
    if _backend(layer) != HF_MOE and not _is_of_a_quantiser(layer):  # its weights would be unpacked for the answer
        for place, choice in enumerate(_choices_of_hf_moe(model, layer)):
            yield f"{'with many rows ' * place}{choice.name} ({choice.reason.rstrip('.')})"


def _choices_of_hf_moe(model: nn.Module, layer: MoeLayer) -> list[Choice]:
    """What `hf_moe` chooses for few rows, and for many if that is another; empty where it cannot read the weights."""
    storage = storage_of(layer.experts)
    if isinstance(storage, UnreadableStorage):
        return []
    adapted = getattr(_experts_child(model, layer), "runs_low_rank", False)  # as accelerate_adapters leaves it
    request = request_for(layer.experts, storage, _device(storage), adapted=adapted)
    return list(dict.fromkeys((choose(request), choose(request._replace(many_rows=True)))))


def _groups(layers: list[MoeLayer]) -> Iterable[LayerGroup]:
    groups: dict[tuple[Any, ...], list[str]] = {}
    for layer in layers:
        shape = (layer.num_experts, layer.top_k, layer.hidden_size, layer.expert_width)
        key = (*shape, _trainable(layer), _backend(layer), split_path(layer.name)[::2])
        groups.setdefault(key, []).append(layer.name)
    for (num_experts, top_k, hidden_size, width, router, backend, _), names in groups.items():
        yield LayerGroup(join_ranges(names), len(names), num_experts, top_k, hidden_size, width, router, backend)


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)
