"""The only side effects on other libraries. They add and never replace, and can be repeated."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_moe.models.configuration_hf_moe import HfMoeConfig
from hf_moe.models.modeling_hf_moe import (
    HfMoeForCausalLM,
    HfMoeForQuestionAnswering,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeModel,
)

AUTO_CLASSES = {
    AutoModel: HfMoeModel,
    AutoModelForCausalLM: HfMoeForCausalLM,
    AutoModelForSequenceClassification: HfMoeForSequenceClassification,
    AutoModelForTokenClassification: HfMoeForTokenClassification,
    AutoModelForQuestionAnswering: HfMoeForQuestionAnswering,
}


def register() -> None:
    """Make `hf_moe` known to the Auto classes, and its files part of every saved checkpoint.

    A saved checkpoint then carries the modeling code: it loads with hf_moe as it is, and without hf_moe through
    `trust_remote_code=True`.
    """
    AutoConfig.register(HfMoeConfig.model_type, HfMoeConfig, exist_ok=True)
    HfMoeConfig.register_for_auto_class()
    for auto_class, model_class in AUTO_CLASSES.items():
        auto_class.register(HfMoeConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class.__name__)
