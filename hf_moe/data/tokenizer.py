"""A byte-level BPE tokenizer trained on the recipe's own text."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_moe.data.chat_text import ChatText

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: every text can be written with it, and decodes to exactly the same bytes.

    `END_OF_TEXT` separates documents and stands before the first token (bos = eos). Text that spells out a special
    token is text: pass `split_special_tokens=True` when you encode (as `encode_documents` does).

    Raises:
        ValueError: If `vocab_size` is below 258 (256 bytes and 2 special tokens).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise ValueError(f"vocab_size must be at least 258 (256 bytes and 2 special tokens), got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> list[list[int]]:
    """Token ids of each document, without special tokens but those that a conversation's template writes."""
    texts = list(documents)
    is_chat = [isinstance(text, ChatText) for text in texts]
    encoded = {
        kind: iter(_encode(tokenizer, [t for t, chat in zip(texts, is_chat, strict=True) if chat is kind], kind))
        for kind in set(is_chat)
    }
    return [next(encoded[kind]) for kind in is_chat]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], is_chat: bool) -> list[list[int]]:
    # verbose=False: documents are longer than the context on purpose, they are packed or windowed later
    options = {"add_special_tokens": False, "split_special_tokens": not is_chat, "verbose": False}
    return tokenizer(texts, **options)["input_ids"]
