"""Refuse, before it is trained, an adapter that stock PEFT could not read again.

PEFT renames an adapter's tensors on loading as transformers renames those of old checkpoints. For some classes
(MistralLarge4, DeepseekOcr2 and UnlimitedOcr with peft 0.21) the rules also match names that need no renaming, and the
adapter would be left out with a warning.
"""

import warnings

import peft
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict


class UnreadableAdapterError(ValueError):
    """An adapter that could be saved and not be loaded again."""


def refuse_unreadable(model: PeftModel) -> None:
    """Write the adapter's tensors over themselves, as loading does.

    Raises:
        UnreadableAdapterError: If PEFT does not find the place of each.
    """
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's list of the names; the error below has the first
        found = set_peft_model_state_dict(model, state)
    if found.unexpected_keys:
        raise UnreadableAdapterError(
            f"peft {peft.__version__} renames the tensors of an adapter on {type(model.get_base_model()).__name__} "
            f"when it loads them (to {found.unexpected_keys[0]}), and would leave them out. Train the experts "
            "themselves: hf-moe finetune esft, or full."
        )
