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
    from hf_moe.adapters.expert_selection import ExpertSelection
    from hf_moe.adapters.export import export_adapter
    from hf_moe.adapters.frozen_router import (
        RouterNotFrozenError,
        freeze_router,
        router_hash,
        save_router_hash,
        verify_adapter_base,
        verify_router_frozen,
    )
    from hf_moe.adapters.load_adapter import load_adapter
    from hf_moe.adapters.select_experts import select_experts
    from hf_moe.comparison.routing import compare_traces
    from hf_moe.comparison.routing_agreement import record_choices, routing_agreement
    from hf_moe.comparison.run import ModelChoice, compare_models
    from hf_moe.comparison.text_probe import TextProbe
    from hf_moe.evaluation.bits_per_byte import bits_per_byte
    from hf_moe.evaluation.masking import mask_experts
    from hf_moe.hub.cards.card import model_card
    from hf_moe.layers.moe_layers import MoeLayer, check_index_range, checked_routing, moe_layers
    from hf_moe.models.modeling_hf_moe import (
        HfMoeForCausalLM,
        HfMoeForQuestionAnswering,
        HfMoeForSequenceClassification,
        HfMoeForTokenClassification,
        HfMoeModel,
    )
    from hf_moe.observability.explain import explain, explain_config
    from hf_moe.observability.health import diagnose
    from hf_moe.observability.recording import count_expert_load, record_routing
    from hf_moe.observability.replay import replay_routing
    from hf_moe.observability.routing_trace import RoutingTrace
    from hf_moe.observability.thresholds import RoutingThresholds
    from hf_moe.observability.trace_texts import trace_texts
    from hf_moe.training.balancing.checks import BalancingError
    from hf_moe.training.balancing.config import BalancingConfig
    from hf_moe.training.balancing.mixin import BalancingCallback, BalancingMixin
    from hf_moe.training.callbacks import RouterFreezeCallback
    from hf_moe.training.checkpointing.safe_checkpoint import SafeCheckpointMixin
    from hf_moe.training.rollback import RollbackCallback
    from hf_moe.training.routing_metrics import CollapseCallback, RoutingMetricsCallback
    from hf_moe.training.same_weights import SameWeightsCallback
    from hf_moe.training.trainer import MoeTrainer

__version__ = "0.1.0"

_HOMES = {
    "AdapterExpertsConfig": "hf_moe.adapters.adapter_experts",
    "BalancingCallback": "hf_moe.training.balancing.mixin",
    "BalancingConfig": "hf_moe.training.balancing.config",
    "BalancingError": "hf_moe.training.balancing.checks",
    "BalancingMixin": "hf_moe.training.balancing.mixin",
    "CollapseCallback": "hf_moe.training.routing_metrics",
    "ExpertSelection": "hf_moe.adapters.expert_selection",
    "RoutingThresholds": "hf_moe.observability.thresholds",
    "RollbackCallback": "hf_moe.training.rollback",
    "HfMoeForCausalLM": "hf_moe.models.modeling_hf_moe",
    "HfMoeForQuestionAnswering": "hf_moe.models.modeling_hf_moe",
    "HfMoeForSequenceClassification": "hf_moe.models.modeling_hf_moe",
    "HfMoeForTokenClassification": "hf_moe.models.modeling_hf_moe",
    "HfMoeModel": "hf_moe.models.modeling_hf_moe",
    "ModelChoice": "hf_moe.comparison.run",
    "MoeLayer": "hf_moe.layers.moe_layers",
    "MoeTrainer": "hf_moe.training.trainer",
    "RouterFreezeCallback": "hf_moe.training.callbacks",
    "RouterNotFrozenError": "hf_moe.adapters.frozen_router",
    "RoutingMetricsCallback": "hf_moe.training.routing_metrics",
    "RoutingTrace": "hf_moe.observability.routing_trace",
    "SafeCheckpointMixin": "hf_moe.training.checkpointing.safe_checkpoint",
    "SameWeightsCallback": "hf_moe.training.same_weights",
    "TextProbe": "hf_moe.comparison.text_probe",
    "accelerate_adapters": "hf_moe.adapters.expert_lora",
    "bits_per_byte": "hf_moe.evaluation.bits_per_byte",
    "check_index_range": "hf_moe.layers.moe_layers",
    "checked_routing": "hf_moe.layers.moe_layers",
    "compare_models": "hf_moe.comparison.run",
    "compare_traces": "hf_moe.comparison.routing",
    "count_expert_load": "hf_moe.observability.recording",
    "diagnose": "hf_moe.observability.health",
    "expert_lora_config": "hf_moe.adapters.expert_lora",
    "explain": "hf_moe.observability.explain",
    "explain_config": "hf_moe.observability.explain",
    "export_adapter": "hf_moe.adapters.export",
    "fold_selected_experts": "hf_moe.adapters.esft",
    "freeze_router": "hf_moe.adapters.frozen_router",
    "load_adapter": "hf_moe.adapters.load_adapter",
    "mask_expert_lora": "hf_moe.adapters.esft",
    "mask_experts": "hf_moe.evaluation.masking",
    "merge_and_check": "hf_moe.adapters.expert_lora",
    "model_card": "hf_moe.hub.cards.card",
    "moe_layers": "hf_moe.layers.moe_layers",
    "record_choices": "hf_moe.comparison.routing_agreement",
    "record_routing": "hf_moe.observability.recording",
    "replay_routing": "hf_moe.observability.replay",
    "router_hash": "hf_moe.adapters.frozen_router",
    "routing_agreement": "hf_moe.comparison.routing_agreement",
    "save_router_hash": "hf_moe.adapters.frozen_router",
    "select_experts": "hf_moe.adapters.select_experts",
    "trace_texts": "hf_moe.observability.trace_texts",
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
    "BalancingCallback",
    "BalancingConfig",
    "BalancingError",
    "BalancingMixin",
    "CollapseCallback",
    "ExpertSelection",
    "HfMoeConfig",
    "HfMoeForCausalLM",
    "HfMoeForQuestionAnswering",
    "HfMoeForSequenceClassification",
    "HfMoeForTokenClassification",
    "HfMoeModel",
    "ModelChoice",
    "MoeLayer",
    "MoeTrainer",
    "RollbackCallback",
    "RouterFreezeCallback",
    "RouterNotFrozenError",
    "RoutingMetricsCallback",
    "RoutingThresholds",
    "RoutingTrace",
    "SafeCheckpointMixin",
    "SameWeightsCallback",
    "TextProbe",
    "accelerate_adapters",
    "bits_per_byte",
    "check_index_range",
    "checked_routing",
    "compare_models",
    "compare_traces",
    "count_expert_load",
    "diagnose",
    "expert_lora_config",
    "explain",
    "explain_config",
    "export_adapter",
    "fold_selected_experts",
    "freeze_router",
    "load_adapter",
    "mask_expert_lora",
    "mask_experts",
    "merge_and_check",
    "model_card",
    "moe_layers",
    "record_choices",
    "record_routing",
    "register",
    "replay_routing",
    "router_hash",
    "routing_agreement",
    "save_router_hash",
    "select_experts",
    "trace_texts",
    "train_selected_experts",
    "verify_adapter_base",
    "verify_router_frozen",
]
