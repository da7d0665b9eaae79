"""Mixture-of-Experts for the Hugging Face stack. Importing registers the `hf_moe` architecture; it patches nothing.

The names that most people need stand here and are imported when they are first used, so that `import hf_moe` stays as
light as `import transformers`; import all others from the module that owns them. From the ground up, each imports only
from lines before its own:

    reference.py        routing, experts and losses as loops in float64: the definition of correct
    io/                 files that appear whole or not at all, resumable stages, locks, JSON read within bounds
    kernels/            the experts of a layer in Triton and C++, with their gradients; needs torch and triton alone
    models/             what a checkpoint carries: configuration, modeling, routing, losses, checkpoint layout
    lazy_imports.py     classes imported on first use, actions that follow an import
    layers/             the MoE layers of any model: find them, watch their routing, read their scores
    experts/            the ways to run experts: the steps of a layer, activations, the table of backends
    loading/            pretrained models, with what their folder says checked before
    adapters/           LoRA on experts, adapter experts, ESFT; a frozen router and the proof; load, merge, export
    observability/      explain; record and replay routing, statistics, health, thresholds, plots, the page
    data/               data sets: read, rendered as chats, tokenised, packed
    planner/            memory of a training, computed before anything is loaded
    training/           MoeTrainer, balancing, checkpoints that survive a kill, callbacks
    registration.py     the only side effects on other libraries
    evaluation/         standard benchmarks, domains, masked experts, paired comparison
    hub/                model cards from facts; a push in one commit, loaded back before it is sent
    comparison/         two models or a serving process side by side, held to thresholds
    generation/         what a model writes, with its adapter or without
    finetuning/         what the fine-tuning recipes share
    recipes/            one story a file, to read and run; installed from the top of the repository
    cli/                the command hf-moe, a file for each of its commands
"""

import importlib
import warnings
from typing import Any

from hf_moe.registration import register

__version__ = "0.1.0"

# the public names by the module that owns them; type checkers and editors read __init__.pyi
_HOMES = {
    "hf_moe.adapters.adapter_experts": ("AdapterExpertsConfig",),
    "hf_moe.adapters.expert_lora": ("accelerate_adapters", "expert_lora_config", "merge_and_check"),
    "hf_moe.adapters.export": ("export_adapter",),
    "hf_moe.adapters.frozen_router": ("freeze_router", "router_hash", "verify_router_frozen"),
    "hf_moe.adapters.load_adapter": ("load_adapter",),
    "hf_moe.layers.moe_layers": ("moe_layers",),
    "hf_moe.models.configuration_hf_moe": ("HfMoeConfig",),
    "hf_moe.models.modeling_hf_moe": ("HfMoeForCausalLM", "HfMoeModel"),
    "hf_moe.observability.explain": ("explain",),
    "hf_moe.observability.recording": ("record_routing",),
    "hf_moe.registration": ("register",),
    "hf_moe.training.balancing.config": ("BalancingConfig",),
    "hf_moe.training.callbacks": ("RouterFreezeCallback",),
    "hf_moe.training.checkpointing.safe_checkpoint": ("SafeCheckpointMixin",),
    "hf_moe.training.routing_metrics": ("CollapseCallback", "RoutingMetricsCallback"),
    "hf_moe.training.trainer": ("MoeTrainer",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

# where names are that were public here in earlier versions: still found, with a FutureWarning that names the new place
_PLACES = (
    "hf_moe.adapters.esft.fold_selected_experts",
    "hf_moe.adapters.esft.mask_expert_lora",
    "hf_moe.adapters.esft.train_selected_experts",
    "hf_moe.adapters.expert_selection.ExpertSelection",
    "hf_moe.adapters.frozen_router.RouterNotFrozenError",
    "hf_moe.adapters.frozen_router.save_router_hash",
    "hf_moe.adapters.frozen_router.verify_adapter_base",
    "hf_moe.adapters.select_experts.select_experts",
    "hf_moe.comparison.run.ModelChoice",
    "hf_moe.comparison.run.compare_models",
    "hf_moe.comparison.routing.compare_traces",
    "hf_moe.comparison.routing_agreement.record_choices",
    "hf_moe.comparison.routing_agreement.routing_agreement",
    "hf_moe.comparison.text_probe.TextProbe",
    "hf_moe.evaluation.bits_per_byte.bits_per_byte",
    "hf_moe.evaluation.masking.mask_experts",
    "hf_moe.hub.cards.card.model_card",
    "hf_moe.layers.moe_layers.MoeLayer",
    "hf_moe.layers.moe_layers.check_index_range",
    "hf_moe.layers.moe_layers.checked_routing",
    "hf_moe.models.modeling_hf_moe.HfMoeForQuestionAnswering",
    "hf_moe.models.modeling_hf_moe.HfMoeForSequenceClassification",
    "hf_moe.models.modeling_hf_moe.HfMoeForTokenClassification",
    "hf_moe.observability.recording.count_expert_load",
    "hf_moe.observability.explain.explain_config",
    "hf_moe.observability.health.diagnose",
    "hf_moe.observability.replay.replay_routing",
    "hf_moe.observability.routing_trace.RoutingTrace",
    "hf_moe.observability.trace_texts.trace_texts",
    "hf_moe.training.balancing.checks.BalancingError",
    "hf_moe.training.balancing.mixin.BalancingCallback",
    "hf_moe.training.balancing.mixin.BalancingMixin",
    "hf_moe.training.same_weights.SameWeightsCallback",
)
_MOVED = {place.rpartition(".")[2]: place for place in _PLACES} | {
    "Gate": "hf_moe.observability.thresholds.RoutingThresholds",
    "GatedRollbackCallback": "hf_moe.training.rollback.RollbackCallback",
}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, new_name = _MOVED[name].rpartition(".")
    message = f"hf_moe.{name} has moved and will go from here: write `from {module} import {new_name}`."
    warnings.warn(message, FutureWarning, stacklevel=2)
    return getattr(importlib.import_module(module), new_name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()

__all__ = sorted(_HOME_OF)
