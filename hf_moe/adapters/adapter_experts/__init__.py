"""Adapter experts: a PEFT method that gives each MoE layer a few small routed experts of its own.

    experts(x) + sum_j p_j(x) * adapter_expert_j(x)

The base, its router included, stays as it is.

    config.py   AdapterExpertsConfig, checked when it is built and when it is attached
    layer.py    the experts of one layer with adapter experts beside them
    tuner.py    attach them to a model through PEFT, and make PEFT know the method
"""

from hf_moe.io.installation import install_command

# PEFT first: `import hf_moe` makes its import register this method, which needs the modules below
try:
    import peft  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"adapter experts need peft. Install it with: {install_command('recipes')}") from error

from hf_moe.adapters.adapter_experts.config import AdapterExpertsConfig, AdapterExpertsType
from hf_moe.adapters.adapter_experts.layer import AdapterExpertsLayer
from hf_moe.adapters.adapter_experts.tuner import AdapterExpertsModel, register_peft_method

__all__ = [
    "AdapterExpertsConfig",
    "AdapterExpertsLayer",
    "AdapterExpertsModel",
    "AdapterExpertsType",
    "register_peft_method",
]
