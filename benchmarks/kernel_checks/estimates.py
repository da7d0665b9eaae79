"""Estimated times of whole steps of the reference layers, launch by launch. No time here was measured.

A launch takes the time of its slowest resource (tensor cores, memory, L2) times a factor, and a constant; devices.py
has the rates and says what is assumed.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from expert_layers import roofline

from .compilation import CHIPS, Resources
from .devices import DEVICES, Compiled, Device
from .launches import Call, Launch
from .layers import Layer, Mode, TorchCall, layers_and_modes, step
from .traffic import FAMILIES, Traffic, grad_weights, streaming, traffic
from .uniform import Routing

LISTED_BYTES = 10e6  # launches that move less are only counted
WITHOUT_TILES = (streaming, grad_weights)
# constants that say nothing of what a launch computes
UNSAID = {"EVEN_K", "GATED"}


@dataclass(frozen=True)
class Step:
    """One mode of one layer on one chip, and what it launches."""

    chip: str
    layer: Layer
    mode: Mode
    calls: tuple[Call | TorchCall, ...]

    @property
    def routing(self) -> Routing:
        return Routing(self.layer.tokens, self.layer.slots, self.layer.experts)


def steps(chips: list[str]) -> Iterator[Step]:
    for chip in chips:
        for layer, mode in layers_and_modes(CHIPS[chip].has_fp8):
            sized = replace(layer, tokens=mode.tokens)
            yield Step(chip, sized, mode, tuple(step(sized, mode, CHIPS[chip].target, chip)))


def to_compile(found: list[Step]) -> Iterator[tuple[Step, Launch]]:
    """The launches whose registers and shared memory decide how many programs a multiprocessor runs."""
    for found_step in found:
        for call in found_step.calls:
            if isinstance(call, Call) and has_tile(call.launch):
                yield found_step, call.launch


def has_tile(launch: Launch) -> bool:
    return FAMILIES.get(launch.kernel) not in WITHOUT_TILES


def devices_of(chip: str) -> dict[str, Device]:
    return {name: device for name, device in DEVICES.items() if device.chip == chip}


def work_of_launches(found: Step) -> list[Traffic]:
    """What each launch with a model multiplies and moves.

    Raises:
        KeyError, ValueError: For a launch whose arguments the model of its kernel does not know.
    """
    (device, *_) = devices_of(found.chip).values()
    return [traffic(call, found.routing, device.l2_bytes) for call in found.calls if isinstance(call, Call)]


def of_step(found: Step, resources: dict[tuple[str, Launch], Resources]) -> tuple[list[dict], list[dict]]:
    """The rows of one step: its time on every device of the chip, and its larger launches."""
    layer, launches = found.layer, [_launch_row(found, call, resources) for call in found.calls]
    totals = []
    for name, device in devices_of(found.chip).items():
        limits = roofline.Device(device.tflops, device.hbm_tbs)
        mode = found.mode.name.split()[0].replace("training", "train").lower()
        shape, weight_bytes = (layer.hidden, layer.width, layer.experts, layer.slots), 1 if layer.fp8 else 2
        floor = roofline.floor_of(limits, shape, layer.tokens, mode, weight_bytes)
        total = sum(row["ms"][name] for row in launches)
        facts = {"chip": found.chip, "device": name, "layer": layer.name, "mode": found.mode.name}
        totals.append(facts | {"ms": round(total, 4), "floor_ms": round(floor, 4), "launches": _count(found)})
    return totals, [row for row in launches if row["hbm_gb"] * 1e9 >= LISTED_BYTES]


def _count(found: Step) -> int:
    return sum(call.launches if isinstance(call, TorchCall) else 1 for call in found.calls)


def _launch_row(found: Step, call: Call | TorchCall, resources: dict[tuple[str, Launch], Resources]) -> dict:
    devices = devices_of(found.chip)
    if isinstance(call, TorchCall):
        work = Traffic(0.0, call.nbytes, 0.0)
        ms = {name: call.launches * device.milliseconds(work, Compiled()) for name, device in devices.items()}
        return _row(found, f"torch {call.name}", "", "", None, work, ms)
    launch = call.launch
    needs = resources[found.chip, launch.alike()] if has_tile(launch) else None
    works = {name: traffic(call, found.routing, device.l2_bytes) for name, device in devices.items()}
    facts = (None, "") if needs is None else (needs.programs, needs.matrix)
    compiled = Compiled(launch.kernel, *facts, launch.starts_early)
    ms = {name: device.milliseconds(works[name], compiled) for name, device in devices.items()}
    features = [name.lower() for name, value in launch.constants if value is True and name not in UNSAID]
    work = next(iter(works.values()))
    row = _row(found, launch.kernel, ", ".join(features), launch.blocks(), needs, work, ms)
    slowest = {name: device.resources(works[name], compiled) for name, device in devices.items()}
    return row | {"bound": {name: max(needed, key=needed.__getitem__) for name, needed in slowest.items()}}


def _row(
    found: Step, kernel: str, features: str, tile: str, needs: Resources | None, work: Traffic, ms: dict[str, float]
) -> dict:
    row = {"chip": found.chip, "layer": found.layer.name, "mode": found.mode.name, "kernel": kernel}
    row |= {"features": features, "tile": tile}
    if needs is not None:
        row |= {"matrix": needs.matrix, "registers": needs.registers, "shared_memory": needs.shared_memory}
        row |= {"programs": needs.programs, "loop": None if needs.loop is None else asdict(needs.loop)}
    row |= {"gflop": _digits(work.flops / 1e9), "hbm_gb": _digits(work.hbm / 1e9), "l2_gb": _digits(work.l2 / 1e9)}
    return row | {"ms": {name: _digits(value) for name, value in ms.items()}}


def _digits(value: float) -> float:
    """Four digits, so that a row changes when something changes."""
    return float(f"{value:.4g}")
