"""The report's page without a browser: what is packed, how text is shown, what a trace gives."""

import base64
import gzip
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_moe.observability.layer_statistics import empty_statistics
from hf_moe.observability.report.data import ReportData, pack, pack_coactivation, pack_tokens
from hf_moe.observability.report.from_trace import report_data
from hf_moe.observability.report.glossary import LAYER_TERMS, OTHER_TERMS, glossary
from hf_moe.observability.report.page import render, write_report
from hf_moe.observability.report.text import percent, short_count, short_labels, times, visible, visible_token
from hf_moe.observability.routing_trace import RoutingTrace
from hf_moe.observability.trace_texts import trace_texts
from tiny_moe import hf_moe_model
from tiny_report import count_statistics, sample_report


def unpack(packed):
    data = gzip.decompress(base64.b64decode(packed["data"]))
    return json.loads(data) if packed["type"] == "json" else np.frombuffer(data, f"<{packed['type']}")


class Scripts(HTMLParser):
    """The contents of all script elements, as HTML's own rules cut them."""

    def __init__(self, page):
        super().__init__()
        self.found, self._inside = [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "script":
            self._inside = True
            self.found.append("")

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "script"

    def handle_data(self, data):
        if self._inside:
            self.found[-1] += data


def payload(page):
    return json.loads(Scripts(page).found[0])


@pytest.mark.parametrize("largest", [0, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**53])
def test_whole_numbers_come_back_exactly(largest):
    values = np.array([0, largest // 3, largest])
    assert unpack(pack(values)).tolist() == values.tolist()


def test_the_page_holds_the_counts_pairs_and_tokens():
    data = sample_report(experts=(8, 5), top_k=3)
    report = payload(render(data))
    counts = unpack(report["counts"])
    assert counts.tolist() == [*data.layers[0].counts.tolist(), *data.layers[1].counts.tolist()]
    pairs = unpack(report["coactivation"][1])
    assert pairs.tolist() == [int(data.layers[1].coactivation[i, j]) for i in range(5) for j in range(i + 1, 5)]
    assert unpack(report["domainCounts"][2])[:8].tolist() == data.by_domain["code"][0].counts.tolist()
    for slot, kept in enumerate(report["sample"]["slots"]):
        assert unpack(kept["experts"])[600:].tolist() == data.tokens.experts[1][:, slot].tolist()
        weights = unpack(kept["weights"])[:600] / 255 * report["sample"]["scales"][0]
        assert np.abs(weights - data.tokens.weights[0][:, slot]).max() <= 0.5 / 255 + 1e-9


def test_slots_are_ordered_by_weight_and_empty_ones_are_last():
    data = sample_report(experts=(4,), tokens=100)
    sample = replace(data.tokens, experts=(np.tile([4, 2], (100, 1)),), weights=(np.tile([0.0, 1.0], (100, 1)),))
    first, second = pack_tokens(sample)["slots"]
    assert (set(unpack(first["experts"])), set(unpack(second["experts"]))) == ({2}, {4})


def test_what_does_not_fit_is_left_out_and_counted():
    data = sample_report(experts=(200,) * 4, top_k=6, tokens=2000)
    whole = pack_tokens(data.tokens)
    assert len(whole["slots"]) == 6
    fewer = pack_tokens(data.tokens, budget=60_000)
    assert 1 <= len(fewer["slots"]) < 6
    assert fewer["slotsInTrace"] == 6
    fewest = pack_tokens(data.tokens, budget=9_000)
    assert len(fewest["slots"]) >= 1
    assert len(unpack(fewest["piece"])) < 2000
    assert fewest["total"] == 2000


def test_pairs_that_do_not_fit_stay_for_layers_at_even_distances():
    layers = sample_report(experts=(64,) * 6).layers
    size = len(pack_coactivation(layers)[0]["data"])
    kept = pack_coactivation(layers, budget=3 * size + size // 2)
    assert [each is not None for each in kept] == [True, False] * 3


HOSTILE = {
    "</script><script>alert(1)</script>": "</script><script>alert(1)</script>",
    "a\u202eb": "a⟨U+202E⟩b",
    "\x00\x1b[31m\x7f": "⟨U+0000⟩⟨U+001B⟩[31m⟨U+007F⟩",
    "\ud800": "⟨U+D800⟩",
    "\u2066\u200b\ufeff": "⟨U+2066⟩⟨U+200B⟩⟨U+FEFF⟩",
    "a\tb\rc": "a⇥b⟨CR⟩c",
    "naïve العربية 漢字 \u00a0": "naïve العربية 漢字 \u00a0",
}


@pytest.mark.parametrize("given", HOSTILE)
def test_text_is_made_visible(given):
    assert visible(given) == HOSTILE[given]


def test_long_text_is_cut_and_says_so():
    assert visible_token("x" * 100_000) == "x" * 48 + "… (100,000 characters)"


def test_a_line_ends_where_a_token_ends_it():
    assert visible_token("a\nb") == "a↵\nb"
    assert visible("a\nb") == "a↵b"


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["model.layers.1.mlp", "model.layers.10.mlp"], ["layer 1", "layer 10"]),
        (["model.layers.3.mlp"], ["layer 3"]),
        (["encoder.0.moe", "decoder.0.moe"], ["encoder", "decoder"]),
        (["a", "b"], ["a", "b"]),
        ([], []),
    ],
)
def test_labels_are_short_and_different(names, labels):
    assert short_labels(names) == labels


def test_numbers_are_for_people():
    assert [short_count(n) for n in (7, 9_999, 30_000, 3_876_224, 7e9)] == ["7", "9,999", "30k", "3.88M", "7B"]
    assert [percent(n) for n in (0.0, 0.0004, 0.042, 0.0996, 0.5, float("nan"))] == [
        "0.0%",
        "<0.1%",
        "4.2%",
        "10%",
        "50%",
        "–",
    ]
    assert [times(n) for n in (0.125, 2.13, 31.7)] == ["0.12×", "2.1×", "32×"]


def test_names_cannot_leave_their_place_in_the_page():
    bad = "</script><script>alert('1')</script>\"\u202e\x00\ud800<img src=x onerror=alert(1)>"
    page = render(sample_report(title=bad, domains=(bad, "b"), pieces=(bad,), name=bad + ".{}"))
    scripts = Scripts(page).found
    assert len(scripts) == 2
    assert "<img" not in page
    assert not set("\u202e\x00") & set(page)
    assert page.encode()  # no lone surrogate
    assert unpack(json.loads(scripts[0])["sample"]["pieces"])[0].startswith("</script>")


def test_only_the_pages_own_script_may_run_and_nothing_is_loaded():
    page = render(sample_report())
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert "default-src 'none'" in policy.replace("&#39;", "'")
    assert "unsafe" not in policy
    assert not re.findall(r"(?:src|href)=[\"'](?!#)", page.replace(Scripts(page).found[1], ""))
    assert "http" not in page.replace(Scripts(page).found[0], "").replace("http-equiv", "")


def test_the_same_data_give_the_same_page(tmp_path):
    write_report(tmp_path / "a" / "report.html", sample_report())
    assert (tmp_path / "a" / "report.html").read_text() == render(sample_report())
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["report.html"]


def test_an_interrupted_write_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("hf_moe.io.whole_files.os.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(path, sample_report())
    assert path.read_text() == "old"


def test_the_verdict_is_in_the_page_without_its_script():
    counts = np.tile([0, 1], (2000, 1))
    collapsed = [count_statistics(f"layers.{i}.mlp", 16, (counts + 2 * i) % 16, counts + 0.5) for i in range(3)]
    page = render(ReportData("m", tuple(collapsed)))
    assert "The router has collapsed" in page
    assert "Every layer collapsed onto an expert of its own" in page
    assert "a balancing loss per layer" in page
    assert re.search(r'<a href="#layer" data-layer="2"><bdi>layer 2</bdi></a>: 2\.0 of 16 experts', page)
    assert "Routing is healthy" in render(sample_report(tokens=4000))
    rare = np.concatenate([np.tile([0, 1], (2000, 1)), np.tile([2, 3], (2000, 1)), np.tile([4, 5], (60, 1))])
    page = render(ReportData("m", (count_statistics("layers.7.mlp", 6, rare, rare + 0.5),)))
    assert "of an even load) in these 4,060 tokens: 2 experts of layer 7 (4, 5)." in page


def test_the_documents_hold_the_terms_of_the_pages():
    page = render(sample_report())
    assert glossary() in (Path(__file__).parents[3] / "docs" / "glossary.md").read_text()
    for term in (*LAYER_TERMS.values(), *OTHER_TERMS.values()):
        assert f"<dt>{term.title}" in page


def test_a_page_of_nothing_traced():
    page = render(ReportData("m", (empty_statistics("layers.0.mlp", 4, 2),)))
    assert "No token reached a router" in page
    assert "healthy:" not in page
    assert "No token reached a router" in render(ReportData("m", ()))


def test_statistics_that_do_not_belong_together_are_refused():
    data = sample_report()
    with pytest.raises(ValueError, match="domain 'law' must have statistics of the same layers"):
        replace(data, by_domain={"law": data.layers[:1]})
    with pytest.raises(ValueError, match="tokens must have experts of all 2 layers, got 3"):
        replace(data, layers=data.layers[:2], by_domain={})


class Letters:
    """A tokenizer of letters."""

    is_fast = False
    pad_token_id = 0

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) % 16 for letter in text]}

    def decode(self, ids):
        return f"<{ids[0]}>"


@pytest.fixture(scope="module")
def trace():
    torch.manual_seed(0)
    texts = {"short": ["abc" * 10], "long": ["hello world " * 60]}
    return trace_texts(hf_moe_model(), Letters(), texts, detail="tokens", window=32)


def test_a_trace_gives_the_report_its_tokens_and_sums(trace, monkeypatch):
    monkeypatch.setattr("hf_moe.observability.report.from_trace.MOST_TOKENS", 200)
    data = report_data(trace, "name")
    assert data.title == "name"
    assert data.domains == ("short", "long")
    # all of the short domain, the rest of the room for the long one
    assert np.bincount(data.tokens.domains).tolist() == [30, 170]
    assert data.tokens.total == 750
    assert data.tokens.pieces[:3] == ["<1>", "<2>", "<3>"]
    rows = list(trace.tokens.rows())
    for position, layer in enumerate(trace.layers):
        assert data.tokens.experts[position][:30].tolist() == rows[0].experts[layer].tolist()
    assert data.layers[0].counts.tolist() == trace.statistics(trace.layers[0]).counts.tolist()
    assert data.facts["Tokens traced"] == "750"
    assert render(data)


def test_the_report_of_a_trace_without_tokens_or_text_says_so(trace):
    counts = RoutingTrace([trace.statistics(name) for name in trace.layers], {})
    assert report_data(counts).tokens is None
    assert report_data(counts).notes == ("The trace holds sums only: no single token, no text.",)
    torch.manual_seed(0)
    audit = trace_texts(hf_moe_model(), Letters(), {"a": ["abc" * 30]}, detail="tokens", audit=True)
    data = report_data(audit)
    assert "neither the tokens' ids nor their text" in data.notes[0]
    sample = payload(render(data))["sample"]
    assert sample["shows"] == "places"
    assert unpack(sample["pieces"])[:3] == ["0", "1", "2"]
