"""What the callbacks log is what the routers did; a collapse is named with its layer and stops what it should."""

import dataclasses
import logging

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from collapsed_routers import neighbours, steer, tiny, tokens
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.layers.watch_routing import watch_routing
from hf_moe.training.routing_metrics import CollapseCallback, RoutingMetricsCallback
from tiny_models import build_tiny

ROWS = tokens(rows=64)
KEYS = {"load_cv", "load_cv_max", "max_violation", "load_entropy", "load_entropy_min", "dead_experts"}


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, position):
        return {"input_ids": ROWS[position], "labels": ROWS[position]}


def train(model, folder, *callbacks, lr=0.0, before=lambda trainer: None, resume=None, **options):
    """Plain Trainer: 4 steps of 8 rows, a log at each."""
    settings = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 8, "report_to": "none"}
    arguments = TrainingArguments(
        folder, learning_rate=lr, use_cpu=True, disable_tqdm=True, **{"save_strategy": "no", **settings, **options}
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=list(callbacks))
    before(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_the_log_holds_the_balance_of_the_steps(tmp_path):
    model, _ = build_tiny("olmoe")
    counted = {layer.name: torch.zeros(layer.num_experts) for layer in moe_layers(model)}

    def count(event):
        if event.layer.experts.training:
            counted[event.layer.name] += torch.bincount(event.index.flatten(), minlength=event.layer.num_experts)

    with watch_routing(model, count):
        trainer = train(model, tmp_path, RoutingMetricsCallback(), max_steps=3, logging_steps=3)
    (entry,) = logs(trainer)
    variations = [float(counts.std(correction=0) / counts.mean()) for counts in counted.values()]
    assert entry["moe/load_cv"] == pytest.approx(sum(variations) / len(variations))
    assert entry["moe/load_cv_max"] == pytest.approx(max(variations))
    assert {f"moe/{key}" for key in KEYS} < set(entry)
    assert 0 < entry["moe/router_entropy"] <= 1
    assert entry["moe/router_grad_norm"] > 0


def test_each_log_counts_from_the_start_and_evaluation_is_left_out(tmp_path):
    model, _ = build_tiny("olmoe")
    seen = []

    class Spy(RoutingMetricsCallback):
        def take(self):
            taken = super().take()
            seen.append(taken[0].tokens)
            return taken

    train(model, tmp_path, Spy(), gradient_accumulation_steps=2)
    assert seen == [2 * 8 * 32] * 4


def test_checkpointing_does_not_count_twice(tmp_path):
    model, _ = build_tiny("olmoe")
    plain = logs(train(model, tmp_path, RoutingMetricsCallback()))
    for reentrant in (False, True):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        again = logs(train(model, tmp_path, RoutingMetricsCallback(), **options))
        assert [entry["moe/load_cv"] for entry in again] == [entry["moe/load_cv"] for entry in plain]


def test_attached_it_reaches_those_who_report(tmp_path):
    reported = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    model, _ = build_tiny("olmoe")
    train(model, tmp_path, Reporter(), before=RoutingMetricsCallback().attach)
    assert all("moe/load_cv" in entry for entry in reported if "loss" in entry)


def test_tensorboard_gets_them(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model, _ = build_tiny("olmoe")
    attach = RoutingMetricsCallback().attach
    train(model, tmp_path, before=attach, report_to="tensorboard")
    (events,) = tmp_path.rglob("events.out.tfevents*")
    accumulator = event_accumulator.EventAccumulator(str(events)).Reload()
    assert any(tag.endswith("moe/load_cv") for tag in accumulator.Tags()["scalars"])


# ---- collapse


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name.endswith("routing_metrics")]


class Collapse(TrainerCallback):
    """Sends every layer's tokens to experts of its own from the second step on."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            steer(model, [neighbours(2 * position) for position in range(len(moe_layers(model)))], 12)


@pytest.mark.parametrize("family", ["olmoe", "hf_moe"])
def test_a_collapse_stops_the_training_with_layer_and_cause(family, tmp_path, caplog):
    model = tiny(family)
    layers = moe_layers(model)
    callback = CollapseCallback("stop", patience=2)
    trainer = train(model, tmp_path, callback, Collapse(), per_device_train_batch_size=16)
    assert trainer.state.global_step == 3
    assert callback.baseline == {}
    assert (callback.health.verdict, callback.health.pattern) == ("collapsed", "own_expert")
    (message,) = messages(caplog)
    assert "routing at step 3, training stops" in message
    assert all(f"layer {position}: " in message for position in range(len(layers)))
    assert "Likely cause" in message


def test_a_base_that_is_skewed_is_judged_by_what_gets_worse(tmp_path, caplog):
    model = tiny("olmoe")
    names = [layer.plain_name for layer in moe_layers(model)]
    options = {"per_device_train_batch_size": 16, "save_strategy": "steps", "save_steps": 2}
    callback = CollapseCallback("stop", patience=1)
    callback.take = lambda take=callback.take: [skewed(layer) for layer in take()]
    train(model, tmp_path, callback, max_steps=2, **options)
    assert callback.health.healthy
    assert list(callback.baseline) == names
    (message,) = messages(caplog)
    assert "skewed since the start, not judged unless it gets worse: model.layers.0.mlp" in message
    # what a checkpoint kept is what a resumed run judges by
    resumed = CollapseCallback("stop", patience=1)
    resumed.take = lambda take=resumed.take: [skewed(layer, others=0) for layer in take()]
    trainer = train(model, tmp_path, resumed, resume=str(tmp_path / "checkpoint-2"), **options)
    assert resumed.baseline == callback.baseline
    assert trainer.state.global_step == 3
    assert "worse than at the start" in messages(caplog)[-1]


def skewed(layer, others=4):
    """Nearly all tokens at experts 0 and 1."""
    counts = torch.full_like(layer.counts, others)
    counts[:2] = (layer.counts.sum() - counts[2:].sum()) // 2
    return dataclasses.replace(layer, counts=counts)


def test_a_warning_goes_on(tmp_path, caplog):
    model = tiny("olmoe")
    steer(model, [neighbours(6)] * len(moe_layers(model)), -12)
    trainer = train(model, tmp_path, CollapseCallback("stop", patience=1), per_device_train_batch_size=16)
    assert trainer.state.global_step == 4
    assert all("Some experts are dead" in message for message in messages(caplog))
    assert len(messages(caplog)) == 4


def test_a_healthy_training_says_nothing(tmp_path, caplog):
    callback = CollapseCallback("stop", patience=1)
    train(tiny("olmoe"), tmp_path, callback, per_device_train_batch_size=16)
    assert callback.health.healthy
    assert messages(caplog) == []


def test_few_tokens_are_gathered_until_they_suffice(tmp_path):
    judged = []

    class Spy(CollapseCallback):
        def _judge(self, seen):
            judged.append(seen[0].tokens)
            return super()._judge(seen)

    # 100 assignments for each of 8 experts, 2 for each token: 400 tokens are 4 rows of 32 in 4 logs
    train(tiny("olmoe"), tmp_path, Spy(), per_device_train_batch_size=4)
    assert judged == [4 * 4 * 32]


def test_router_weights_that_are_not_finite_stop_at_once(tmp_path, caplog):
    model = tiny("olmoe")

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                moe_layers(model)[1].router.weight.data[0, 0] = float("nan")

    callback = CollapseCallback("stop", patience=3)
    trainer = train(model, tmp_path, Spoil(), callback)
    assert trainer.state.global_step == 2
    assert [finding.layer for finding in callback.health.findings] == ["model.layers.1.mlp"]
    assert caplog.records[-1].levelno == logging.ERROR


@pytest.mark.parametrize(("action", "patience"), [("halt", 1), ("stop", 0)])
def test_bad_arguments(action, patience):
    with pytest.raises(ValueError, match="must be"):
        CollapseCallback(action, patience)
