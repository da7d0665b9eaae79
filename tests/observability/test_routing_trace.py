"""A trace adds up what it is given, names it in metrics, and reads back only what it could have written."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_moe.observability.layer_statistics import LayerStatistics, empty_statistics
from hf_moe.observability.routing_trace import RoutingTrace

LAYERS = {"layers.0.mlp": 4, "layers.1.mlp": 3}


def statistics(name, counts, **values):
    counts = torch.tensor(counts)
    pairs = torch.zeros(len(counts), len(counts), dtype=torch.int64)
    return LayerStatistics(
        name,
        len(counts),
        2,
        counts=counts,
        **{
            "tokens": int(counts.sum()) // 2,
            "weight_mass": counts.double() / 2,
            "coactivation": pairs + torch.diag(counts),
            "dropped": None,
            **values,
        },
    )


def hand_made():
    trace = RoutingTrace([empty_statistics(name, size, 2) for name, size in LAYERS.items()], {"model_class": "Made"})
    known = {"scored_tokens": 5, "entropy_sum": 5 * math.log(4), "margin_sum": 1.0}
    trace.add([statistics("layers.0.mlp", [4, 4, 2, 0], **known), statistics("layers.1.mlp", [10, 0, 0])], "law")
    trace.add([statistics("layers.0.mlp", [0, 0, 0, 2]), statistics("layers.1.mlp", [0, 1, 1])], "code")
    trace.add([statistics("layers.0.mlp", [2, 2, 2, 0]), statistics("layers.1.mlp", [2, 2, 2])])
    return trace


def same(one, other):
    fields = vars(one).keys() - {"counts", "weight_mass", "coactivation"}
    tensors = all(torch.equal(getattr(one, field), getattr(other, field)) for field in ("counts", "weight_mass"))
    both = (one.coactivation, other.coactivation)
    pairs = torch.equal(*both) if None not in [type(x) if x is None else 0 for x in both] else both == (None, None)
    return tensors and pairs and all(getattr(one, field) == getattr(other, field) for field in fields)


def test_domains_add_up_to_all_tokens():
    trace = hand_made()
    assert trace.layers == list(LAYERS)
    assert trace.domains == ["law", "code"]
    assert trace.statistics("layers.0.mlp", "law").counts.tolist() == [4, 4, 2, 0]
    assert trace.statistics("layers.0.mlp").counts.tolist() == [6, 6, 4, 2]
    assert trace.part("layers.0.mlp", None).counts.tolist() == [2, 2, 2, 0]
    assert trace.statistics("layers.1.mlp").tokens == 9


def test_a_running_recording_is_read_when_the_trace_is():
    pending = [
        {"law": [statistics("a", [2, 2])]},
        {None: [statistics("a", [1, 1])]},
        {"law": [statistics("a", [4, 0])]},
    ]
    trace = RoutingTrace([empty_statistics("a", 2, 2)], {}, source=lambda: pending.pop(0))
    assert len(pending) == 3, "taken before anything was read"
    assert trace.domains == ["law"]
    assert trace.statistics("a").counts.tolist() == [3, 3]
    trace.end_recording()
    assert pending == []
    assert trace.source is None
    assert trace.statistics("a", "law").counts.tolist() == [6, 2]


def test_what_the_trace_lacks_is_refused():
    trace = hand_made()
    with pytest.raises(ValueError, match=r"no layer 'x'. Its layers: layers.0.mlp, layers.1.mlp"):
        trace.statistics("x")
    with pytest.raises(ValueError, match=r"no domain 'art'. Its domains: law, code"):
        trace.metrics("art")
    with pytest.raises(ValueError, match="no layer 'other'"):
        trace.add([statistics("other", [1, 1])])
    with pytest.raises(ValueError, match="different layers"):
        trace.add([statistics("layers.0.mlp", [1, 1])])
    with pytest.raises(ValueError, match="must have a name"), trace.domain(""):
        pass


def test_metrics_name_the_worst_layer():
    found = hand_made().metrics("law")
    assert found["tokens"] == 5
    assert found["max_violation/layers.1.mlp"] == found["max_violation/worst"] == 2
    assert found["max_violation/layers.0.mlp"] == pytest.approx(0.6)
    assert found["max_violation/mean"] == pytest.approx(1.3)
    assert found["load_entropy/worst"] == found["load_entropy/layers.1.mlp"] == 0
    assert (found["dead_experts/total"], found["dead_experts/layers.1.mlp"]) == (3, 2)
    assert found["router_entropy/mean"] == pytest.approx(1), "the mean is over the layers that know it"
    assert math.isnan(found["router_entropy/layers.1.mlp"])
    assert math.isnan(found["drop_share/mean"])


def test_a_row_for_each_layer_expert_and_domain():
    pytest.importorskip("pandas")
    table = hand_made().to_pandas()
    assert len(table) == 3 * (4 + 3)
    law = table[(table.domain == "law") & (table.layer == "layers.0.mlp")]
    assert law["count"].tolist() == [4, 4, 2, 0]
    assert law["share"].tolist() == [0.4, 0.4, 0.2, 0]
    assert law["weight_share"].tolist() == [0.4, 0.4, 0.2, 0]
    assert law["is_dead"].tolist() == [False, False, False, True]
    everything = table[table.domain.isna() & (table.layer == "layers.1.mlp")]
    assert everything["weight_mass"].tolist() == [6.0, 1.5, 1.5]


def test_a_saved_trace_comes_back_whole(tmp_path):
    trace = hand_made()
    trace.save(tmp_path / "trace")
    loaded = RoutingTrace.load(tmp_path / "trace")
    assert (loaded.layers, loaded.domains, loaded.model_facts) == (trace.layers, trace.domains, trace.model_facts)
    for domain in (None, "law", "code"):
        for name in LAYERS:
            assert same(loaded.statistics(name, domain), trace.statistics(name, domain))
            assert same(loaded.part(name, domain), trace.part(name, domain))
    loaded.save(tmp_path / "trace")  # an older trace may be replaced
    assert same(RoutingTrace.load(tmp_path / "trace").statistics("layers.0.mlp"), trace.statistics("layers.0.mlp"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace"]


def test_the_stored_format_stays(tmp_path):
    """Traces that users have must load: whoever changes one of these raises VERSION and still reads the old."""
    hand_made().save(tmp_path)
    manifest = json.loads((tmp_path / "trace.json").read_text())
    assert manifest == {
        "format": "hf_moe.routing_trace",
        "version": 1,
        "layers": [{"name": name, "num_experts": size, "top_k": 2} for name, size in LAYERS.items()],
        "domains": ["law", "code"],
        "model_facts": {"model_class": "Made"},
        "tokens": None,
    }
    tensors = load_file(tmp_path / "statistics.safetensors")
    fields = ("counts", "weight_mass", "totals", "sums", "coactivation")
    assert tensors.keys() == {f"{name}.{part}.{layer}" for name in fields for part in range(3) for layer in range(2)}
    assert tensors["counts.1.0"].tolist() == [4, 4, 2, 0]
    assert tensors["weight_mass.1.0"].tolist() == [2.0, 2.0, 1.0, 0.0]
    assert tensors["totals.1.0"].tolist() == [5, 0, -1, 5]
    assert tensors["sums.1.0"].tolist() == [5 * math.log(4), 1.0]
    assert {name.split(".")[0]: tensor.dtype for name, tensor in tensors.items()} == dict(
        zip(fields, (torch.int64, torch.float64, torch.int64, torch.float64, torch.int64), strict=True)
    )


def test_other_folders_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="no routing trace"):
        hand_made().save(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_an_interrupted_save_leaves_the_old_trace(tmp_path, monkeypatch):
    hand_made().save(tmp_path / "trace")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("hf_moe.observability.trace_files.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        RoutingTrace([empty_statistics("a", 2, 1)], {}).save(tmp_path / "trace")
    assert RoutingTrace.load(tmp_path / "trace").layers == list(LAYERS)


def test_a_trace_writes_its_page(tmp_path):
    pytest.importorskip("jinja2")
    hand_made().report(tmp_path / "routing.html", "My model")
    page = (tmp_path / "routing.html").read_text()
    assert "My model" in page
    assert "law" in page


def manifest_with(**changes):
    return lambda folder: (folder / "trace.json").write_text(
        json.dumps({**json.loads((folder / "trace.json").read_text()), **changes})
    )


def tensors_with(change):
    def damage(folder):
        tensors = load_file(folder / "statistics.safetensors")
        change(tensors)
        save_file(tensors, folder / "statistics.safetensors")

    return damage


def replaced(name, value):
    return tensors_with(lambda tensors: tensors.update({name: value}))


LAYER = {"name": "layers.0.mlp", "num_experts": 4, "top_k": 2}
DAMAGES = {
    "no JSON": (lambda folder: (folder / "trace.json").write_text("{"), "not valid JSON"),
    "NaN": (lambda folder: (folder / "trace.json").write_text('{"version": NaN}'), "not valid JSON"),
    "deep": (lambda folder: (folder / "trace.json").write_text("[" * 100_000), "not valid JSON"),
    "list": (lambda folder: (folder / "trace.json").write_text("[]"), "must hold a JSON object, got list"),
    "format": (manifest_with(format="other"), "does not say format"),
    "version": (manifest_with(version=2), "version 2"),
    "no layers": (manifest_with(layers=[]), "there must be one"),
    "layers": (manifest_with(layers={"a": 1}), "layers must be a list"),
    "twice": (manifest_with(layers=[LAYER, LAYER]), "different names"),
    "many experts": (manifest_with(layers=[{**LAYER, "num_experts": 2**40}]), r"num_experts must be an integer in"),
    # 6,000 such layers used to take 6.5 GB before the file of the numbers was opened
    "a bomb": (
        manifest_with(layers=[{"name": str(index), "num_experts": 65535, "top_k": 1} for index in range(20)]),
        r"statistics.safetensors has [\d,]+ bytes, and the layers need at least 62,913,600",
    ),
    "bool": (manifest_with(layers=[{**LAYER, "top_k": True}]), "top_k must be an integer"),
    "extra": (manifest_with(layers=[{**LAYER, "x": 1}]), "given by name, num_experts and top_k"),
    "domains": (manifest_with(domains=["law", "law"]), "different names"),
    "fewer domains": (manifest_with(domains=["law"]), "unexpected tensors"),
    "more domains": (manifest_with(domains=["law", "code", "art"]), "lacks totals.3.0"),
    "facts": (manifest_with(model_facts=[]), "model_facts must be an object"),
    "no tensors": (lambda folder: (folder / "statistics.safetensors").unlink(), "is missing"),
    "no safetensors": (
        lambda folder: (folder / "statistics.safetensors").write_bytes(b"\xff" * 9999),
        "cannot be read",
    ),
    "truncated": (
        lambda folder: (folder / "statistics.safetensors").write_bytes(
            (folder / "statistics.safetensors").read_bytes()[:-8]
        ),
        "cannot be read",
    ),
    "lacking": (tensors_with(lambda tensors: tensors.pop("counts.0.0")), r"lacks counts.0.0"),
    "shape": (replaced("counts.0.0", torch.tensor([6])), r"counts.0.0 must be \[4\]"),
    "dtype": (replaced("counts.0.0", torch.tensor([2.0, 2, 2, 0])), r"must be \[4\] torch.int64"),
    "negative": (replaced("counts.0.0", torch.tensor([8, -2, 0, 0])), "do not add up"),
    "sum": (replaced("counts.0.0", torch.tensor([2, 2, 2, 2])), "do not add up"),
    "weights": (replaced("weight_mass.0.0", torch.full((4,), torch.nan).double()), "not finite"),
    "entropy": (replaced("sums.0.0", torch.tensor([-1.0, 0]).double()), "must not be negative"),
    "scored": (replaced("totals.0.0", torch.tensor([3, 0, -1, 4])), "4 of them scored"),
    "dropped": (replaced("totals.0.0", torch.tensor([3, 0, 1, 0])), "1 slots dropped of 0"),
    "pairs": (replaced("coactivation.0.0", torch.ones(4, 4, dtype=torch.int64)), "symmetric"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_or_hostile_trace_is_refused(tmp_path, case):
    damage, message = DAMAGES[case]
    hand_made().save(tmp_path / "trace")
    damage(tmp_path / "trace")
    with pytest.raises(ValueError, match=message):
        RoutingTrace.load(tmp_path / "trace")


def test_no_trace_is_no_trace(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no routing trace"):
        RoutingTrace.load(tmp_path)
