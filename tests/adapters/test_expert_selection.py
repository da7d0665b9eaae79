"""Chosen experts as a value: by hand, in files that cannot be trusted, and beside another model."""

import json
from dataclasses import replace

import pytest

from hf_moe.adapters.expert_selection import ExpertSelection, LayerSelection
from hf_moe.adapters.select_experts import select_experts
from hf_moe.layers.moe_layers import moe_layers
from tiny_hf_moe import random_ids
from tiny_moe import hf_moe_model


@pytest.fixture
def selection():
    return select_experts(hf_moe_model(), list(random_ids(3, 9)), budget=0.4, progress=False)


def test_a_selection_survives_a_file(selection, tmp_path):
    selection.save(tmp_path / "folder" / "experts.json")
    assert ExpertSelection.load(tmp_path / "folder" / "experts.json") == selection
    assert ExpertSelection.from_dict(json.loads(json.dumps(selection.to_dict()))) == selection


def test_the_share_counts_parameters(selection):
    model = hf_moe_model()
    experts = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
    per_expert = sum(parameter[0].numel() for parameter in experts) // len(moe_layers(model))
    chosen = sum(len(layer.experts) for layer in selection.layers.values())
    assert selection.num_parameters == chosen * per_expert
    assert selection.share == pytest.approx(chosen * per_expert / sum(p.numel() for p in experts))


def test_experts_can_be_chosen_by_hand():
    model = hf_moe_model()
    selection = ExpertSelection.from_experts(model, {"model.layers.1.mlp": [5, 2, 5]})
    assert [layer.experts for layer in selection.layers.values()] == [(), (2, 5), ()]
    assert ExpertSelection.from_dict(selection.to_dict()) == selection
    with pytest.raises(ValueError, match=r"no MoE layer 'layers.9'. It has 'model.layers.0.mlp'"):
        ExpertSelection.from_experts(model, {"layers.9": [0]})
    with pytest.raises(ValueError, match=r"must lie in \[0, 7\]"):
        ExpertSelection.from_experts(model, {"model.layers.1.mlp": [8]})


NAME = "model.layers.0.mlp"


def spoil(values, path, value):
    *parents, last = path
    for key in parents:
        values = values[key]
    if value is None:
        del values[last]
    else:
        values[last] = value


HOSTILE = {
    "another format": (["format"], 2, "format must be 1, got 2"),
    "boolean format": (["format"], True, "must not be of type bool"),
    "no budget": (["budget"], None, "has the fields"),
    "extra field": (["code"], "import os", "has the fields"),
    "budget out of range": (["budget"], 3.0, "budget must be in"),
    "NaN budget": (["budget"], float("nan"), "budget must be in"),
    "unknown method": (["method"], "x" * 500, "method must be one of"),
    "negative tokens": (["num_tokens"], -1, "num_tokens must be at least 0"),
    "layers as list": (["layers"], [], "must not be of type list"),
    "no layers": (["layers"], {}, "at least one layer"),
    "layer as list": (["layers", NAME], [1], "has the fields"),
    "too large id": (["layers", NAME, "experts"], [8], "must lie in"),
    "negative id": (["layers", NAME, "experts"], [-1, 2], "must lie in"),
    "repeated id": (["layers", NAME, "experts"], [1, 1], "ascend without repetition"),
    "descending ids": (["layers", NAME, "experts"], [2, 1], "ascend without repetition"),
    "boolean id": (["layers", NAME, "experts"], [True], "must be integers"),
    "id as text": (["layers", NAME, "experts"], ["1"], "must be integers"),
    "huge id": (["layers", NAME, "experts"], [10**400], "must lie in"),
    "no experts": (["layers", NAME, "num_experts"], 0, "must be at least 1"),
    "short scores": (["layers", NAME, "scores"], [1.0], "scores must be 8 values"),
    "negative score": (["layers", NAME, "scores"], [-1.0] * 8, "finite and at least 0"),
    "infinite score": (["layers", NAME, "scores"], [float("inf")] * 8, "finite and at least 0"),
    "huge score": (["layers", NAME, "scores"], [10**400] * 8, "too large"),
    "score as text": (["layers", NAME, "scores"], ["0.1"] * 8, "must be numbers"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(selection, tmp_path, case):
    path, value, message = HOSTILE[case]
    values = selection.to_dict()
    spoil(values, path, value)
    file = tmp_path / "experts.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        ExpertSelection.load(file)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, "\udcff"])
def test_files_that_hold_something_else_are_refused(tmp_path, text):
    file = tmp_path / "experts.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"experts\.json' is no"):
        ExpertSelection.load(file)


def test_a_selection_of_another_model_is_refused(selection):
    with pytest.raises(ValueError, match=r"other MoE layers: 'model.layers.3.mlp' differs \(the selection lacks it\)"):
        selection.match(hf_moe_model(num_hidden_layers=4))
    with pytest.raises(ValueError, match=r"other MoE layers: 'model.layers.2.mlp' differs \(the model lacks it\)"):
        selection.match(hf_moe_model(num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"has 4 experts of 1536 parameters, the selection is for 8"):
        selection.match(hf_moe_model(num_experts=4))
    with pytest.raises(ValueError, match="experts of 768 parameters"):
        selection.match(hf_moe_model(moe_intermediate_size=8))


def test_the_plot_is_a_picture(selection, tmp_path):
    selection.plot(tmp_path / "plots" / "experts.png")
    assert (tmp_path / "plots" / "experts.png").read_bytes().startswith(b"\x89PNG")
    layer = next(iter(selection.layers.values()))
    mixed = replace(selection, layers={**selection.layers, "x": LayerSelection(4, 10, (1,), (0.25,) * 4)})
    assert len(layer.scores) == 8
    mixed.plot(tmp_path / "mixed.png")
    with pytest.raises(ValueError, match="no scores to draw"):
        ExpertSelection.from_experts(hf_moe_model(), {NAME: [1]}).plot(tmp_path / "none.png")


def test_it_prints_as_a_table():
    layer = LayerSelection(4, 100, (1, 3), (0.1, 0.3, 0.1, 0.5))
    text = str(ExpertSelection("gate", 0.8, 1234, {"model.layers.0.mlp": layer}))
    assert text.splitlines() == [
        "ExpertSelection(gate, budget 0.8, 1,234 tokens): 2 of 4 experts in 1 layer, 50.0% of the experts' parameters",
        "layer               experts  share of the routing  ids",
        "model.layers.0.mlp  2 of 4   80%                   1, 3",
    ]
