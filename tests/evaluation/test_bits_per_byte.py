"""Bits per byte against a direct float64 computation, token by token."""

import math

import pytest
import torch

from hf_moe.evaluation.bits_per_byte import bits_per_byte
from tiny_moe import hf_moe_model, tiny_tokenizer, words

DOCUMENTS = ["short", words(60, 1), "a", words(25, 2) + "naïve 🙂", words(9, 3)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return hf_moe_model(vocab_size=300, num_shared_experts=1)


def context_start(position, window, stride):
    """Where the first window that contains `position` begins."""
    return 0 if position < window else stride * math.ceil((position - window + 1) / stride)


@torch.no_grad()
def exact_bits(model, tokenizer, documents, window, stride):
    exact = type(model)(model.config).double()
    exact.load_state_dict(model.state_dict())
    # the fast implementations take no float64
    exact.set_experts_implementation("eager")
    exact.eval()
    bits = 0.0
    for text in documents:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for position in range(1, len(ids)):
            context = ids[context_start(position, window, stride) : position]
            log_probabilities = exact(input_ids=torch.tensor([context])).logits[0, -1].log_softmax(-1)
            bits -= float(log_probabilities[ids[position]]) / math.log(2)
    return bits


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (16, 1), (7, 3), (128, 64)])
def test_equals_the_float64_computation(model, tokenizer, window, stride):
    measured = bits_per_byte(model, tokenizer, DOCUMENTS, window=window, stride=stride, batch_size=3)
    exact = exact_bits(model, tokenizer, DOCUMENTS, window, stride)
    # float32 logits: about 1e-6 a token, independent of each other
    assert measured.bits == pytest.approx(exact, rel=2e-6)
    assert measured.bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert measured.tokens == sum(len(tokenizer(text)["input_ids"]) for text in DOCUMENTS)
    assert measured.value == measured.bits / measured.bytes


def test_a_uniform_model_needs_log2_of_the_vocabulary(model, tokenizer):
    uniform = type(model)(model.config)
    uniform.lm_head.weight.data.zero_()
    result = bits_per_byte(uniform, tokenizer, DOCUMENTS, window=16, stride=8)
    assert result.bits == pytest.approx(result.tokens * math.log2(300), rel=1e-6)
    assert result.perplexity == pytest.approx(300, rel=1e-6)


def test_the_batch_size_does_not_matter(model, tokenizer):
    values = [
        bits_per_byte(model, tokenizer, DOCUMENTS, window=16, stride=8, batch_size=size).bits for size in (1, 4, 99)
    ]
    assert values == pytest.approx([values[0]] * 3, rel=2e-6)


def test_text_that_spells_a_special_token_is_measured_as_text(model, tokenizer):
    plain = bits_per_byte(model, tokenizer, ["a <|endoftext|> b"], window=16, stride=8)
    assert plain.bytes == 17
    assert plain.tokens > 5


def test_the_training_mode_comes_back(model, tokenizer):
    model.train()
    bits_per_byte(model, tokenizer, ["text"], window=16, stride=8)
    assert model.training
    model.eval()


REFUSED = {
    "stride_zero": ({"stride": 0}, r"stride must be in \[1, 15\]"),
    "stride_is_window": ({"stride": 16}, r"stride must be in \[1, 15\] .* got 16"),
    "window_too_long": ({"window": 129}, "at most 128 .* got 129"),
    "no_documents": ({"documents": []}, "the 0 documents hold no text"),
    "empty_documents": ({"documents": ["", ""]}, "the 2 documents hold no text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused(case, model, tokenizer):
    change, message = REFUSED[case]
    settings = {"documents": ["text"], "window": 16, "stride": 8, **change}
    documents = settings.pop("documents")
    with pytest.raises(ValueError, match=message):
        bits_per_byte(model, tokenizer, documents, **settings)


def test_a_tokenizer_without_a_first_token_is_refused(model):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no bos_token and no eos_token"):
        bits_per_byte(model, tokenizer, ["text"], window=16, stride=8)
