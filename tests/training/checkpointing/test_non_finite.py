"""A run that diverges stops at that step, before anything is saved, and names the rows."""

import traceback

import pytest
import torch
from transformers import TrainerCallback

from hf_moe.training.checkpointing.non_finite import NonFiniteError, non_finite_weight
from safe_runs import ROWS, make_trainer, train
from tiny_moe import hf_moe_model, with_expert_lora

POISON = 63


def poisoned(row):
    """The rows with a token in row `row` whose embedding is NaN; the model for it."""
    rows = ROWS.clamp(max=POISON - 1)
    rows[row, 3] = POISON
    model = hf_moe_model(num_hidden_layers=1)

    def spoil(module, args, output):
        return output.masked_fill((args[0] == POISON)[..., None], float("nan"))

    model.model.embed_tokens.register_forward_hook(spoil)
    return rows, model


@pytest.mark.parametrize(("workers", "strategy"), [(0, "random"), (0, "sequential"), (2, "random")])
def test_the_row_is_named(workers, strategy, tmp_path):
    """Steps of 2 micro-batches of 2 rows."""
    rows, model = poisoned(13)
    with pytest.raises(NonFiniteError) as found:
        train(
            tmp_path,
            model=model,
            rows=rows,
            max_steps=10,
            dataloader_num_workers=workers,
            train_sampling_strategy=strategy,
        )
    assert 13 in found.value.rows
    assert len(found.value.rows) == 2
    if strategy == "sequential":
        assert (found.value.step, found.value.micro_batches, found.value.rows) == (4, (1,), (12, 13))
        assert found.value.checkpoint == str(tmp_path / "checkpoint-2")
        assert str(found.value) == (
            "the loss is nan in micro-batch 1 of 2 (rows 12, 13 of the training data) at step 4: training has "
            f"diverged, and nothing of it was saved; {found.value.checkpoint!r} is from before and good. Look at the "
            "data of this step, or lower the learning rate."
        )
    # lets the workers go: the garbage collector would end them in an order in which each is waited for 5 s
    traceback.clear_frames(found.tb)


def test_the_row_is_named_after_a_resume(tmp_path):
    rows, model = poisoned(17)
    train(tmp_path, model=model, rows=rows, train_sampling_strategy="sequential", max_steps=4)
    rows, model = poisoned(17)
    with pytest.raises(NonFiniteError) as found:
        train(tmp_path, resume=True, model=model, rows=rows, train_sampling_strategy="sequential", max_steps=6)
    assert (found.value.step, found.value.micro_batches, found.value.rows) == (5, (1,), (16, 17))


def test_no_sampler_no_rows(tmp_path):
    rows, model = poisoned(0)
    trainer = make_trainer(tmp_path, model=model, rows=rows, max_steps=10, train_sampling_strategy="sequential")

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data[i] for i in range(len(data)))

    data, trainer.train_dataset = trainer.train_dataset, Stream()
    with pytest.raises(NonFiniteError, match=r"nan in micro-batch 1 of 2 at step 1: .* no checkpoint had been saved"):
        trainer.train()


class Spoil(TrainerCallback):
    """From step 2 on: infinite gradients with a finite loss, or a weight that overflows."""

    def __init__(self, what):
        self.what = what

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.what == "gradient" and state.global_step == 1:
            model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.what == "weight" and state.global_step == 2:
            with torch.no_grad():
                model.lm_head.weight[5, 5] = float("inf")


def test_infinite_gradients_stop_before_the_optimizer(tmp_path):
    model = hf_moe_model(num_hidden_layers=1)
    with pytest.raises(
        NonFiniteError, match=r"gradient norm is (nan|inf), though the losses are finite .* at step 2:"
    ):
        train(tmp_path, model=model, callbacks=[Spoil("gradient")])
    assert non_finite_weight(model) is None
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    with pytest.raises(NonFiniteError, match=r"the weight 'lm_head.weight' has values that are NaN .* at step 2"):
        train(tmp_path, callbacks=[Spoil("weight")])
    assert list(tmp_path.iterdir()) == []


def test_frozen_weights_are_not_looked_at():
    model = with_expert_lora(hf_moe_model())
    name, parameter = next((n, p) for n, p in model.named_parameters() if not p.requires_grad)
    parameter.data.flatten()[0] = float("nan")
    assert non_finite_weight(model) is None
    parameter.requires_grad_(True)
    assert non_finite_weight(model) == name
