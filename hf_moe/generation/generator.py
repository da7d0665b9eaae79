"""Draw an answer from a model, and hand out its text while it comes."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from hf_moe.data.bad_rows import DataError
from hf_moe.data.encoding import context_of


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        max_new_tokens: At most this many; the model's end of text or turn ends an answer before.
        temperature: 0 takes the likeliest token.
        top_p: Draw from the likeliest tokens of this share; None: as the model's generation_config says.
        seed: Of every answer.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise DataError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not 0 <= self.temperature < float("inf"):
            raise DataError(f"temperature must be 0 or above, got {self.temperature}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise DataError(f"top_p must be a share above 0, up to 1, got {self.top_p}.")

    def options(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        if self.temperature == 0:
            # the model's own values for sampling would be warned of
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        top_p = {} if self.top_p is None else {"top_p": self.top_p}
        return {"do_sample": True, "temperature": self.temperature, **top_p}


class _Streamer(TextStreamer):
    """Hands text on as soon as its characters are whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: list[int],
    sampling: Sampling,
    on_text: Callable[[str], None],
    *,
    adapter_off: bool = False,
) -> str:
    """The model's answer to a prompt.

    Args:
        model: A model, or a `PeftModel` around it.
        token_ids: The prompt.
        on_text: Called with each piece of the answer, in order.
        adapter_off: The answer of the base model below the adapter.

    Raises:
        DataError: If the prompt is empty, or leaves no room in the model's context.
    """
    context = context_of(model.config)
    if not token_ids:
        raise DataError("the prompt is empty. Write something for the model to continue.")
    if context is not None and len(token_ids) >= context:
        raise DataError(
            f"the prompt has {len(token_ids):,} tokens, and the model reads {context:,} in all. Shorten the prompt."
        )
    room = sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - len(token_ids))
    rows = torch.tensor([token_ids], device=model.device)
    padding = {} if tokenizer.eos_token_id is None else {"pad_token_id": tokenizer.eos_token_id}
    set_seed(sampling.seed)
    with model.disable_adapter() if adapter_off else nullcontext(), torch.no_grad():
        written = model.generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=room,
            streamer=_Streamer(tokenizer, on_text),
            **sampling.options(),
            **padding,
        )
    return str(tokenizer.decode(written[0, len(token_ids) :], skip_special_tokens=True))
