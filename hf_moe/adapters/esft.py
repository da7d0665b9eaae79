"""Train chosen experts only: their weights (ESFT), or their slices of an expert LoRA.

A fused parameter has a gradient for all experts or for none. So the chosen experts' slices become parameters of their
own, `[S, ...]`: gradients and optimizer state exist for them alone, and weight decay cannot move anything else.

Source: Wang et al. 2024, "Let the Expert Stick to His Last: Expert-Specialized Fine-Tuning" (arXiv:2407.01906).

Shape suffixes: T tokens, K slots per token, E experts, S chosen experts.
"""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_moe.adapters.expert_selection import ExpertSelection, LayerSelection
from hf_moe.experts.backends import BACKENDS
from hf_moe.layers.moe_layers import MoeLayer
from hf_moe.layers.skipped_slots import let_skip_slots, restore_skip_flags
from hf_moe.layers.storage import attached_storage, storage_of

logger = logging.getLogger(__name__)


class SelectedExperts(nn.Module):
    """Experts of which some are trained: the frozen ones in `base_layer`, the chosen ones' slices in `trained_slices`.

    Each of the two runs the rows of its own experts; the other's rows carry the id that skips a slot. Their outputs
    add up. The state dict is that of the base, with the slices in their places: what `save_pretrained` writes is an
    ordinary checkpoint, and loading one sets both.
    """

    base_ids: Tensor
    slice_ids: Tensor

    def __init__(self, experts: Any, chosen: Sequence[int]):
        super().__init__()
        num_experts = experts.num_experts
        self.experts_E = torch.tensor(chosen, dtype=torch.int64)
        device = experts.down_proj.device
        base_ids = torch.arange(num_experts + 1).index_fill(0, self.experts_E, num_experts)
        slice_ids = torch.full((num_experts + 1,), len(chosen)).index_copy(
            0, self.experts_E, torch.arange(len(chosen))
        )
        self.base_layer = experts
        # activation and norm are the base's
        shared = [*experts.children(), *(buffer for buffer in experts._buffers.values() if buffer is not None)]
        self.trained_slices = _copy_of_slices(experts, self.experts_E, shared)
        self.register_buffer("base_ids", base_ids.to(device), persistent=False)
        self.register_buffer("slice_ids", slice_ids.to(device), persistent=False)
        self._flags = let_skip_slots(experts)
        self.register_load_state_dict_pre_hook(_split_loaded)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # blocks ask their experts for num_experts and the like
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Arguments and result as transformers' contract for experts."""
        index_TK = top_k_index.long()
        base_TK, slices_TK = self.base_ids[index_TK], self.slice_ids[index_TK]
        # the contract gives skipped slots the weight 0
        base_weights_TK = top_k_weights.masked_fill(base_TK == len(self.base_ids) - 1, 0.0)
        slice_weights_TK = top_k_weights.masked_fill(slices_TK == len(self.experts_E), 0.0)
        out = self.base_layer(hidden_states, base_TK, base_weights_TK)
        return out + self.trained_slices(hidden_states, slices_TK, slice_weights_TK)

    @torch.no_grad()
    def write_back(self) -> nn.Module:
        """Put the slices into the base's weights, whose chosen experts are not used meanwhile; returns the base."""
        for name, slices in self.trained_slices._parameters.items():
            weight = self.base_layer._parameters[name]
            # .data: a forward that waits for its backward does not read these rows
            weight.data.index_copy_(0, self.experts_E.to(weight.device), slices.data.to(weight))
        return self.base_layer

    def unwrap(self) -> nn.Module:
        """The plain experts with the trained weights, as they were before they were wrapped."""
        experts: Any = self.write_back()
        restore_skip_flags(experts, self._flags)
        return experts

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.write_back().state_dict(*args, **kwargs)


def train_selected_experts(model: nn.Module, selection: ExpertSelection) -> nn.Module:
    """Make the chosen experts the only thing in `model` that trains, routers included in what is frozen.

    The model is changed in place and used as before: `Trainer`, `save_pretrained` (an ordinary checkpoint of the whole
    model, at any time), `generate`. Resume with `MoeTrainer`: transformers' Trainer does not load a native family's
    experts from a checkpoint (transformers 5.23). `fold_selected_experts` gives the plain model back. The chosen
    slices are held twice; sums over a token's experts are rounded in another order than in the plain model.

    Raises:
        ValueError: If the selection is of another architecture or empty, or if experts are quantised, offloaded,
            distributed, wrapped by an adapter, or run by an implementation that cannot skip slots. Nothing was changed
            then.
    """
    matched = [(layer, chosen) for layer, chosen in selection.match(model) if chosen.experts]
    if not matched:
        raise ValueError("the selection has no expert to train: choose a larger budget.")
    for layer, _ in matched:
        if (reason := _refusal(model, layer)) is not None:
            raise ValueError(f"the experts of {layer.name!r} cannot be trained slice by slice: {reason}")
    model.requires_grad_(False)
    for layer, chosen in matched:
        _replace(model, layer.called_experts_name, SelectedExperts(layer.experts, chosen.experts))
    logger.info("training %d parameters, %.1f %% of the experts'.", selection.num_parameters, 100 * selection.share)
    return model


def fold_selected_experts(model: nn.Module) -> nn.Module:
    """Undo `train_selected_experts`: the plain model, with the trained weights, all of it frozen.

    Raises:
        ValueError: If `model` trains no selected experts, or they were packed or moved since. Nothing was changed
            then.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, SelectedExperts)]
    if not found:
        raise ValueError("no expert of this model is trained by train_selected_experts.")
    for name, module in found:
        if (storage := storage_of(module.base_layer)).tensors() is None:
            raise ValueError(
                f"the experts of {name!r} are stored as {storage.format} now, which takes no trained slices: fold "
                "before quantising or offloading."
            )
    for name, module in found:
        _replace(model, name, module.unwrap())
    return model


def _copy_of_slices(experts: nn.Module, experts_E: Tensor, shared: Sequence[Any]) -> Any:
    """A module like `experts` with the slices of its weights; its config and the `shared` objects are not copied."""
    memo = {id(value): value for value in (experts.config, *shared)}
    for weight in experts._parameters.values():
        if weight is not None:
            memo[id(weight)] = nn.Parameter(weight.detach().index_select(0, experts_E.to(weight.device)))
    slices: Any = copy.deepcopy(experts, memo)
    slices.num_experts = len(experts_E)
    let_skip_slots(slices)
    return slices


def _split_loaded(module: SelectedExperts, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Before loading: an ordinary state dict of the experts becomes one for base and slices."""
    slices = module.trained_slices._parameters
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key[len(prefix) :]
        if name.split(".")[0].isdigit():
            raise ValueError(
                f"{key!r}: this state dict holds every expert singly. Load the checkpoint with from_pretrained before "
                "train_selected_experts, or resume with hf_moe.MoeTrainer."
            )
        value = state_dict.pop(key)
        state_dict[f"{prefix}base_layer.{name}"] = value
        is_whole = name in slices and len(value) == module.base_layer.num_experts
        state_dict[f"{prefix}trained_slices.{name}"] = (
            value.index_select(0, module.experts_E.to(value.device)) if is_whole else value
        )


def _refusal(model: nn.Module, layer: MoeLayer) -> str | None:
    """Why the layer's experts cannot be split, as a sentence that ends with a way out."""
    experts: Any = layer.experts
    called = model.get_submodule(layer.called_experts_name)
    if isinstance(called, SelectedExperts):
        return "they already are; call fold_selected_experts(model) first."
    if called is not experts:
        return f"they are wrapped by {type(called).__name__}; merge or unload the adapter, or use mask_expert_lora."
    storage = storage_of(experts)
    if storage.tensors() is None or "forward" in vars(experts) or attached_storage(experts) is not None:
        form = "" if storage.format == "dense" else f" (stored as {storage.format})"
        return f"their weights are quantised or offloaded{form}; load the model in bfloat16 or float32 on one device."
    for name, weight in experts._parameters.items():
        if weight is not None and type(weight) is not nn.Parameter:
            return f"{name} is a {type(weight).__name__}; load plain weights, not sharded."
        if weight is not None and weight.is_meta:
            return f"{name} has no values (meta device); load the model first."
        if weight is not None and len(weight) != layer.num_experts:
            return (
                f"{name} has {len(weight)} slices for {layer.num_experts} experts; expert parallelism is not served."
            )
    return _implementation_refuses(experts)


def _implementation_refuses(experts: Any) -> str | None:
    """Whether what runs the experts now leaves skipped slots out: known by name, the class's own loop by a trial."""
    name = experts.config._experts_implementation or "eager"
    if name not in BACKENDS:
        return f"whether experts_implementation={name!r} can skip slots is unknown; use 'hf_moe'."
    if name != "eager":
        return None
    # one expert on the CPU, where an id out of range is an error and not the end of the process
    trial = _copy_of_slices(experts, torch.zeros(1, dtype=torch.int64), shared=()).cpu()
    width = trial.down_proj.shape[2 if trial.is_transposed else 1]
    rows = trial.down_proj.new_ones(1, width)
    try:
        with torch.no_grad():
            out = trial(rows, torch.ones(1, 1, dtype=torch.int64), rows.new_zeros(1, 1))
    except (IndexError, RuntimeError) as error:
        return (
            f"the class's own loop (experts_implementation='eager') cannot skip slots ({error!s:.80}); "
            "use 'hf_moe' or 'grouped_mm'."
        )
    return None if not out.any() else "the class's own loop computes slots that it should skip; use 'hf_moe'."


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class SlicedFactor(nn.Module):
    """Stands for one of PEFT's factors: `weight` is the whole factor, of which the chosen experts' slices train.

    Its state dict holds the one key `weight`, as PEFT's Linear has it.

    Args:
        weight: A as `[E * R, in]` or B as `[out, R * E]`, PEFT's layouts.
        axis: Of the experts in A as `[E, R, in]` (0) or B as `[out, R, E]` (2).
    """

    frozen: Tensor
    experts_E: Tensor
    bias = None

    def __init__(self, weight: Tensor, num_experts: int, experts: Sequence[int], axis: int):
        super().__init__()
        rows, columns = weight.shape
        shape = (num_experts, -1, columns) if axis == 0 else (rows, -1, num_experts)
        self.axis, self.shape = axis, weight.shape
        self.register_buffer("frozen", weight.detach().reshape(shape).clone())
        self.register_buffer("experts_E", torch.tensor(experts, dtype=torch.int64, device=weight.device), False)
        self.slices = nn.Parameter(self.frozen.index_select(axis, self.experts_E))
        self.register_load_state_dict_pre_hook(_split_factor)

    @property
    def weight(self) -> Tensor:
        return self.frozen.to(self.slices.dtype).index_copy(self.axis, self.experts_E, self.slices).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        destination = {} if destination is None else destination
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()
        return destination


def _split_factor(module: SlicedFactor, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Before loading: the whole factor becomes its frozen part and the slices."""
    value = state_dict.pop(f"{prefix}weight", None)
    if value is not None and value.shape == module.shape:
        value = value.reshape(module.frozen.shape)
        state_dict[f"{prefix}slices"] = value.index_select(module.axis, module.experts_E.to(value.device))
    if value is not None:
        state_dict[f"{prefix}frozen"] = value


def mask_expert_lora(model: nn.Module, selection: ExpertSelection, adapter_name: str = "default") -> nn.Module:
    """Train an expert LoRA for the chosen experts only; gradients and optimizer state exist only for their slices.

    The factors of S chosen of E experts become parameters `[S, R, in]` (A) and `[out, R, S]` (B), in place of PEFT's
    `[E * R, in]` and `[out, R * E]`; the rest of them is a buffer.

    Call it after `get_peft_model` (and `accelerate_adapters`, if used) and before the optimizer is made. The other
    slices keep their values bit for bit: with PEFT's initialisation B is zero there, so those experts stay the base's.
    Adapters elsewhere (attention) train as before. Files stay PEFT's, with the factors of all experts; an adapter that
    is loaded again must be masked again to be trained on.

    Args:
        model: A `PeftModel`, or one with PEFT's layers in it, with LoRA on the experts; changed in place.
        selection: Which experts of each layer train (`select_experts`); in a layer without chosen experts nothing
            does.
        adapter_name: Of the adapter to mask, in PEFT's tables.

    Returns:
        `model`.

    Raises:
        ValueError: If the selection is of another architecture or empty, a layer has no such adapter on its experts,
            the adapter is masked already, or its factors are of something else than the layer's experts. Nothing was
            changed then.

    Source: Wang et al. 2024 (arXiv:2407.01906), on the factors instead of the weights.
    """
    matched = selection.match(model)
    if not any(chosen.experts for _, chosen in matched):
        raise ValueError("the selection has no expert to train: choose a larger budget.")
    found = [(chosen, wrapper) for layer, chosen in matched for wrapper in _lora_wrappers(model, layer, adapter_name)]
    for chosen, wrapper in found:
        _mask(wrapper, chosen, adapter_name)
    return model


def _lora_wrappers(model: nn.Module, layer: MoeLayer, adapter_name: str) -> list[Any]:
    """PEFT's wrappers of the layer's expert projections."""
    from peft.tuners.lora.layer import ParamWrapper

    wrappers = []
    module: Any = model.get_submodule(layer.called_experts_name)
    while isinstance(module, ParamWrapper):
        if adapter_name in module.lora_A:
            wrappers.append(module)
        module = module.base_layer
    if not wrappers:
        raise ValueError(
            f"the experts of {layer.name!r} have no LoRA adapter {adapter_name!r}: mask_expert_lora needs one from "
            "get_peft_model(model, expert_lora_config(model))."
        )
    for wrapper in wrappers:
        if isinstance(wrapper.lora_A[adapter_name], SlicedFactor):
            raise ValueError(f"the adapter {adapter_name!r} of {layer.name!r} is masked already: attach a new one.")
        if wrapper.num_experts != layer.num_experts:
            raise ValueError(
                f"the adapter of {layer.name!r} is on {wrapper.num_experts} matrices ({wrapper.parameter_name}), the "
                f"layer has {layer.num_experts} experts: target its expert projections only."
            )
    return wrappers


def _mask(wrapper: Any, chosen: LayerSelection, adapter_name: str) -> None:
    for factors, axis in ((wrapper.lora_A, 0), (wrapper.lora_B, 2)):
        weight = factors[adapter_name].weight
        sliced = SlicedFactor(weight, chosen.num_experts, chosen.experts, axis)
        sliced.requires_grad_(weight.requires_grad)
        factors[adapter_name] = sliced
