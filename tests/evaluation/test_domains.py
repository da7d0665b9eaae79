"""Metrics of a domain against bits_per_byte itself, and their standard error against a simulation."""

import json
import math

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from chat_cases import assistant, chat_tokenizer, user
from hf_moe.comparison.text_probe import evenly_spread
from hf_moe.data.bad_rows import DataError
from hf_moe.data.chat_text import ChatText
from hf_moe.data.corpus import Domain
from hf_moe.data.encoding import Encoder
from hf_moe.data.sources import Source, read_source
from hf_moe.data.tokenizer import encode_documents
from hf_moe.evaluation.bits_per_byte import bits_by_document, bits_per_byte
from hf_moe.evaluation.domains import domain_entry, ratio_stderr, read_documents, read_domains
from hf_moe.evaluation.errors import EvaluationError
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


def test_domains_are_called_after_their_files(tmp_path):
    (tmp_path / "law.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a b", "c d")))
    (tmp_path / "sea.txt").write_text("call me")
    domains = read_domains([str(tmp_path / "law.jsonl"), str(tmp_path / "sea.txt")], tiny_tokenizer)
    assert domains == {"law": ["a b", "c d"], "sea": ["call me"]}


def test_two_texts_of_one_name_and_rows_without_text_are_refused(tmp_path, capsys):
    (tmp_path / "sea.txt").write_text("call me")
    with pytest.raises(EvaluationError, match="two texts are called 'sea'"):
        read_domains([str(tmp_path / "sea.txt")] * 2, tiny_tokenizer)
    (tmp_path / "law.jsonl").write_text('{"text": "a", "id": 1}\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"1 of 2 rows of .*\(line 2\). Line 2: 'text' is empty"):
        read_domains([str(tmp_path / "law.jsonl")], tiny_tokenizer)
    assert read_domains([str(tmp_path / "law.jsonl")], tiny_tokenizer, on_bad_row="skip") == {"law": ["a"]}
    printed = " ".join(capsys.readouterr().err.split())
    assert "not used: the column 'id'" in printed
    assert "1 bad row left out (line 2)" in printed


CHAT = {"messages": [user("two?"), assistant("four")]}


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (CHAT, "<|user|>\ntwo?\n<|assistant|>\nfour<|endoftext|>"),
        ({"conversations": [{"from": "gpt", "value": "b"}]}, "<|assistant|>\nb<|endoftext|>"),
        ({"prompt": "a ", "completion": "b"}, "a b"),
        ({"instruction": "a", "output": "b"}, "<|user|>\na\n<|assistant|>\nb<|endoftext|>"),
    ],
)
def test_what_the_recipes_train_on_is_measured(record, text, model, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    tokenizer = chat_tokenizer("olmoe")
    domains = read_domains([str(tmp_path / "a.jsonl")], lambda: tokenizer)
    assert domains == {"a": [text]}
    if record is CHAT:  # token for token
        data_set = read_source(Source(str(tmp_path / "a.jsonl")))
        [example] = data_set.apply(Encoder(tokenizer, max_length=64).encode)[1]
        assert [tokenizer.bos_token_id, *encode_documents(tokenizer, domains["a"])[0]] == example.input_ids
    documents = evenly_spread(domains["a"], 30)
    parts = bits_by_document(model, tokenizer, documents, window=16, stride=8)
    assert 0 < domain_entry(documents, parts, window=16, stride=8)[0]["bytes"] <= 30


def test_a_long_conversation_that_is_cut_stays_one():
    [cut] = evenly_spread([ChatText("<|endoftext|>" * 9)], 26)
    assert encode_documents(tiny_tokenizer(), [cut]) == [[tiny_tokenizer().eos_token_id] * 2]


@pytest.mark.parametrize("adds_start", [False, True])
def test_a_trace_reads_a_conversation_as_it_is_trained_on(adds_start, tmp_path):
    tokenizer = chat_tokenizer("olmoe")
    if adds_start:
        start = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{start[0]} $A", special_tokens=[start])
    (tmp_path / "a.jsonl").write_text(json.dumps({**CHAT, "domain": "sums"}) + "\n" + json.dumps(CHAT))
    documents = read_documents(str(tmp_path / "a.jsonl"), lambda: tokenizer, by_field=True)
    assert list(documents) == ["sums", "a"]
    assert tokenizer(documents["a"][0])["input_ids"] == tokenizer.apply_chat_template(CHAT["messages"])["input_ids"]
    (tmp_path / "a.jsonl").write_text(json.dumps({**CHAT, "domain": "../up"}))
    with pytest.raises(DataError, match=r"'domain' must be 1 to 32 .* got '../up'"):
        read_documents(str(tmp_path / "a.jsonl"), lambda: tokenizer, by_field=True)


def test_embedded_text_is_the_held_out_part(monkeypatch):
    corpus = {"code": Domain("code", train=("seen",), held_out=("unseen", "new"))}
    monkeypatch.setattr("hf_moe.evaluation.domains.embedded_corpus", lambda **sizes: corpus)
    assert read_domains(["embedded"], tiny_tokenizer) == {"code": ["unseen", "new"]}
