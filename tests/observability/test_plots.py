"""Plots need no display, are the same bytes for the same figures, and name the extra if matplotlib is absent."""

import sys

import pytest
import torch

from hf_moe.observability.plots import plot_bits_per_byte, plot_expert_load, plot_loss

LOG = [{"step": step, "loss": 5.0 / step, "moe/max_violation": 1.5} for step in range(1, 9)]
BITS = {"before": {"code": 2.0, "docs": 3.0}, "after": {"code": 2.1, "docs": 2.5}}
LOADS = {name: [torch.arange(1, 9), torch.ones(8)] for name in ("code", "docs", "legal")}
PLOTS = {
    "loss": lambda path: plot_loss(path, {"Base model": LOG, "Adapter": [{"step": 1, "loss": 2.0}]}),
    "bits": lambda path: plot_bits_per_byte(path, BITS, new_domain="docs"),
    "load": lambda path: plot_expert_load(path, LOADS),
    "one_layer": lambda path: plot_expert_load(path, {"code": [torch.ones(40)]}),
    "different_sizes": lambda path: plot_expert_load(path, {"code": [torch.ones(4), torch.ones(8), torch.ones(6)]}),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_a_png_and_repeats_exactly(name, tmp_path):
    for copy in ("a", "b"):
        PLOTS[name](tmp_path / f"{copy}.png")
    first, second = ((tmp_path / f"{copy}.png").read_bytes() for copy in ("a", "b"))
    assert first.startswith(b"\x89PNG")
    assert len(first) > 5_000
    assert first == second


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "hf-moe\[recipes\]"'):
        PLOTS["loss"](tmp_path / "loss.png")
