"""Two tiny models on the same texts: metrics against those computed by hand, and the page."""

import copy
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from hf_moe.adapters.load_adapter import AdapterError
from hf_moe.comparison.models import compare_measurements
from hf_moe.comparison.page import render, write_page
from hf_moe.comparison.routing_agreement import record_choices
from hf_moe.comparison.run import ModelChoice, compare_models, load_model
from hf_moe.comparison.table import print_comparison
from hf_moe.comparison.text_probe import TextProbe
from hf_moe.evaluation.bits_per_byte import bits_per_byte
from hf_moe.evaluation.errors import EvaluationError
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.observability.thresholds import RoutingThresholds
from tiny_moe import hf_moe_model, qwen_model, tiny_tokenizer, words

TEXTS = {"one": [words(60, seed=1), words(40, seed=2)], "two": [words(50, seed=3)]}
WINDOW = 32


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def model(**overrides):
    return hf_moe_model(vocab_size=300, num_hidden_layers=2, **overrides)


def disturbed(base, layer=1):
    """Another router in one layer."""
    new = copy.deepcopy(base)
    with torch.no_grad():
        moe_layers(new)[layer].router.weight += 0.05 * torch.randn(8, 32)
    return new


@pytest.fixture(scope="module")
def probe(tokenizer):
    return TextProbe(TEXTS, tokenizer, window=WINDOW, time_it=False)


@pytest.fixture(scope="module")
def measured(probe):
    torch.manual_seed(0)
    base = model()
    return probe.measure(base), probe.measure(disturbed(base))


@pytest.fixture(scope="module")
def comparison(measured):
    return compare_measurements(*measured, ("base <b>", "new & 'old'"))


def test_the_same_model_differs_in_nothing(measured):
    metrics = compare_measurements(measured[0], measured[0]).metrics()
    same = ("agreement.min", "agreement.mean", "overlap.min")
    none = ("load_shift.max", "newly_dead_experts", "bits_per_byte.all", "weight_drift.experts.max")
    assert [metrics[name].value for name in same] == [1.0] * 3
    assert [metrics[name].value for name in none] == [0.0] * 4


def test_metrics_match_those_taken_singly(probe, tokenizer, measured, comparison):
    torch.manual_seed(0)
    base = model()
    new = disturbed(base)
    changes = {}
    for name, documents in TEXTS.items():
        options = {"window": WINDOW, "stride": WINDOW // 2}
        values = [bits_per_byte(one, tokenizer, documents, **options).value for one in (base, new)]
        changes[name] = values[1] - values[0]
    metrics = comparison.metrics()
    for name, change in changes.items():
        assert metrics[f"bits_per_byte.domain.{name}"].value == pytest.approx(change, abs=1e-6)
    worst = max(changes, key=changes.get)
    assert metrics["bits_per_byte.worst_domain"].value == pytest.approx(changes[worst], abs=1e-6)
    assert metrics["bits_per_byte.worst_domain"].note == worst
    assert 0 < metrics["agreement.min"].value < 1
    assert metrics["agreement.min"].note == "model.layers.1.mlp"
    assert comparison.routing.layers[0].agreement == 1.0  # before the disturbed router
    assert metrics["weight_drift.router.max"].note == "model.layers.1.mlp"
    assert "latency.all" not in metrics


def test_agreement_is_that_of_recorded_choices(tokenizer):
    torch.manual_seed(0)
    base = model()
    new = disturbed(base, layer=0)
    text = words(20)
    probe = TextProbe({"one": [text]}, tokenizer, window=64, time_it=False)
    found = compare_measurements(probe.measure(base), probe.measure(new)).by_domain["one"]
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert 64 < len(ids) <= 96
    windows = [torch.tensor([ids[begin : begin + 64]]) for begin in (0, 32)]
    for layer, compared in enumerate(found.layers):
        same = count = 0
        for rows in windows:
            before, after = (record_choices(one, rows).experts[layer].tolist() for one in (base, new))
            same += sum(set(one) == set(two) for one, two in zip(before, after, strict=True))
            count += len(before)
        assert compared.agreement == same / count


def test_other_numbers_of_experts_compare_what_is_left(probe, measured):
    comparison = compare_measurements(measured[0], probe.measure(model(num_experts=4, num_experts_per_tok=1)))
    metrics = comparison.metrics()
    assert metrics["agreement.min"].value is None
    assert metrics["weight_drift.experts.max"].value is None
    assert metrics["bits_per_byte.all"].value is not None
    assert any("number of experts differs (8 and 4)" in reason for reason in comparison.left_out)
    assert any("weights differ in shape" in reason for reason in comparison.left_out)
    page = render(comparison)
    assert "number of experts differs" in page
    print_comparison(comparison)
    verdict = RoutingThresholds.parse(["agreement.min >= 0.5", "bits_per_byte.all <= +9"]).judge(metrics)
    assert [failed.check.line for failed in verdict.failures] == [1]


def test_other_families_and_tokenizers(probe, measured):
    torch.manual_seed(0)
    other = qwen_model()
    other.resize_token_embeddings(300)
    comparison = compare_measurements(measured[0], probe.measure(other))
    assert comparison.routing.layers[0].agreement is not None
    again = TextProbe(TEXTS, tiny_tokenizer(290), window=WINDOW, time_it=False, take_weights=False)
    comparison = compare_measurements(measured[0], again.measure(model()))
    assert comparison.metrics()["agreement.min"].value is None
    assert any("their tokenizers differ" in reason for reason in comparison.left_out)
    assert comparison.metrics()["load_shift.max"].value is not None


def test_old_names_still_work(probe, measured, comparison):
    for old in (comparison.figures, comparison.routing.figures, lambda: probe.figures(*measured)):
        with pytest.warns(FutureWarning, match=r"\.figures is now called \w+\.metrics"):
            found = old()
        assert found["agreement.min"] == comparison.metrics()["agreement.min"]


def test_a_subclass_that_overrides_the_old_name_is_refused():
    """The rollback callback called `metrics`, and the override had no effect."""
    with pytest.raises(TypeError, match=r"Mine\.figures would never be called: rename it"):
        type("Mine", (TextProbe,), {"figures": lambda self, base, new: {}})
    type("Renamed", (TextProbe,), {"metrics": lambda self, base, new: {}})


def test_different_texts_are_refused(tokenizer, measured):
    other = TextProbe({"one": TEXTS["one"]}, tokenizer, window=WINDOW, time_it=False, take_weights=False)
    with pytest.raises(EvaluationError, match="measured on different texts"):
        compare_measurements(measured[0], other.measure(model()))
    with pytest.raises(EvaluationError, match="the domain 'empty' has no text"):
        TextProbe({"empty": [""]}, tokenizer)
    with pytest.raises(EvaluationError, match="no text to measure on"):
        TextProbe({}, tokenizer)


def test_a_model_of_nan_fails_every_threshold(probe, measured):
    broken = model()
    with torch.no_grad():
        broken.lm_head.weight[0] = float("nan")
    comparison = compare_measurements(measured[0], probe.measure(broken))
    assert not RoutingThresholds.parse(["bits_per_byte.worst_domain <= +9"]).judge(comparison.metrics()).passed
    json.dumps(comparison.to_dict(), allow_nan=False)
    assert "not finite" in render(comparison)
    print_comparison(comparison)


def test_models_are_loaded_one_after_the_other(tmp_path, tokenizer):
    base = model()
    for name, one in (("base", base), ("new", disturbed(base))):
        one.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    seen = []
    choices = (ModelChoice(str(tmp_path / "base")), ModelChoice(str(tmp_path / "new"), dtype="bfloat16"))
    comparison = compare_models(*choices, TEXTS, on_progress=lambda *step: seen.append(step))
    assert comparison.names == ("base", "new in bfloat16")
    total = sum(len(text.encode()) for documents in TEXTS.values() for text in documents)
    for position in (0, 1):
        assert sum(num_bytes for where, _, num_bytes in seen if where == position) == total
    record = comparison.to_dict()
    assert [one["dtype"] for one in record["models"]] == ["float32", "bfloat16"]
    assert record["window"] == 128  # the models' context
    assert all(value > 0 for value in record["domains"]["one"]["milliseconds_per_1k_tokens"])
    assert str(tmp_path) not in json.dumps(record)


def test_what_cannot_be_loaded_is_refused(tmp_path, tokenizer):
    with pytest.raises(EvaluationError, match="the dtype must be one of auto, float32"):
        ModelChoice("x", dtype="int4")
    model().save_pretrained(tmp_path / "bare")
    bare = ModelChoice(str(tmp_path / "bare"))
    with pytest.raises(EvaluationError, match=r"has no tokenizer that loads .* with --tokenizer"):
        compare_models(bare, bare, TEXTS)
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-3" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"has no adapter_config.json.*such as .*checkpoint-3"):
        load_model(ModelChoice(str(tmp_path / "bare"), adapter=str(tmp_path / "run")))
    dense = model(mlp_only_layers=[0, 1])
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(EvaluationError, match="has no MoE layer"):
        load_model(ModelChoice(str(tmp_path / "dense")))


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_names_stay_text(measured, tmp_path):
    hostile = ("<script>alert(1)</script>", "a\u202eb\"'><img src=x onerror=alert(1)>")
    comparison = compare_measurements(*measured, hostile)
    verdict = RoutingThresholds.parse(["agreement.min >= 0.99", "dead_experts <= 99"], "</title><b>gate.yaml").judge(
        comparison.metrics()
    )
    write_page(tmp_path / "page.html", comparison, verdict)
    page = (tmp_path / "page.html").read_text()
    parsed = _Tags()
    parsed.feed(page)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "img", "b", "iframe", "link"}
    assert not any(key.startswith("on") or key in ("src", "style") for _, attrs in parsed.tags for key in attrs)
    assert "\u202e" not in page
    assert "Thresholds failed: 1 of 2 checks hold." in parsed.text
    assert "<script>alert(1)</script>" in parsed.text
    assert len(re.findall(r"expert 7: ", page)) == 2 * 2  # loads and drifts of two layers
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert render(comparison, verdict) == page
