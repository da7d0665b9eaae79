"""The gradient of one optimizer step is that of the formula, however the step is cut; in float64, on four families."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer

from balanced_step import LENGTH, ROWS, arguments, model_of, one_step, rows
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.models.modeling_hf_moe import HfMoeForSequenceClassification
from hf_moe.training.balancing.config import SCOPES
from hf_moe.training.balancing.mixin import BalancingConfig, BalancingMixin
from hf_moe.training.trainer import MoeTrainer
from tiny_hf_moe import tiny_config
from torchrun import torchrun

WORKER = Path(__file__).parents[2] / "balanced_step.py"
SCORES = {"qwen3_moe": "softmax", "hf_moe": "softmax", "deepseek_v3": "sigmoid", "gpt_oss": "softmax"}
# DeepSeek-V3 routes in float32 whatever the dtype: gradients of size 0.1 to its rounding
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def assert_same(actual, expected):
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], **CLOSE, msg=lambda text, n=name: f"{n}: {text}")


def formula(family, cuts, scope="layer", aux=0.0, z=0.0, same=False):
    """The gradient of cross entropy plus the terms, by their definitions; `cuts`: rows of each micro-batch."""
    model = model_of(family).train()
    outputs = {}
    hooks = [
        layer.router.register_forward_hook(
            lambda module, args, output, name=layer.name: outputs.update({name: output})
        )
        for layer in moe_layers(model)
    ]
    table = {name: torch.stack([row[name] for row in rows(same)]) for name in rows()[0]}
    tokens, items = table["attention_mask"].sum(), (table["labels"][:, 1:] != -100).sum()
    seen, aux_mean, z_mean = {}, 0.0, 0.0
    for start, end in cuts:
        batch = {name: column[start:end] for name, column in table.items()}
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        loss = F.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        mask = batch["attention_mask"].bool()
        share = mask.sum() / tokens
        a, b = terms(family, outputs, mask, scope, seen)
        aux_mean, z_mean = aux_mean + float(a * share), z_mean + float(b * share)
        (loss / items + share * (aux * a + z * b)).backward()
    for hook in hooks:
        hook.remove()
    gradient = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return gradient, aux_mean, z_mean


def terms(family, outputs, mask, scope, seen):
    balance, z = [], []
    for name, output in outputs.items():
        logits, index = output[0].double(), output[2]
        flat = mask.flatten()
        scores = logits.softmax(-1) if SCORES[family] == "softmax" else logits.sigmoid()
        probability = scores / scores.sum(-1, keepdim=True)
        experts = logits.shape[-1]
        chosen = F.one_hot(index, experts).sum(1).double()
        if scope == "sequence":
            total = 0
            for row in range(len(mask)):
                here = torch.zeros_like(mask)
                here[row] = mask[row]
                here = here.flatten()
                load = chosen[here].sum(0) / chosen[here].sum()
                total = total + experts * (load * probability[here].mean(0)).sum() * here.sum()
            balance.append(total / flat.sum())
        else:
            counts = chosen[flat].sum(0)
            if scope == "global_batch":
                counts = seen[name] = seen.get(name, 0) + counts
            balance.append(experts * (counts / counts.sum() * probability[flat].mean(0)).sum())
        z.append(logits[flat].logsumexp(-1).square().mean())
    return torch.stack(balance).mean(), torch.stack(z).mean()


def cut(batch_size):
    return [(start, start + batch_size) for start in range(0, ROWS, batch_size)]


LOUD = {"aux_loss_coef": 1.0, "z_loss_coef": 0.3}


@pytest.mark.parametrize("scope", ["layer", "global_batch", "sequence"])
@pytest.mark.parametrize(("family", "batch_size"), [("qwen3_moe", 8), ("qwen3_moe", 2), ("deepseek_v3", 2)])
def test_the_gradient_and_the_log_are_those_of_the_formula(tmp_path, family, batch_size, scope):
    trainer, actual = one_step(tmp_path, family, batch_size, ROWS // batch_size, {**LOUD, "aux_loss_scope": scope})
    expected, aux, z = formula(family, cut(batch_size), scope, aux=1.0, z=0.3)
    assert_same(actual, expected)
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["moe/aux_loss"] == pytest.approx(aux, rel=1e-5)
    assert log["moe/z_loss"] == pytest.approx(z, rel=1e-5)


def test_the_terms_are_not_negligible_here(tmp_path):
    expected, _, _ = formula("qwen3_moe", cut(8))
    for loud in ({"aux": 1.0}, {"z": 0.3}):
        other, _, _ = formula("qwen3_moe", cut(8), **loud)
        with pytest.raises(AssertionError, match="not close"):
            assert_same(other, expected)


@pytest.mark.parametrize(
    ("family", "scope", "same"),
    [
        ("hf_moe", "sequence", False),
        ("hf_moe", "layer", True),
        ("hf_moe", "global_batch", True),
        ("gpt_oss", "sequence", False),
    ],
)
def test_accumulation_is_one_large_batch(tmp_path, family, scope, same):
    """Sequence balance and the z-loss for any rows; the others where micro-batches are loaded as the whole step is."""
    balancing = {**LOUD, "aux_loss_scope": scope}
    _, whole = one_step(tmp_path, family, 8, 1, balancing, same)
    _, cut_up = one_step(tmp_path, family, 2, 4, balancing, same)
    assert_same(cut_up, whole)


def test_a_loss_that_the_trainer_divides_by_the_micro_batches(tmp_path):
    """Heads that take no num_items_in_batch: their loss is divided after compute_loss, the terms are not."""

    def step(batch_size):
        torch.manual_seed(0)
        config = tiny_config(router_aux_loss_coef=0.0, router_z_loss_coef=0.0, num_labels=3)
        model = HfMoeForSequenceClassification(config).double()
        model.set_experts_implementation("eager")
        data = [{**row, "labels": torch.tensor(number % 3)} for number, row in enumerate(rows())]
        trainer = MoeTrainer(
            model,
            arguments(tmp_path, batch_size, ROWS // batch_size),
            train_dataset=data,
            balancing=BalancingConfig(**LOUD, aux_loss_scope="sequence"),
        )
        trainer.train()
        return dict(model.named_parameters())

    assert_same(step(2), step(8))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", SCORES)
def test_gradient_checkpointing_changes_nothing(tmp_path, family, scope):
    """Also where the first run of a layer has no gradients; two micro-batches a step, one backward each."""
    balancing = {**LOUD, "aux_loss_scope": scope}
    names = ("moe/aux_loss", "moe/z_loss", "moe/max_violation", "moe/load_entropy")

    def logged(trainer):
        return [[log[name] for name in names] for log in trainer.state.log_history if "loss" in log]

    plain, expected = one_step(tmp_path, family, 4, 2, balancing)
    for reentrant in (False, True):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        recomputed, actual = one_step(tmp_path, family, 4, 2, balancing, **options)
        assert_same(actual, expected)
        assert logged(recomputed) == logged(plain)


class HalvesTrainer(Trainer):
    """Runs the model twice before each backward, the first rows last: as preference losses do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = len(inputs["input_ids"])
        halves = [{name: value[rows] for name, value in inputs.items()} for rows in torch.arange(batch).chunk(2)]
        outputs = [model(**half, num_items_in_batch=num_items_in_batch) for half in reversed(halves)]
        return sum(output.loss for output in outputs)


class BalancedHalvesTrainer(BalancingMixin, HalvesTrainer):
    pass


@pytest.mark.parametrize("family", ["qwen3_moe", "hf_moe"])
def test_two_reentrant_forwards_before_one_backward(tmp_path, family):
    """Each recomputation takes the gradient of its own forward."""

    def step(**options):
        model = model_of(family)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        balancing = BalancingConfig(**LOUD, aux_loss_scope="sequence")
        args = arguments(tmp_path, 4, 2, **options)
        BalancedHalvesTrainer(model, args, train_dataset=rows(), balancing=balancing).train()
        return {name: before[name] - value.detach() for name, value in model.named_parameters()}

    reentrant = step(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert_same(reentrant, step())


def two_processes(folder: Path, **options):
    folder.mkdir()
    torchrun(WORKER, str(folder), json.dumps(options))
    return torch.load(folder / "step.pt", weights_only=True)


@pytest.mark.slow
def test_two_processes_are_one_large_batch(tmp_path):
    """Different rows with different padding on each process: load, losses, biases and logs are those of all rows.

    The sequential sampler gives each process every other row, so micro-batches differ; with one for the whole step
    the counts are exact in both.
    """
    balancing = {**LOUD, "aux_loss_scope": "global_batch", "bias_update_rate": 0.01}
    trainer, expected = one_step(tmp_path, "deepseek_v3", 8, 1, balancing)
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    found = two_processes(tmp_path / "two", family="deepseek_v3", batch_size=4, accumulation=1, balancing=balancing)
    assert_same(found["gradient"], expected)
    for name, bias in trainer.model.named_buffers():
        if "correction" in name:
            assert bias.any()
            assert torch.equal(found["buffers"][name], bias)
    for name in ("loss", "moe/aux_loss", "moe/z_loss", "moe/max_violation", "moe/bias_range"):
        assert found["log"][name] == pytest.approx(log[name], rel=1e-5), name


def test_rows_are_uneven():
    masks = torch.stack([row["attention_mask"] for row in rows()])
    assert len(set(masks.sum(-1).tolist())) > 2
    assert masks.shape == (ROWS, LENGTH)
