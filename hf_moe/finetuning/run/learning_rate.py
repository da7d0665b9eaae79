"""The learning rate beside what a model of this size bears, and what weights in 16 bits lose of it."""

import torch
from torch import nn

USUAL = {"adapter": (1e-4, 2e-4), "weights": (1e-5, 2e-5)}
"""Usual rates of AdamW for models of a billion parameters and more, by what is trained."""
# share of the trained weights, above which it is said that they round the steps away
_MOST_LOST = 0.5
_SAMPLE = 65_536  # values of a tensor


def peak_of_pretraining(parameters: int) -> float:
    """The peak learning rate at which models of so many parameters are pre-trained with Adam.

    A cube root through Table 2.1 of Brown et al. 2020 (arXiv:2005.14165), whose eight rates, from 125 million to 175
    billion parameters, it meets within a factor of 1.5.
    """
    return 6e-4 * (125e6 / parameters) ** (1 / 3)


def most_bearable(parameters: int, trained: str) -> float:
    """The rate above which a warning is due.

    Fine-tuning all of the trained `weights` at more than the peak of pre-training overwrites what was learned there.
    An `adapter` bears about ten times the rate of full fine-tuning (Schulman et al. 2025, "LoRA Without Regret"),
    which is a tenth to a fifth of that peak: twice the peak. No usual rate is ever warned of.

    Args:
        parameters: Of the whole model.
        trained: A key of `USUAL`.
    """
    times = {"adapter": 2, "weights": 1}[trained]
    return max(times * peak_of_pretraining(parameters), 2 * USUAL[trained][1])


def rate_warning(rate: float, parameters: int, trained: str) -> str | None:
    """A sentence if `rate` is above what a model of so many `parameters` bears; arguments as `most_bearable`."""
    most = most_bearable(parameters, trained)
    if rate <= most:
        return None
    whose = {"adapter": "adapters", "weights": "training the weights themselves"}[trained]
    low, high = USUAL[trained]
    return (
        f"the learning rate {rate:g} is high: a model of {size_of(parameters)} parameters bears about {most:.1g}. "
        f"Usual for {whose} of models of a billion parameters and more: {low:g} to {high:g}."
    )


def rounding_warning(model: nn.Module, rate: float) -> str | None:
    """A sentence if most of the trained weights are held in 16 bits and too large to be changed by one step.

    AdamW moves a weight by about the rate; a weight of more than `rate / u` rounds that away, `u` half a unit in the
    last place of its dtype relative to it (2^-9 in bfloat16).
    """
    lost = total = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            values = parameter.detach().flatten()[:: max(1, parameter.numel() // _SAMPLE)].float().abs()
            total += parameter.numel()
            lost += parameter.numel() * float((values > rate / (torch.finfo(parameter.dtype).eps / 4)).float().mean())
    if not total or lost / total <= _MOST_LOST:
        return None
    return (
        f"{lost / total:.0%} of the trained weights are too large for their 16 bits to hold a step of {rate:g}: they "
        "change by larger steps alone, or not at all. With memory for it, --dtype float32 --bf16 keeps every step (4 "
        "bytes a weight, computed in bfloat16); an adapter is float32 in any case."
    )


def size_of(parameters: int) -> str:
    """`3.9M`, `30.5B`."""
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"
