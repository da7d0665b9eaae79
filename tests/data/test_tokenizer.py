"""The tokenizer writes any text, byte for byte, and never mistakes text for a special token."""

import pytest
from transformers import AutoTokenizer

from hf_moe.data.tokenizer import END_OF_TEXT, encode_documents, train_tokenizer
from tiny_moe import tiny_tokenizer, words

TEXTS = ["plain words", "  spaces  and\ttabs\n\n", "naïve 日本語 🙂 \x00\x7f", f"a {END_OF_TEXT} b", words(50), ""]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_decoding_gives_the_same_text(tokenizer):
    for text, ids in zip(TEXTS, encode_documents(tokenizer, TEXTS), strict=True):
        assert tokenizer.decode(ids) == text


def test_text_that_spells_a_special_token_is_text(tokenizer):
    (ids,) = encode_documents(tokenizer, [f"a {END_OF_TEXT} b"])
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_special_tokens_have_their_roles(tokenizer):
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.pad_token_id == 1
    assert len(tokenizer) == 300


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert encode_documents(loaded, TEXTS) == encode_documents(tokenizer, TEXTS)


def test_training_twice_gives_the_same(tokenizer):
    assert tiny_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_no_documents_give_no_ids(tokenizer):
    assert encode_documents(tokenizer, []) == []


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"at least 258 .* got 257"):
        train_tokenizer(["text"], vocab_size=257, max_length=8)
