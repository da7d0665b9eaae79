"""Gradient checkpointing: as it was asked for, or else where the device's memory needs it."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_moe.planner.step_memory import StepMemory, size_text

# share of the device's memory that a step may be estimated at: the allocator and libraries take some
_COMFORT = 0.9


@dataclass(frozen=True)
class Choice:
    """Whether layers are computed again in backward instead of kept, and why, in words."""

    on: bool
    why: str


def choose_checkpointing(
    asked: bool | None, without: StepMemory | None, recomputed: StepMemory | None, available: int, supported: bool
) -> Choice:
    """Checkpointing as `asked`, or else on where a step does not fit the device without it.

    Args:
        asked: True or False wins; None leaves it to the memory.
        without, recomputed: A step without and with it; None if one row's forward alone is too much.
        available: Bytes of the device.
        supported: Whether the model's class knows how.
    """
    if asked is not None:
        return Choice(asked, "as asked for")
    if without is not None and without.total <= _COMFORT * available:
        return Choice(False, f"a step fits the device's {size_text(available)} without it")
    if not supported:
        return Choice(False, "this model's class does not support it, though memory is short")
    needed = "one row alone needs more" if without is None else f"a step needs {size_text(without.total)} without it"
    short = ""
    if recomputed is not None and recomputed.total > available:
        short = f"; with it, {size_text(recomputed.total)} are still too much"
    return Choice(True, f"{needed}, and the device has {size_text(available)}{short}")


def asked_for(arguments: Any) -> bool | None:
    """What the Trainer's arguments say under either name that transformers has for it."""
    newer = getattr(arguments, "activation_checkpointing", None)  # since transformers 5.20
    return newer if newer is not None else arguments.gradient_checkpointing


def set_checkpointing(arguments: Any, on: bool) -> None:
    """Under both names of the Trainer's arguments."""
    arguments.gradient_checkpointing = on
    if hasattr(arguments, "activation_checkpointing"):
        arguments.activation_checkpointing = on


def device_memory(device: torch.device) -> int:
    """Bytes of an accelerator, or of the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def supports_checkpointing(model: nn.Module) -> bool:
    return bool(getattr(model, "supports_gradient_checkpointing", False))
