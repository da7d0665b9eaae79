"""Texts are traced whole, once, under their domain, and an audit keeps nothing of them."""

import hashlib

import numpy as np
import pytest
import torch

from hf_moe.observability.routing_trace import RoutingTrace
from hf_moe.observability.trace_texts import trace_texts
from tiny_moe import hf_moe_model, tiny_tokenizer, words

pytest.importorskip("pyarrow")
TEXTS = {"law": [words(60, seed=1), "", words(9, seed=2) + "漢字 🙂 \u202e<script>"], "code": [words(30, seed=3)]}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return hf_moe_model(vocab_size=300)


def test_texts_come_back_by_token(model, tokenizer):
    model.train()
    trace = trace_texts(model, tokenizer, TEXTS, detail="tokens", window=16, batch_size=3)
    assert model.training
    assert trace.domains == ["law", "code"]
    encoded = {name: [tokenizer(text)["input_ids"] for text in texts] for name, texts in TEXTS.items()}
    rows = list(trace.tokens.rows())
    assert max(len(row.token_ids) for row in rows) == 16
    for name, texts in encoded.items():
        mine = [row for row in rows if row.domain == name]
        assert np.concatenate([row.token_ids for row in mine]).tolist() == [each for ids in texts for each in ids]
        assert "".join(piece for row in mine for piece in row.text) == "".join(TEXTS[name])
        assert trace.statistics(trace.layers[0], name).tokens == sum(map(len, texts))
    table = trace.tokens.layer(trace.layers[1])
    counts = np.bincount(table.experts.flatten(), minlength=8)
    assert counts.tolist() == trace.statistics(trace.layers[1]).counts.tolist()
    assert "".join(table.text[table.domain == "code"]) == TEXTS["code"][0]


def test_batches_do_not_change_the_routing(model, tokenizer):
    one, two = (trace_texts(model, tokenizer, TEXTS, window=16, batch_size=size) for size in (1, 5))
    for name in one.layers:
        assert torch.equal(one.statistics(name).counts, two.statistics(name).counts)


def test_max_tokens_is_by_domain(model, tokenizer):
    trace = trace_texts(model, tokenizer, TEXTS, max_tokens=20, window=16)
    assert [trace.statistics(trace.layers[0], name).tokens for name in TEXTS] == [20, 20]


def test_an_audit_keeps_only_hashes(model, tokenizer, tmp_path):
    text = "whereas the party of the first part"
    trace = trace_texts(model, tokenizer, {"law": [text]}, detail="tokens", audit=True)
    trace.save(tmp_path / "trace")
    loaded = RoutingTrace.load(tmp_path / "trace")
    (row,) = loaded.tokens.rows()
    ids = tokenizer(text)["input_ids"]
    assert (row.token_ids, row.text) == (None, None)
    assert row.sha256 == hashlib.sha256(np.array(ids, "<i8").tobytes()).hexdigest()
    assert loaded.tokens.is_audit
    assert "SHA-256" in loaded.model_facts["audit"]
    assert loaded.tokens.layer(loaded.layers[0]).token_id is None
    written = b"".join(path.read_bytes() for path in (tmp_path / "trace").iterdir())
    assert b"whereas" not in written
    assert b"token_id" not in (tmp_path / "trace" / "tokens.parquet").read_bytes()


def test_text_is_left_out_on_request(model, tokenizer):
    trace = trace_texts(model, tokenizer, TEXTS, detail="tokens", store_text=False)
    assert not trace.tokens.has_text
    assert next(trace.tokens.rows()).text is None
    assert trace.tokens.layer(trace.layers[0]).text is None


@pytest.mark.parametrize(
    ("domains", "options", "message"),
    [
        ({}, {}, "no domain to trace"),
        ({"law": ["", ""]}, {}, "'law' hold no token"),
        ({"law": "a text"}, {}, "must be a list of texts"),
        (TEXTS, {"window": 0}, "window must be at least 1, got 0"),
        (TEXTS, {"max_tokens": -1}, "max_tokens must be at least 1"),
    ],
)
def test_bad_input(model, tokenizer, domains, options, message):
    with pytest.raises(ValueError, match=message):
        trace_texts(model, tokenizer, domains, **options)
