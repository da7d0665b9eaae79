"""Plots need no display, are the same bytes for the same values, and name the extra if matplotlib is absent."""

import re
import sys
from dataclasses import replace

import pytest
import torch

from hf_moe.io.installation import install_command
from hf_moe.observability.plots import (
    plot_bits_per_byte,
    plot_expert_load,
    plot_layer_load,
    plot_load_histograms,
    plot_loss,
)
from tiny_report import sample_report

LOG = [{"step": step, "loss": 5.0 / step, "moe/max_violation": 1.5} for step in range(1, 9)]
BITS = {"before": {"code": 2.0, "docs": 3.0}, "after": {"code": 2.1, "docs": 2.5}}
LOADS = {name: [torch.arange(1, 9), torch.ones(8)] for name in ("code", "docs", "legal")}
LAYERS = sample_report(experts=(4, 16, 8), top_k=1, tokens=30).layers  # with dead experts
LABELS = ["layer 0", "layer 1", "layer 2"]
PLOTS = {
    "loss": lambda path: plot_loss(path, {"Base model": LOG, "Adapter": [{"step": 1, "loss": 2.0}]}),
    "bits": lambda path: plot_bits_per_byte(path, BITS, new_domain="docs"),
    "load": lambda path: plot_expert_load(path, LOADS),
    "one_layer": lambda path: plot_expert_load(path, {"code": [torch.ones(40)]}),
    "different_sizes": lambda path: plot_expert_load(path, {"code": [torch.ones(4), torch.ones(8), torch.ones(6)]}),
    "unseen_domain": lambda path: plot_expert_load(path, {"a": [torch.ones(4)], "b": [torch.zeros(4)]}, ["layer 7"]),
    "layer_load": lambda path: plot_layer_load(path, LAYERS, LABELS),
    "histograms": lambda path: plot_load_histograms(path, LAYERS, LABELS),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_a_png_and_repeats_exactly(name, tmp_path):
    for copy in ("a", "b"):
        PLOTS[name](tmp_path / f"{copy}.png")
    first, second = ((tmp_path / f"{copy}.png").read_bytes() for copy in ("a", "b"))
    assert first.startswith(b"\x89PNG")
    assert len(first) > 5_000
    assert first == second


def test_no_link_is_written_through(tmp_path):
    (tmp_path / "theirs").write_text("kept")
    (tmp_path / "loss.png").symlink_to("theirs")
    PLOTS["loss"](tmp_path / "loss.png")
    assert (tmp_path / "theirs").read_text() == "kept"


@pytest.mark.parametrize("name", ["layer_load", "histograms"])
def test_a_plot_can_be_svg_with_text_that_can_be_read(name, tmp_path):
    for copy in ("a", "b"):
        PLOTS[name](tmp_path / f"{copy}.svg")
    first, second = ((tmp_path / f"{copy}.svg").read_text() for copy in ("a", "b"))
    assert first == second
    assert ">layer 1</text>" in first


def test_a_dead_expert_is_black_in_the_layers_plot(tmp_path):
    from matplotlib.image import imread

    def share_of_black(layer):
        plot_layer_load(tmp_path / "plot.png", [layer], ["layer"])
        return float((imread(tmp_path / "plot.png")[:, :, :3].max(-1) == 0).mean())

    alive = sample_report(experts=(8,), tokens=800).layers[0]
    counts = alive.counts.clone()
    counts[:4] = 0
    dead = replace(alive, counts=counts)
    assert share_of_black(dead) > share_of_black(alive) + 0.1


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape(install_command("recipes"))):
        PLOTS["loss"](tmp_path / "loss.png")
