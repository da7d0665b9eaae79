"""Options of PEFT's `LoraConfig` that reach fused experts; all others are refused, those not listed here too.

PEFT adapts experts through `target_parameters`, and reads several options for `target_modules` alone.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig

# experts get these, from PEFT or from expert_lora_config
HONOURED = frozenset(
    {
        # of PEFT's files
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
        # the factors
        "alpha_pattern",
        "init_lora_weights",
        "lora_alpha",
        "r",
        "rank_pattern",
        "use_rslora",
        # what is adapted
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "target_modules",
        "target_parameters",
        # beside the experts
        "ensure_weight_tying",
        "modules_to_save",
        "trainable_token_indices",
    }
)
_FACTORS_ALONE = "PEFT has it for linear layers, and experts get two plain factors"
_FROM_THE_LAYER = "it is computed from a linear layer's weight or input, and fused experts have neither"
REFUSED = {
    "alora_invocation_tokens": "experts see rows of tokens in the order of their routing",
    "arrow_config": _FACTORS_ALONE,
    "bias": "an expert adapter leaves every tensor of the base as it is",
    "corda_config": _FROM_THE_LAYER,
    "eva_config": _FROM_THE_LAYER,
    "fan_in_fan_out": "the layout of experts is known from their class",
    "kasa_config": _FACTORS_ALONE,
    "layer_replication": "it builds a deeper model, in which the names of the experts' parameters are others",
    "loftq_config": _FROM_THE_LAYER,
    "lora_bias": _FACTORS_ALONE,
    "lora_dropout": (
        "PEFT has no input to drop from where a parameter is adapted, and refuses it. Use weight_decay or a lower r"
    ),
    "lora_ga_config": _FROM_THE_LAYER,
    "megatron_config": "it is for Megatron's parallel layers",
    "megatron_core": "it is for Megatron's parallel layers",
    "monteclora_config": _FACTORS_ALONE,
    "qalora_group_size": _FACTORS_ALONE,
    "runtime_config": "it acts on DoRA alone, which experts cannot have",
    "use_bdlora": _FACTORS_ALONE,
    "use_dora": _FACTORS_ALONE,
    "use_qalora": _FACTORS_ALONE,
    "velora_config": _FACTORS_ALONE,
}
_INITIALISATIONS = (True, False, "gaussian")


def refuse_options(options: Mapping[str, Any]) -> None:
    """Raise for an option that would not reach the experts.

    Raises:
        ValueError: Naming the option, its value and why.
        TypeError: If `LoraConfig` has no such option.
    """
    fields = {field.name: field for field in dataclasses.fields(LoraConfig) if field.init}
    if unknown := sorted(set(options) - set(fields)):
        raise TypeError(f"LoraConfig has no option {unknown[0]!r}.")
    for name, value in options.items():
        if name in HONOURED or value == _default(fields[name]):
            continue
        why = REFUSED.get(name, "hf_moe does not know this option of a newer PEFT, nor whether it reaches experts")
        default = _default(fields[name])
        raise ValueError(f"{name} must be {default!r} on fused experts, got {value!r:.80}: {why}.")
    start = options.get("init_lora_weights", True)
    if start not in _INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights must be True, False or 'gaussian' on fused experts, got {start!r:.80}: any other is "
            "computed from a linear layer's weight or input, and fused experts have neither."
        )


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
