"""Save the result of a recipe: an adapter or a model, with the routers' hash, whole or not at all."""

import logging
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_moe.adapters.frozen_router import save_router_hash, verify_adapter_without_router
from hf_moe.finetuning.other_towers import copy_processor, has_other_towers
from hf_moe.io.whole_files import whole_folder

logger = logging.getLogger(__name__)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter and the routers' hash, whole or not at all.

    Raises:
        RouterNotFrozenError: If the adapter would hold a router's tensor.
    """
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary, save_embedding_layers=False)
        (temporary / "README.md").unlink()  # PEFT's empty card; ours is one level up
        verify_adapter_without_router(temporary, model)
        save_router_hash(temporary, model)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model, its tokenizer, its processor and the routers' hash, whole or not at all."""
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if has_other_towers(model) and not copy_processor(model.name_or_path, temporary):
            logger.warning("%s has no processor files to save beside the model.", model.name_or_path)
        save_router_hash(temporary, model)
