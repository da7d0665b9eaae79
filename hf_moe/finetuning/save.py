"""Save the result of a recipe: an adapter or a model, with the routers' hash, whole or not at all; with our card."""

import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from hf_moe.adapters.frozen_router import save_router_hash, verify_adapter_without_router
from hf_moe.data.chat_text import CHAT_TEMPLATE
from hf_moe.finetuning.other_towers import copy_processor, has_other_towers
from hf_moe.hub.cards.card import model_card
from hf_moe.hub.upload_files import is_checkpoint, is_template
from hf_moe.io.whole_files import whole_folder, write_text

logger = logging.getLogger(__name__)


class OwnCardMixin(Trainer):
    """A Trainer whose card is ours; a recipe writes it when the run has ended, with what it measured.

    TRL would write one for every checkpoint, fine-tuned from "None" if the model was loaded from a folder, and PEFT a
    template into the checkpoint, with that folder's path as the base.
    """

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of what `save_model` left in the output folder, as for `push_to_hub`; of nothing there is none."""
        folder = Path(str(self.args.output_dir))
        if self.is_world_process_zero() and is_checkpoint(folder):
            state = {"log_history": self.state.log_history, "global_step": self.state.global_step}
            model_card(folder, training=state).save(folder / "README.md")

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        super()._save(output_dir, *args, **kwargs)
        card = Path(str(output_dir or self.args.output_dir), "README.md")
        if card.is_file() and is_template(card):
            card.unlink()


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the adapter, the routers' hash, and the chat template that it learned with, whole or not at all.

    Raises:
        RouterNotFrozenError: If the adapter would hold a router's tensor.
    """
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary, save_embedding_layers=False)
        (temporary / "README.md").unlink()  # PEFT's empty card; ours is one level up
        verify_adapter_without_router(temporary, model)
        save_router_hash(temporary, model)
        if isinstance(tokenizer.chat_template, str):
            write_text(temporary / CHAT_TEMPLATE, tokenizer.chat_template)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model, its tokenizer, its processor and the routers' hash, whole or not at all."""
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if has_other_towers(model) and not copy_processor(model.name_or_path, temporary):
            logger.warning("%s has no processor files to save beside the model.", model.name_or_path)
        save_router_hash(temporary, model)
