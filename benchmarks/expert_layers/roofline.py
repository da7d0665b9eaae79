"""The least time that one SwiGLU experts layer can take on a GPU, from its FLOPs and bytes (bfloat16).

    python benchmarks/expert_layers/roofline.py                      H100: 800 TFLOP/s reached, 3.0 TB/s
    python benchmarks/expert_layers/roofline.py --tbs 4.3            H200
    python benchmarks/expert_layers/roofline.py --tokens 32768 --rank 32

FLOPs: forward 6*N*H*I, training 18*N*H*I, frozen experts 12*N*H*I, low-rank factors 12*N*H*I + 6*N*R*(2H + 3I).
Bytes: gathers cost N rows, the down projection is written once per slot and summed after (deterministic), training
saves the rows and the pre-activation [N, 2I]. A floor is the sum over kernels of max(compute, memory).

Symbols: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, R LoRA rank.
"""

import argparse
from dataclasses import dataclass

BYTES = 2
MODELS = {  # H, I, E, K
    "Mixtral-8x7B": (4096, 14336, 8, 2),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "OLMoE-1B-7B": (2048, 1024, 64, 8),
    "DeepSeek-V3": (7168, 2048, 256, 8),
}


@dataclass(frozen=True)
class Device:
    """Rates that large products and large copies reach."""

    tflops: float = 800.0
    tbs: float = 3.0

    def ms(self, flops: float, nbytes: float) -> float:
        return max(flops / (self.tflops * 1e12), nbytes / (self.tbs * 1e12)) * 1e3


@dataclass(frozen=True)
class Floors:
    """Milliseconds by mode, and what training has to keep."""

    forward: float
    frozen: float
    train: float
    lora: float
    saved_bytes: int


def floors(
    device: Device, shape: tuple[int, int, int, int], tokens: int, rank: int = 16, weight_bytes: int = BYTES
) -> Floors:
    """For `tokens` tokens that reach every expert; `shape` is (H, I, E, K). Gradients of weights are in 16 bits."""
    hidden, width, experts, slots = shape
    rows = tokens * slots
    x, row_bytes = tokens * hidden * BYTES, rows * hidden * BYTES
    pre, act = rows * 2 * width * BYTES, rows * width * BYTES
    down, grad_down = (hidden * width * experts * each for each in (weight_bytes, BYTES))
    product = 2 * rows * hidden * width  # FLOPs of the down projection; the up projection has twice as many
    # the weights, the gathered rows, the activation written and read, the slots' outputs written and read, the sum
    forward_bytes = 3 * down + row_bytes + 2 * act + 2 * row_bytes + x
    saving_forward = device.ms(3 * product, forward_bytes + pre)
    to_activation = device.ms(product, row_bytes + down + 2 * pre + act)
    to_rows = device.ms(2 * product, pre + 2 * down + 2 * row_bytes + x)
    to_up = device.ms(2 * product, pre + row_bytes + 2 * grad_down)
    to_down = device.ms(product, act + row_bytes + grad_down)
    frozen = saving_forward + to_activation + to_rows
    factors = device.ms(6 * rows * rank * (2 * hidden + 3 * width), 3 * (row_bytes + 3 * act))
    return Floors(
        forward=device.ms(3 * product, forward_bytes),
        frozen=frozen,
        train=frozen + to_up + to_down,
        lora=frozen + factors,
        saved_bytes=x + pre,
    )


def decode_floor(device: Device, shape: tuple[int, int, int, int], batch: int, weight_bytes: int = BYTES) -> float:
    """Milliseconds: the experts that uniform routing is expected to hit are read once."""
    hidden, width, experts, slots = shape
    hit = experts * (1 - (1 - slots / experts) ** batch)
    nbytes = hit * 3 * hidden * width * weight_bytes + (2 * batch * hidden + 2 * batch * slots * width) * BYTES
    return device.ms(6 * batch * slots * hidden * width, nbytes)


def floor_of(
    device: Device, shape: tuple[int, int, int, int], tokens: int, mode: str, weight_bytes: int = BYTES
) -> float:
    """Milliseconds of a mode: forward, frozen, train, lora or decode."""
    if mode == "decode":
        return decode_floor(device, shape, tokens, weight_bytes)
    return getattr(floors(device, shape, tokens, weight_bytes=weight_bytes), mode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=Device.tflops)
    parser.add_argument("--tbs", type=float, default=Device.tbs)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    device = Device(options.tflops, options.tbs)
    print(f"Milliseconds at T={options.tokens}, R={options.rank}, {device.tflops:g} TFLOP/s, {device.tbs:g} TB/s\n")
    batches = (1, 4, 16, 64)
    print("| layer | forward | frozen | train | lora | saved MB | decode", *(f"B={batch} |" for batch in batches))
    print("|---" * (6 + len(batches)) + "|")
    for name, shape in MODELS.items():
        found = floors(device, shape, options.tokens, options.rank)
        times = " | ".join(f"{ms:.2f}" for ms in (found.forward, found.frozen, found.train, found.lora))
        decode = " | ".join(f"{decode_floor(device, shape, batch):.3f}" for batch in batches)
        print(f"| {name} | {times} | {found.saved_bytes / 1e6:.0f} | {decode} |")


if __name__ == "__main__":
    main()
