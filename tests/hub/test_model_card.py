"""Cards hold the report's figures and nothing made up; text from data cannot become markup or YAML."""

import copy
import sys

import pytest
import yaml

from hf_moe.hub.model_card import NOT_MEASURED, cell, fenced, render_card, table
from hf_moe.hub.run_card import run_card

BITS = {
    "before": {"code": 2.5, "legal": 3.5},
    "after": {"code": 2.625, "legal": 3.0},
    "adapter off": {"code": 2.5, "legal": 3.5},
}
COUNTS = {
    "train_documents": 9,
    "train_bytes": 12_345,
    "train_tokens": 4_321,
    "held_out_documents": 2,
    "held_out_bytes": 678,
}
TRAINED = {"steps": 11, "tokens": 2_816, "log": [{"step": 11, "loss": 4.125}]}
REPORT = {
    "new_domain": "legal",
    "command": "hf-moe quickstart --domain legal --minutes 5 --seed 0",
    "choices": {
        "layers": 4,
        "hidden_size": 128,
        "experts": 16,
        "experts_per_token": 2,
        "expert_width": 128,
        "row_length": 256,
        "rows_per_step": 10,
        "vocab_size": 2048,
        "seed": 0,
        "replay": 0.5,
        "adapter_rank": 8,
        "learning_rate": 0.004,
        "adapter_learning_rate": 0.003,
    },
    "date": "2026-11-21",
    "versions": {"torch": "2.13.0+cpu"},
    "machine": {"architecture": "x86_64", "torch_threads": 1},
    "text": {"code": COUNTS, "legal": COUNTS},
    "base": {**TRAINED, "parameters": {"total": 3_900_000, "active": 1_100_000}},
    "adapter": {
        **TRAINED,
        "trainable_parameters": 327_680,
        "router_sha256_before": "ab" * 32,
        "router_sha256_after": "ab" * 32,
    },
    "evaluation": {
        "bits_per_byte": BITS,
        "routing_agreement": {"code": [1.0, 0.75], "legal": [1.0, 0.5]},
        "balance_before": {"load_entropy": [0.9, 0.8], "max_violation": [1.5, 2.5]},
    },
    "load_back": {
        "logits_equal": True,
        "sample": {"prompt": "The", "base": "a ```fence``` b", "adapted": "{{ 7 * 7 }}"},
    },
    "seconds": {"base": 150.4, "adapter": 60.2},
    "interrupted": ["adapter"],
}


def report(**changes):
    return {**copy.deepcopy(REPORT), **changes}


def test_the_card_holds_the_figures():
    card = run_card(report())
    for figure in (
        "3,900,000 parameters (1,100,000 active",
        "3.500 to 3.000 bits per byte there, at most +0.125 on the 1 domains",
        "| code | 678 | 2.500 | 2.625 | +0.125 | 2.500 |",
        "| legal (new) | 678 | 3.500 | 3.000 | -0.500 | 3.500 |",
        "| legal | 1.000 | 0.500 |",
        "after adaptation (equal) | " + "ab" * 32,
        "| base model | 11 | 2,816 | 0.004 | 150 | 4.125 |",
        "not measured (interrupted)",
        "Energy: not measured",
    ):
        assert figure in card, figure


def test_the_head_is_yaml_the_hub_can_read():
    head = yaml.safe_load(run_card(report()).split("---\n")[1])
    assert head["library_name"] == "transformers"
    assert "moe" in head["tags"]
    assert "model-index" not in head, "figures on private text are no benchmark results"


def test_a_router_that_changed_would_show():
    adapter = REPORT["adapter"] | {"router_sha256_after": "cd" * 32}
    assert "after adaptation (DIFFERENT)" in run_card(report(adapter=adapter))


def test_a_sample_cannot_close_its_block_or_run_as_a_template():
    card = run_card(report())
    assert "````text\na ```fence``` b\n````" in card
    assert "{{ 7 * 7 }}" in card


HOSTILE = {
    "<script>": r"\<script\>",
    "a|b": r"a\|b",
    "a\nb\n# c": r"a b \# c",
    "`x`": r"\`x\`",
    "[x](http://y)": r"\[x\](http://y)",
    "snake_case": "snake_case",
    "_emphasis_": r"\_emphasis\_",
    "back\\slash": r"back\\slash",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_cells_hold_no_markup(text):
    assert cell(text) == HOSTILE[text]


def test_a_missing_value_reads_not_measured_and_numbers_align():
    text = table(["name", "value"], [("a", 1_234), ("b", None), ("c", 0.5)])
    assert text.split("\n") == [
        "| name | value |",
        "| --- | ---: |",
        "| a | 1,234 |",
        f"| b | {NOT_MEASURED} |",
        "| c | 0.500 |",
    ]


@pytest.mark.parametrize("text", ["plain", "```", "a````b", "`"])
def test_a_fence_is_longer_than_any_in_the_text(text):
    opening, *_, closing = fenced(text).split("\n")
    assert closing not in text
    assert opening == closing + "text"


def test_metadata_is_dumped_not_formatted():
    evil = "x\nlicense: mit"
    values = dict.fromkeys(
        [
            "title",
            "summary",
            "quickstart_code",
            "facts",
            "evaluation",
            "evaluation_note",
            "routing",
            "routing_note",
            "training",
            "data",
            "sample",
            "limits",
            "command",
            "versions",
            "date",
        ],
        "",
    )
    card = render_card(values, metadata={"model_name": evil, "language": evil})
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {"model_name": evil, "language": evil}


def test_a_missing_name_is_refused():
    with pytest.raises(ValueError, match="lacks a value: 'title' is undefined"):
        render_card({}, metadata={})


def test_without_jinja_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'pip install "hf-moe\[recipes\]"'):
        run_card(report())
