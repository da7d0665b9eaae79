"""A prompt as tokens: through the tokenizer's chat template where it has one, or as plain text."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_moe.data.bad_rows import DataError
from hf_moe.data.chat_text import ChatWriter
from hf_moe.data.formats import Chat

Message = dict[str, Any]


class PromptWriter:
    """Prompts of one tokenizer.

    Args:
        raw: Leave the chat template out: the model continues the prompt.
        system: The system message of every conversation.

    Raises:
        DataError: For a system message where no chat template writes it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, raw: bool = False, system: str | None = None):
        self.tokenizer = tokenizer
        self.chats = not raw and tokenizer.chat_template is not None
        self.first: list[Message] = []
        if system is not None:
            if not self.chats:
                raise DataError(
                    "a system message needs a chat template, and this tokenizer has none, or it is left out. Put the "
                    "text into the prompt, or give a template."
                )
            self.first = [{"role": "system", "content": system}]

    def token_ids(self, turns: Sequence[Message]) -> list[int]:
        """Tokens after which the model answers the last of `turns`, a user's; of plain text the last turn alone.

        Raises:
            DataError: If the chat template is broken.
            RowError: If it refuses the messages, such as a system message.
        """
        if not self.chats:
            return self.tokenizer(str(turns[-1]["content"]))["input_ids"]
        text = ChatWriter(self.tokenizer).text(Chat([*self.first, *turns], None, None, {}), prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
