"""The balancing losses weigh the same however a batch is cut: gradient accumulation and several processes.

With models of transformers they do not: a balancing loss is added as it is to a cross entropy that was divided by the
items of the whole step, so it counts once for each micro-batch and process (the control below).
"""

import json
from pathlib import Path

import pytest
import torch
from one_step import one_step

from torchrun import torchrun

WORKER = Path(__file__).with_name("one_step.py")
# coefficients that make the balancing losses as large as the cross entropy
LOUD = {"router_aux_loss_coef": 1.0, "router_z_loss_coef": 1.0}
# float32 sums in another order, over gradients of size about 0.1
CLOSE = {"atol": 2e-6, "rtol": 1e-4}


def assert_same_step(actual, expected):
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("scope", ["layer", "global_batch"])
@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_gradient_accumulation_is_one_large_batch(tmp_path, scope, accumulation):
    options = {"kind": "same", "balance_scope": scope, **LOUD}
    expected = one_step(str(tmp_path), batch_size=8, accumulation=1, **options)
    actual = one_step(str(tmp_path), batch_size=8 // accumulation, accumulation=accumulation, **options)
    assert_same_step(actual, expected)


def test_the_losses_are_not_negligible_here(tmp_path):
    """The comparison above must be able to fail: without the balancing losses the step is another one."""
    with_losses = one_step(str(tmp_path), kind="same", batch_size=8, accumulation=1, **LOUD)
    without = one_step(
        str(tmp_path), kind="same", batch_size=8, accumulation=1, router_aux_loss_coef=0.0, router_z_loss_coef=0.0
    )
    name = "model.layers.0.mlp.gate.weight"
    difference = (with_losses[name] - without[name]).abs().max()
    assert difference > 1000 * CLOSE["atol"]


def test_control_the_native_loss_depends_on_accumulation(tmp_path):
    expected = one_step(str(tmp_path), kind="same", batch_size=8, accumulation=1, native=True)
    actual = one_step(str(tmp_path), kind="same", batch_size=2, accumulation=4, native=True)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_step(actual, expected)


def test_micro_batches_count_with_their_items(tmp_path):
    """Different rows with unevenly masked targets: the z-loss of a row counts with the row's targets."""
    options = {"kind": "uneven", "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    assert_same_step(
        one_step(str(tmp_path), batch_size=1, accumulation=8, **options),
        one_step(str(tmp_path), batch_size=8, accumulation=1, **options),
    )
    options = {"kind": "different", "router_aux_loss_coef": 0.0, "router_z_loss_coef": 1.0}
    assert_same_step(
        one_step(str(tmp_path), batch_size=1, accumulation=8, **options),
        one_step(str(tmp_path), batch_size=8, accumulation=1, **options),
    )


def two_processes(folder: Path, **options) -> dict[str, torch.Tensor]:
    folder.mkdir()
    torchrun(WORKER, str(folder), json.dumps(options))
    return torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["layer", "global_batch"])
def test_two_processes_are_one_large_batch(tmp_path, scope):
    options = {"kind": "same", "balance_scope": scope, **LOUD}
    expected = one_step(str(tmp_path), batch_size=8, accumulation=1, **options)
    assert_same_step(two_processes(tmp_path / "two", batch_size=2, accumulation=2, **options), expected)


@pytest.mark.slow
def test_global_batch_counts_span_processes(tmp_path):
    """Different rows on each process: the load is that of both, so it differs from balancing each process alone."""
    options = {"kind": "different", "router_aux_loss_coef": 1.0}
    # one process over all 8 rows: the same counts; the mean of the scores is linear, so the gradient is the same
    expected = one_step(str(tmp_path), batch_size=8, accumulation=1, **options)
    scopes = {
        scope: two_processes(tmp_path / scope, batch_size=4, accumulation=1, balance_scope=scope, **options)
        for scope in ("layer", "global_batch")
    }
    assert_same_step(scopes["global_batch"], expected)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_step(scopes["layer"], expected)
