"""Metrics of a domain against bits_per_byte itself, and their standard error against a simulation."""

import math

import numpy as np
import pytest

from hf_moe.evaluation.bits_per_byte import bits_by_document, bits_per_byte
from hf_moe.evaluation.domains import domain_entry, ratio_stderr
from tiny_moe import hf_moe_model, tiny_tokenizer, words

DOCUMENTS = [words(30, 1), words(8, 2), "", words(15, 3)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return hf_moe_model(vocab_size=300)


def test_documents_are_measured_each_by_itself(model, tokenizer):
    settings = {"window": 16, "stride": 8}
    parts = bits_by_document(model, tokenizer, DOCUMENTS, **settings, batch_size=5)
    assert (parts[2].bits, parts[2].bytes, parts[2].tokens) == (0, 0, 0)
    for text, part in zip(DOCUMENTS, parts, strict=True):
        if text:
            alone = bits_per_byte(model, tokenizer, [text], **settings, batch_size=1)
            assert part.bits == pytest.approx(alone.bits, rel=1e-6)
            assert (part.bytes, part.tokens) == (alone.bytes, alone.tokens)


def test_metrics_and_samples_agree(model, tokenizer):
    documents = [text for text in DOCUMENTS if text]
    parts = bits_by_document(model, tokenizer, documents, window=16, stride=8, batch_size=8)
    entry, samples = domain_entry(documents, parts, window=16, stride=8)
    whole = bits_per_byte(model, tokenizer, documents, window=16, stride=8, batch_size=8)
    assert entry["metrics"]["bits_per_byte"]["value"] == pytest.approx(whole.value, rel=1e-12)
    assert entry["metrics"]["perplexity"]["value"] == pytest.approx(whole.perplexity, rel=1e-9)
    nats, weights = zip(*(sample["values"]["bits_per_byte"] for sample in samples), strict=True)
    assert -sum(nats) / math.log(2) / sum(weights) == pytest.approx(whole.value, rel=1e-12)
    assert entry["bytes"] == sum(len(text.encode()) for text in documents) == sum(weights)


def test_standard_error_of_a_ratio_equals_its_spread():
    generator = np.random.default_rng(0)

    def draw():
        sizes = generator.integers(50, 400, 40)
        return list(zip((sizes * generator.normal(2, 0.3, 40)).tolist(), sizes.tolist(), strict=True))

    runs = [draw() for _ in range(600)]
    ratios = [sum(a for a, _ in run) / sum(b for _, b in run) for run in runs]
    # the spread of 600 values is known to 3 %
    assert np.mean([ratio_stderr(run) for run in runs]) == pytest.approx(np.std(ratios, ddof=1), rel=0.1)
    assert ratio_stderr([(1.0, 2.0)]) is None
