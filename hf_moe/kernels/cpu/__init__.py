"""Experts on the CPU: a compiled kernel that is built on first use, as differentiable operators."""

from .build import why_not
from .ops import cpu_experts, cpu_grouped_linear

__all__ = ["cpu_experts", "cpu_grouped_linear", "why_not"]
