"""Bytes of a quantised checkpoint: as it is stored, and as transformers holds it in memory; from the config alone.

Three quantisers are known here, by what their code packs (transformers 5.23): `fp8` linear layers and experts, `mxfp4`
experts alone, `bitsandbytes` linear layers alone, so that experts, most of a model, stay as they are. Of others it is
said that nothing is known.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_moe.layers.moe_layers import moe_layers
from hf_moe.observability.unquantised_experts import quantisation_method
from hf_moe.planner.step_memory import bytes_of, size_text

_BLOCK = 64  # values for each absolute maximum of bitsandbytes, a float32
_DOUBLE_BLOCK = 256  # of those, quantised to 8 bits themselves, for each float32


@dataclass(frozen=True)
class QuantisedWeights:
    """The weights of a model whose config has a `quantization_config`.

    Attributes:
        method: The quantiser's name.
        stored: Bytes of the checkpoint; None where the quantiser is not known.
        experts_stored: Of these, of the routed experts.
        dense: Bytes of all weights unpacked, in the config's dtype.
        experts_dense: Of these, of the routed experts.
        in_training: Bytes that transformers holds while an adapter is trained.
        note: What becomes of the experts, in words.
    """

    method: str
    stored: int | None
    experts_stored: int | None
    dense: int
    experts_dense: int
    in_training: int
    note: str


def quantised_weights(model: nn.Module, config: Any) -> QuantisedWeights | None:
    """Tell the bytes of `model`, built without weights and without its quantiser; None where the config has none."""
    method = quantisation_method(config)
    if method is None:
        return None
    settings = _settings(config)
    experts = [p for layer in moe_layers(model) for p in layer.experts.parameters()]
    dense, experts_dense = bytes_of(model.parameters()), bytes_of(experts)
    matrices = [p for p in experts if p.dim() == 3]
    linear = _linear_weights(model, settings)
    packed = {
        "fp8": lambda: (_fp8(matrices, settings), _fp8(linear, settings)),
        "mxfp4": lambda: (sum(p.numel() // 2 + p.numel() // 32 for p in matrices), bytes_of(linear)),
        "bitsandbytes": lambda: (bytes_of(matrices), sum(_bitsandbytes(p, settings) for p in linear)),
    }.get(method)
    if packed is None:
        note = (
            f"The config asks for {method}: neither its stored size nor whether it reaches the experts can be told "
            "from the config. The table counts unpacked weights."
        )
        return QuantisedWeights(method, None, None, dense, experts_dense, dense, note)
    packed_experts, packed_linear = packed()
    stored_experts = experts_dense - bytes_of(matrices) + packed_experts
    stored = dense - experts_dense + stored_experts - bytes_of(linear) + packed_linear
    note = _note(method, stored_experts, dense, experts_dense)
    in_training = dense if method == "mxfp4" else stored
    return QuantisedWeights(method, stored, stored_experts, dense, experts_dense, in_training, note)


def _note(method: str, experts: int, dense: int, experts_dense: int) -> str:
    if method == "fp8":
        return (
            f"On NVIDIA GPUs from SM89 on (RTX 4090, H100) the weights stay fp8, the experts {size_text(experts)}; "
            f"elsewhere transformers unpacks them: {size_text(dense)}. Adapters train over fp8. ESFT and full "
            "fine-tuning need unpacked weights, and the table counts them so."
        )
    if method == "mxfp4":
        return (
            f"The experts take {size_text(experts)} as stored, and no training runs over mxfp4: load with "
            f"Mxfp4Config(dequantize=True), which makes {size_text(experts_dense)} of them. The table counts that."
        )
    return (
        f"bitsandbytes packs linear layers alone: the experts stay unpacked, {size_text(experts)}. The table counts "
        "ESFT and full fine-tuning with all weights unpacked."
    )


def _settings(config: Any) -> dict[str, Any]:
    for each in (config, getattr(config, "text_config", None)):
        found = getattr(each, "quantization_config", None)
        if found is not None:
            return found if isinstance(found, dict) else found.to_dict()
    return {}


def _linear_weights(model: nn.Module, settings: dict[str, Any]) -> list[Tensor]:
    """Weights of the linear layers that are packed: all but the output's and those that the config leaves out."""
    skipped = settings.get("modules_to_not_convert") or settings.get("llm_int8_skip_modules") or ()
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not _is_skipped(name, skipped)
    ]


def _is_skipped(name: str, skipped: Iterable[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") or name.endswith(f".{each}") for each in skipped)


def _fp8(weights: Iterable[Tensor], settings: dict[str, Any]) -> int:
    """A byte for each value, and a scale, float32 or a byte, for each block (for the whole matrix without blocks)."""
    total, scale = 0, 1 if settings.get("scale_fmt") == "ue8m0" else 4
    for weight in weights:
        *batch, rows, columns = weight.shape
        height, width = settings.get("weight_block_size") or (rows, columns)
        blocks = math.prod(batch) * math.ceil(rows / height) * math.ceil(columns / width)
        total += weight.numel() + scale * blocks
    return total


def _bitsandbytes(weight: Tensor, settings: dict[str, Any]) -> int:
    if settings.get("load_in_8bit"):
        return weight.numel() + 4 * weight.shape[0]  # a float32 for each row
    blocks = math.ceil(weight.numel() / _BLOCK)
    if settings.get("bnb_4bit_use_double_quant"):
        return weight.numel() // 2 + blocks + 4 * math.ceil(blocks / _DOUBLE_BLOCK)
    return weight.numel() // 2 + 4 * blocks
