"""The experts of one MoE layer with adapter experts beside them, of several named adapters.

Shape suffixes: T tokens, K adapter experts per token, A adapter experts, W adapter width, H hidden size.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_moe.adapters.adapter_experts.config import AdapterExpertsConfig
from hf_moe.experts.functional import GatedExperts, run_gated_experts
from hf_moe.layers.storage import DENSE_DTYPES, storage_of

_EXPERTS = GatedExperts()

# why, and the ways out
NO_MERGE = (
    "adapter experts cannot be merged: their gate chooses among experts of another width than the base's, and the "
    "base's architecture has no place for either. Keep the adapter (it is small; unload() gives the base back), or "
    "train expert LoRA, which merges."
)


class AdapterExpertsLayer(nn.Module, BaseTunerLayer):
    """Calls the experts as they are, then adds the adapter experts of the active adapters.

    Args:
        base_layer: An experts module of transformers' contract, with whatever wraps it.
        adapter_name: Of the first adapter.
        config: Of the first adapter.
        hidden_size: Width of the rows that the experts read and write.
    """

    adapter_layer_names = ("adapter_experts_gate", "adapter_experts_up", "adapter_experts_down")
    other_param_names = ("adapter_experts_top_k",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: AdapterExpertsConfig, hidden_size: int):
        super().__init__()
        self.base_layer = base_layer
        self.hidden_size = hidden_size
        self.adapter_experts_gate = nn.ParameterDict()  # [A, H]
        self.adapter_experts_up = nn.ParameterDict()  # [A, 2W, H], the rows under silu first
        self.adapter_experts_down = nn.ParameterDict()  # [A, H, W]
        self.adapter_experts_top_k: dict[str, int] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: AdapterExpertsConfig) -> None:
        """Add the adapter experts of one adapter; their output is zero until the down projection is trained.

        The gate is float32 under any base, as routers are computed; the experts start in the base's dtype, and PEFT's
        `autocast_adapter_dtype` makes float32 of 16 bits.
        """
        experts, width, hidden = config.num_adapter_experts, config.adapter_width, self.hidden_size
        dtype = self._compute_dtype(torch.float32)
        # made on the meta device there are sizes to look at, and no values to move
        made_on = torch.get_default_device()
        device = made_on if made_on.type == "meta" else self._base_device()
        # rows of a normed stream have elements near 1: logits and pre-activations then start near 1 too
        gate_AH = torch.randn(experts, hidden) * hidden**-0.5
        up_AJH = torch.randn(experts, 2 * width, hidden) * hidden**-0.5
        down_AHW = torch.zeros(experts, hidden, width)
        wide = torch.promote_types(dtype, torch.float32)
        self.adapter_experts_gate[adapter_name] = nn.Parameter(gate_AH.to(device, wide))
        self.adapter_experts_up[adapter_name] = nn.Parameter(up_AJH.to(device, dtype))
        self.adapter_experts_down[adapter_name] = nn.Parameter(down_AHW.to(device, dtype))
        self.adapter_experts_top_k[adapter_name] = config.top_k
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The arguments and the result of the experts' own forward."""
        out = self.base_layer(hidden_states, *args, **kwargs)
        if self.disable_adapters:
            return out
        for name in self.active_adapters:
            if name in self.adapter_experts_gate:
                rows_TH = hidden_states.reshape(-1, self.hidden_size)
                out = out + self._adapter_output(name, rows_TH).view_as(out).to(out.dtype)
        return out

    def _adapter_output(self, name: str, rows_TH: Tensor) -> Tensor:
        """`[T, H]`: the experts in the dtype of the base's, the gate in float32 or wider."""
        dtype = self._compute_dtype(rows_TH.dtype)
        index_TK, weights_TK = route(rows_TH, self.adapter_experts_gate[name], self.adapter_experts_top_k[name])
        return run_gated_experts(
            self.get_base_layer().config._experts_implementation,
            _EXPERTS,
            self.adapter_experts_up[name].to(dtype),
            self.adapter_experts_down[name].to(dtype),
            rows_TH,
            index_TK,
            weights_TK,
        )

    def __getattr__(self, name: str) -> Any:
        """What a block reads off its experts (`num_experts`), it finds here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # private names are other libraries' marks on the module itself; `base_layer` is absent while copying
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def _base_device(self) -> torch.device:
        return next(self.get_base_layer().parameters()).device

    def _compute_dtype(self, rows: torch.dtype) -> torch.dtype:
        """The dtype that the base's experts compute in; that of the rows where their storage does not tell."""
        dtype = storage_of(self.get_base_layer()).dtype
        return dtype if dtype in DENSE_DTYPES else rows

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT calls it after loading. Its own looks for a `weight`, which experts lack; dtypes stay as loaded."""
        target = device or self._base_device()
        for attribute in self.adapter_layer_names:
            parameters = getattr(self, attribute)
            loaded = parameters.get(adapter_name)
            if loaded is not None and not loaded.is_meta and loaded.device != target:
                parameters[adapter_name] = nn.Parameter(loaded.detach().to(target), loaded.requires_grad)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        raise ValueError(NO_MERGE)


def route(rows_TH: Tensor, gate_AH: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`([T, K], [T, K])`: the adapter experts of each token and their softmax probabilities, best first.

    The probabilities are over all adapter experts, also those not taken: see `AdapterExpertsConfig.top_k`.
    """
    wide = torch.promote_types(rows_TH.dtype, torch.float32)
    device = rows_TH.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):  # the meta device has none
        probabilities_TA = F.linear(rows_TH.to(wide), gate_AH.to(wide)).softmax(-1)
    weights_TK, index_TK = probabilities_TA.topk(top_k, dim=-1)
    return index_TK, weights_TK
