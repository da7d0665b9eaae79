"""Mixture-of-Experts for the Hugging Face stack. Importing registers the `hf_moe` architecture; it patches nothing.

Public names are imported when they are first used, so that `import hf_moe` stays as light as `import transformers`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hf_moe.models.configuration_hf_moe import HfMoeConfig
from hf_moe.registration import register

if TYPE_CHECKING:
    from hf_moe.models.modeling_hf_moe import (
        HfMoeForCausalLM,
        HfMoeForQuestionAnswering,
        HfMoeForSequenceClassification,
        HfMoeForTokenClassification,
        HfMoeModel,
    )
    from hf_moe.models.moe_layers import MoeLayer, check_index_range, checked_routing, moe_layers
    from hf_moe.observability.explain import explain, explain_config

__version__ = "0.1.0"

_HOMES = {
    "HfMoeForCausalLM": "hf_moe.models.modeling_hf_moe",
    "HfMoeForQuestionAnswering": "hf_moe.models.modeling_hf_moe",
    "HfMoeForSequenceClassification": "hf_moe.models.modeling_hf_moe",
    "HfMoeForTokenClassification": "hf_moe.models.modeling_hf_moe",
    "HfMoeModel": "hf_moe.models.modeling_hf_moe",
    "MoeLayer": "hf_moe.models.moe_layers",
    "check_index_range": "hf_moe.models.moe_layers",
    "checked_routing": "hf_moe.models.moe_layers",
    "explain": "hf_moe.observability.explain",
    "explain_config": "hf_moe.observability.explain",
    "moe_layers": "hf_moe.models.moe_layers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


register()

__all__ = [
    "HfMoeConfig",
    "HfMoeForCausalLM",
    "HfMoeForQuestionAnswering",
    "HfMoeForSequenceClassification",
    "HfMoeForTokenClassification",
    "HfMoeModel",
    "MoeLayer",
    "check_index_range",
    "checked_routing",
    "explain",
    "explain_config",
    "moe_layers",
    "register",
]
