"""Training under thresholds: scripted measurements for what it does, one real probe for that it works."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_moe.comparison.text_probe import TextProbe
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.observability.thresholds import MetricValue, RoutingThresholds, ThresholdsError
from hf_moe.training.rollback import BEST_FOLDER, STATE, RollbackCallback, _restore
from tiny_hf_moe import random_ids
from tiny_moe import hf_moe_model, tiny_tokenizer, with_expert_lora, words

CHECKS = ["agreement.min >= 0.5"]


class Script:
    """A probe whose metrics are written down: agreement and the change of bits per byte, in the order of use."""

    def __init__(self, *metrics):
        self.metrics_to_come = list(metrics)
        self.weights = []
        self.bases = []

    def measure(self, model):
        self.weights.append(weights(model))
        return len(self.weights)

    def metrics(self, base, new):
        self.bases.append(base)
        agreement, bits = self.metrics_to_come.pop(0)
        return {"agreement.min": MetricValue(agreement), "bits_per_byte.all": MetricValue(bits)}


def weights(model):
    return torch.cat([parameter.detach().flatten() for _, parameter in sorted(model.named_parameters())])


def trainer_of(tmp_path, callback, model=None, steps=4, **settings):
    rows = [{"input_ids": row, "labels": row} for row in random_ids(64)]
    defaults = {"save_steps": 1, "max_steps": steps, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, **{**defaults, **settings})
    model = hf_moe_model(num_hidden_layers=1) if model is None else model
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=[callback])


def verdicts(trainer):
    return [(record["step"], record["gate_passed"]) for record in trainer.state.log_history if "gate_passed" in record]


def test_a_failure_restores_the_best_that_passed(tmp_path):
    # at steps 0, 1, 2 (best), 3 (worse), 4 (fails)
    probe = Script((1, 0), (0.9, -0.1), (0.9, -0.3), (0.9, -0.2), (0.1, -0.9))
    callback = RollbackCallback(RoutingThresholds.parse(CHECKS), probe)
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    assert verdicts(trainer) == [(0, True), (1, True), (2, True), (3, True), (4, False)]
    assert callback.best_step == 2
    # measured: the base, then steps 0 to 4
    assert torch.equal(weights(trainer.model), probe.weights[3])
    assert not torch.equal(probe.weights[4], probe.weights[3])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / BEST_FOLDER)
    assert torch.equal(weights(saved), probe.weights[3])
    record = json.loads((tmp_path / BEST_FOLDER / "gate.json").read_text())
    assert (record["step"], record["best_value"], record["passed"]) == (2, -0.3, True)
    # what the Trainer saved at the failing step is what was restored
    at_the_end = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(weights(at_the_end), probe.weights[3])


def test_the_optimizer_goes_back_and_the_schedule_continues(tmp_path):
    probe = Script((1, 0), (0.9, -0.1), (0.1, 0))
    callback = RollbackCallback(RoutingThresholds.parse(CHECKS), probe)
    trainer = trainer_of(tmp_path, callback, steps=2, lr_scheduler_type="linear")
    trainer.train()
    state = trainer.optimizer.state_dict()
    assert {float(entry["step"]) for entry in state["state"].values()} == {1.0}
    assert state["param_groups"][0]["lr"] == 0.0


def test_training_stops_after_failures_in_a_row(tmp_path):
    probe = Script((1, 0), (0.1, 0), (0.9, 0), (0.1, 0), (0.1, 0), (0.9, 0))
    callback = RollbackCallback(RoutingThresholds.parse(CHECKS), probe, stop_after=2)
    trainer = trainer_of(tmp_path, callback, steps=9)
    trainer.train()
    assert verdicts(trainer) == [(0, True), (1, False), (2, True), (3, False), (4, False)]
    failures = [record["gate_failures"] for record in trainer.state.log_history if "gate_failures" in record]
    assert failures[-1] == ["line 1: agreement.min >= 0.5: measured 0.1"]


def test_nothing_to_go_back_to_is_logged(tmp_path, caplog):
    probe = Script((0.1, 0), (0.1, 0), (0.1, 0))
    callback = RollbackCallback(RoutingThresholds.parse(CHECKS), probe)
    trainer = trainer_of(tmp_path, callback, steps=2)
    trainer.train()
    assert callback.failures_in_a_row == 2
    assert torch.equal(weights(trainer.model), probe.weights[-1])
    assert "the model that training starts from does not pass" in caplog.text
    assert "nothing has passed yet" in caplog.text
    assert not (tmp_path / BEST_FOLDER).exists()


def test_metrics_may_be_relative_to_the_best(tmp_path):
    probe = Script((1, 0), (0.9, -0.1), (0.9, 0.1), (0.9, -0.1))
    callback = RollbackCallback(RoutingThresholds.parse(CHECKS), probe, against="best")
    trainer_of(tmp_path, callback, steps=3).train()
    # measurement 1 is the base, 2 to 5 steps 0 to 3
    assert probe.bases == [1, 2, 3, 3]
    assert callback.best_step == 3


def test_evaluations_are_judged_once(tmp_path):
    probe = Script(*[(1, 0)] * 3)
    callback = RollbackCallback(RoutingThresholds.parse(CHECKS), probe)
    trainer = trainer_of(tmp_path, callback, steps=2, eval_strategy="steps", eval_steps=1, save_steps=2)
    trainer.train()
    assert [step for step, _ in verdicts(trainer)] == [0, 1, 2]


def test_a_resumed_adapter_run_keeps_its_best(tmp_path):
    def adapted():
        return with_expert_lora(hf_moe_model(num_hidden_layers=1))

    first = Script((1, 0), (0.9, -0.5), (0.9, 0))
    trainer_of(tmp_path, RollbackCallback(RoutingThresholds.parse(CHECKS), first), adapted(), steps=2).train()
    second = Script((0.1, 0))
    callback = RollbackCallback(RoutingThresholds.parse(CHECKS), second)
    trainer = trainer_of(tmp_path, callback, adapted(), steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.best_step == 1
    # the base, step 0, then step 1
    assert torch.equal(weights(trainer.model), first.weights[2])


def test_what_is_frozen_stays_frozen_and_other_tensors_are_refused(tmp_path):
    model = with_expert_lora(hf_moe_model(num_hidden_layers=1))
    frozen = next(p for name, p in model.named_parameters() if "lora_" in name).requires_grad_(False)
    callback = RollbackCallback(RoutingThresholds.parse(CHECKS), Script((1, 0), (0.9, 0)))
    trainer_of(tmp_path, callback, model, steps=1).train()
    assert not frozen.requires_grad  # PEFT makes all trainable when its adapters come back
    frozen.requires_grad_(True)
    with pytest.raises(ValueError, match="holds other tensors than the model trains now"):
        _restore(tmp_path / BEST_FOLDER / STATE, model, None)


def test_a_resumed_whole_model_needs_its_reference(tmp_path):
    trainer_of(tmp_path, RollbackCallback(RoutingThresholds.parse(CHECKS), Script(*[(1, 0)] * 3)), steps=2).train()
    callback = RollbackCallback(RoutingThresholds.parse(CHECKS), Script((1, 0)))
    with pytest.raises(ValueError, match=r"resumes at step 1: .* Pass reference=probe.measure\(model\)"):
        trainer_of(tmp_path, callback, steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_strategy": "no"}, "Set save_steps or eval_steps"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}, "Set it to False"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, message):
    trainer = trainer_of(tmp_path, RollbackCallback(RoutingThresholds.parse(CHECKS), Script()), **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_old_names_still_work(tmp_path):
    class Old:
        def measure(self, model):
            return None

        def figures(self, base, new):
            return {"agreement.min": MetricValue(1.0)}

    with pytest.warns(FutureWarning, match="gate is now called thresholds"):
        callback = RollbackCallback(gate=RoutingThresholds.parse(CHECKS), probe=Old())
    with pytest.warns(FutureWarning, match=r"Old\.figures of a probe is now called metrics"):
        trainer_of(tmp_path, callback, steps=1).train()
    assert callback.best_step == 1
    with (
        pytest.warns(FutureWarning, match="gate is now called thresholds"),
        pytest.raises(TypeError, match="multiple values for keyword argument 'thresholds'"),
    ):
        RollbackCallback(gate="a", thresholds="b", probe=Old())


def test_bad_arguments_are_refused(tmp_path):
    (tmp_path / "gate.yaml").write_text("checks: [agreement.min >= 2]")
    with pytest.raises(ThresholdsError, match="can never hold"):
        RollbackCallback(tmp_path / "gate.yaml", Script())
    with pytest.raises(ValueError, match="stop_after must be at least 1, got 0"):
        RollbackCallback(RoutingThresholds.parse(CHECKS), Script(), stop_after=0)
    with pytest.raises(ValueError, match="against must be 'base' or 'best', got 'last'"):
        RollbackCallback(RoutingThresholds.parse(CHECKS), Script(), against="last")


def test_a_real_probe_finds_a_spoilt_router(tmp_path):
    """At step 2 the router is broken from outside; what training ends with routes as at step 1."""
    tokenizer = tiny_tokenizer()
    model = hf_moe_model(num_hidden_layers=1, vocab_size=300)
    router = moe_layers(model)[0].router
    probe = TextProbe({"words": [words(60)]}, tokenizer, window=32, time_it=False, take_weights=False)
    callback = RollbackCallback(RoutingThresholds.parse(["agreement.min >= 0.5", "bits_per_byte.all <= +1"]), probe)

    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                router.weight.data.neg_()

    trainer = trainer_of(tmp_path, Spoil(), model, steps=2, learning_rate=1e-4)
    trainer.add_callback(callback)
    trainer.train()
    assert verdicts(trainer) == [(0, True), (1, True), (2, False)]
    after = probe.metrics(callback.reference, probe.measure(trainer.model))
    assert after["agreement.min"].value > 0.9
