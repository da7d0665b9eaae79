"""Mixture-of-Experts for the Hugging Face stack. Importing registers the `hf_moe` architecture; it patches nothing.

Public names are imported when they are first used, so that `import hf_moe` stays as light as `import transformers`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hf_moe.models.configuration_hf_moe import HfMoeConfig
from hf_moe.registration import register

if TYPE_CHECKING:
    from hf_moe.adapters.adapter_experts import AdapterExpertsConfig
    from hf_moe.adapters.esft import fold_selected_experts, mask_expert_lora, train_selected_experts
    from hf_moe.adapters.expert_lora import accelerate_adapters, expert_lora_config, merge_and_check
    from hf_moe.adapters.expert_selection import ExpertSelection, select_experts
    from hf_moe.adapters.export import export_adapter
    from hf_moe.adapters.frozen_router import (
        RouterNotFrozenError,
        freeze_router,
        router_hash,
        save_router_hash,
        verify_adapter_base,
        verify_router_frozen,
    )
    from hf_moe.evaluation.bits_per_byte import bits_per_byte
    from hf_moe.models.modeling_hf_moe import (
        HfMoeForCausalLM,
        HfMoeForQuestionAnswering,
        HfMoeForSequenceClassification,
        HfMoeForTokenClassification,
        HfMoeModel,
    )
    from hf_moe.models.moe_layers import MoeLayer, check_index_range, checked_routing, moe_layers
    from hf_moe.observability.expert_load import count_expert_load
    from hf_moe.observability.explain import explain, explain_config
    from hf_moe.observability.routing_agreement import record_choices, routing_agreement
    from hf_moe.training.callbacks import RouterFreezeCallback
    from hf_moe.training.trainer import MoeTrainer

__version__ = "0.1.0"

_HOMES = {
    "AdapterExpertsConfig": "hf_moe.adapters.adapter_experts",
    "ExpertSelection": "hf_moe.adapters.expert_selection",
    "HfMoeForCausalLM": "hf_moe.models.modeling_hf_moe",
    "HfMoeForQuestionAnswering": "hf_moe.models.modeling_hf_moe",
    "HfMoeForSequenceClassification": "hf_moe.models.modeling_hf_moe",
    "HfMoeForTokenClassification": "hf_moe.models.modeling_hf_moe",
    "HfMoeModel": "hf_moe.models.modeling_hf_moe",
    "MoeLayer": "hf_moe.models.moe_layers",
    "MoeTrainer": "hf_moe.training.trainer",
    "RouterFreezeCallback": "hf_moe.training.callbacks",
    "RouterNotFrozenError": "hf_moe.adapters.frozen_router",
    "accelerate_adapters": "hf_moe.adapters.expert_lora",
    "bits_per_byte": "hf_moe.evaluation.bits_per_byte",
    "check_index_range": "hf_moe.models.moe_layers",
    "checked_routing": "hf_moe.models.moe_layers",
    "count_expert_load": "hf_moe.observability.expert_load",
    "expert_lora_config": "hf_moe.adapters.expert_lora",
    "explain": "hf_moe.observability.explain",
    "explain_config": "hf_moe.observability.explain",
    "export_adapter": "hf_moe.adapters.export",
    "fold_selected_experts": "hf_moe.adapters.esft",
    "freeze_router": "hf_moe.adapters.frozen_router",
    "mask_expert_lora": "hf_moe.adapters.esft",
    "merge_and_check": "hf_moe.adapters.expert_lora",
    "moe_layers": "hf_moe.models.moe_layers",
    "record_choices": "hf_moe.observability.routing_agreement",
    "router_hash": "hf_moe.adapters.frozen_router",
    "routing_agreement": "hf_moe.observability.routing_agreement",
    "save_router_hash": "hf_moe.adapters.frozen_router",
    "select_experts": "hf_moe.adapters.expert_selection",
    "train_selected_experts": "hf_moe.adapters.esft",
    "verify_adapter_base": "hf_moe.adapters.frozen_router",
    "verify_router_frozen": "hf_moe.adapters.frozen_router",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


register()

__all__ = [
    "AdapterExpertsConfig",
    "ExpertSelection",
    "HfMoeConfig",
    "HfMoeForCausalLM",
    "HfMoeForQuestionAnswering",
    "HfMoeForSequenceClassification",
    "HfMoeForTokenClassification",
    "HfMoeModel",
    "MoeLayer",
    "MoeTrainer",
    "RouterFreezeCallback",
    "RouterNotFrozenError",
    "accelerate_adapters",
    "bits_per_byte",
    "check_index_range",
    "checked_routing",
    "count_expert_load",
    "expert_lora_config",
    "explain",
    "explain_config",
    "export_adapter",
    "fold_selected_experts",
    "freeze_router",
    "mask_expert_lora",
    "merge_and_check",
    "moe_layers",
    "record_choices",
    "register",
    "router_hash",
    "routing_agreement",
    "save_router_hash",
    "select_experts",
    "train_selected_experts",
    "verify_adapter_base",
    "verify_router_frozen",
]
