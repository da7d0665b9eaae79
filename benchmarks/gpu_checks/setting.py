"""Sizes of a run: those of real layers on a GPU, and tiny ones for the interpreter.

Symbols: T tokens, H hidden, I expert width, E experts, K slots per token.
"""

from typing import NamedTuple

from hf_moe.kernels.triton.tiles import Tile

from ..expert_layers.cases import DECODE, FORWARD, LORA, Plan, cuda_plan, quick

TINY_MODES = (FORWARD, LORA, DECODE)


class Sizes(NamedTuple):
    hidden: int
    width: int
    experts: int
    slots: int


class Setting(NamedTuple):
    """What the stages need to know of a run.

    Attributes:
        few: A layer with as many rows an expert at `tokens // 8` as the swept one at `tokens`, of fewer experts, so
            that its float64 gradients fit beside it.
        wide: Experts with wide projections.
        ragged: Sizes that no block divides.
        biased: Sizes for the layout of gpt-oss.
        swept: The layer of the sweep, the profile and the predictions.
        tokens: Of the sweep and the profile.
        batches: Numbers of tokens that the decode kernels take at `swept`.
        ranks: Of adapters that are checked.
        tiles: Of the sweep, by kernel of the tile tables.
        check_processes: That check side by side: most of their time is compilation.
        round_seconds: Budget of one comparison of the sweep.
        case_seconds: Budget of one case of the benchmark.
    """

    device: str
    few: Sizes
    wide: Sizes
    ragged: Sizes
    biased: Sizes
    swept: Sizes
    tokens: int
    batches: tuple[int, ...]
    ranks: tuple[int, ...]
    tiles: dict[str, list[Tile]]
    check_processes: int
    round_seconds: float
    case_seconds: float

    def plan(self) -> Plan:
        """Cases of the time stage."""
        plan = cuda_plan()
        if self.device == "cuda":
            return plan
        cases = {case.mode: case for case in reversed(quick(plan).cases) if case.mode in TINY_MODES}.values()
        return Plan(plan.name, "cpu", tuple(cases), self.case_seconds)

    def layers(self) -> list[str]:
        """Names of the plan's layers, the one with most predictions first."""
        return list(dict.fromkeys(case.layer.name for case in self.plan().cases))


def _tiles(*shapes: tuple[int, int, int, int, int]) -> list[Tile]:
    return [Tile(*shape) for shape in shapes]


SWEPT_TILES = {
    "up": _tiles(
        (128, 128, 64, 16, 3), (128, 128, 64, 16, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 64, 64, 8, 3),
        (128, 64, 64, 8, 4), (128, 64, 64, 4, 3), (64, 128, 64, 8, 3), (64, 128, 64, 8, 4), (64, 64, 64, 4, 4),
    ),
    "grouped_linear": _tiles(
        (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (64, 256, 64, 8, 3),
        (64, 256, 64, 8, 4), (64, 128, 64, 4, 4),
    ),
    "backward_activation": _tiles(
        (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 8, 2), (64, 128, 64, 8, 3), (64, 128, 64, 4, 3),
        (128, 64, 64, 8, 4), (128, 64, 64, 4, 4), (128, 256, 64, 8, 3),
    ),
    "weight_gradient": _tiles(
        (128, 128, 64, 8, 5), (128, 128, 64, 8, 4), (128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (256, 128, 64, 8, 4),
        (256, 128, 64, 8, 3), (128, 128, 32, 8, 5),
    ),
}  # fmt: skip

GPU = Setting(
    device="cuda",
    few=Sizes(2048, 768, 16, 8),
    wide=Sizes(4096, 14336, 2, 2),
    ragged=Sizes(1000, 360, 24, 3),
    biased=Sizes(2880, 2880, 8, 4),
    swept=Sizes(2048, 768, 128, 8),
    tokens=8192,
    batches=(1, 3, 16),
    ranks=(16, 24, 64),
    tiles=SWEPT_TILES,
    check_processes=8,
    round_seconds=1.5,
    case_seconds=0.5,
)
TINY = Setting(
    device="cpu",
    few=Sizes(32, 16, 4, 2),
    wide=Sizes(32, 32, 2, 2),
    ragged=Sizes(20, 12, 3, 2),
    biased=Sizes(32, 16, 3, 2),
    swept=Sizes(32, 16, 4, 2),
    tokens=8,
    batches=(1,),
    ranks=(4,),
    tiles={kernel: _tiles((16, 16, 16, 4, 1)) for kernel in SWEPT_TILES},
    check_processes=1,
    round_seconds=0.0,
    case_seconds=0.001,
)
