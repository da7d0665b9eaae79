"""Auto classes of transformers: the one that loads a checkpoint whole, with every tower that its config describes.

`AutoModelForCausalLM` reads the text model alone out of several vision-language checkpoints (Qwen3.5-MoE, Llama 4)
and silently leaves the rest behind. What the checkpoint itself names in `architectures` decides.
"""

import inspect
from typing import Any

import transformers
from transformers import PreTrainedConfig

# of classes that read tokens and give logits over the vocabulary
_LANGUAGE = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
_OTHERS = (
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModel",
)


def named_auto_class(config: PreTrainedConfig) -> Any | None:
    """The auto class whose model for `config` is the one that the checkpoint names; None if no auto class knows it."""
    wanted = next(iter(config.architectures or []), None)
    remote = getattr(config, "auto_map", None) or {}
    for name in (*_LANGUAGE, *_OTHERS):
        if wanted in _class_names(name, config) or str(remote.get(name, "")).endswith(f".{wanted}"):
            return getattr(transformers, name)
    return None


def whole_auto_class(config: PreTrainedConfig) -> Any:
    """`named_auto_class`, and where it finds none the class with most towers that transformers has for `config`.

    Raises:
        ValueError: If transformers has no model for it.
    """
    named = named_auto_class(config)
    if named is not None:
        return named
    # a config that holds a text config of its own describes more than text
    towers = config.get_text_config() is not config
    language = (*_LANGUAGE[1:], _LANGUAGE[0]) if towers else _LANGUAGE
    for name in (*language, "AutoModelForSeq2SeqLM", "AutoModelForTokenClassification", "AutoModel"):
        if _class_names(name, config) or name in (getattr(config, "auto_map", None) or {}):
            return getattr(transformers, name)
    raise ValueError(
        f"transformers {transformers.__version__} has no model for the model type {config.model_type!r}. Install a "
        "version that knows it."
    )


def is_language_model(auto_class: Any, config: PreTrainedConfig) -> bool:
    """True if the class reads text alone and gives logits and a loss for it (block diffusion and talkers do not)."""
    if auto_class.__name__ not in _LANGUAGE:
        return False
    known = _classes(auto_class.__name__, config)
    wanted = next(iter(config.architectures or []), None)
    chosen = next((each for each in known if each.__name__ == wanted), next(iter(known), None))
    return chosen is None or {"input_ids", "labels"} <= set(inspect.signature(chosen.forward).parameters)


def _classes(auto_class: str, config: PreTrainedConfig) -> tuple[Any, ...]:
    known = getattr(transformers, auto_class)._model_mapping.get(type(config), ())
    return tuple(known) if isinstance(known, tuple | list) else (known,)


def _class_names(auto_class: str, config: PreTrainedConfig) -> set[str]:
    return {each.__name__ for each in _classes(auto_class, config)}
