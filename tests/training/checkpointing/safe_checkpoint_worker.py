"""Two processes: rank 0 alone seals, SIGTERM to one process ends both at one step, and they resume exactly.

Under DistributedConfig, which resumes nothing, SIGTERM saves the weights, and resuming is refused.

torchrun --nproc_per_node 2 safe_checkpoint_worker.py FOLDER
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.distributed import DistributedConfig

from hf_moe.training.checkpointing import safe_checkpoint
from hf_moe.training.checkpointing.checkpoints import CheckpointError, flaw, seal
from hf_moe.training.checkpointing.non_finite import NonFiniteError
from hf_moe.training.checkpointing.termination import EXIT_CODE, RESUMABLE, Terminated
from safe_runs import assert_same, make_trainer, state
from tiny_moe import hf_moe_model


class SigtermInRank1(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class PoisonRank1(TrainerCallback):
    """NaN in the weights' gradients, from one process's rows only."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            model.lm_head.register_forward_hook(lambda module, inputs, output: output * float("nan"))


def run(folder, resume=None, callbacks=()):
    trainer = make_trainer(folder, callbacks=callbacks, gradient_accumulation_steps=1)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def without_resuming(root: Path) -> None:
    if dist.get_rank() == 0:
        hf_moe_model(num_hidden_layers=2).save_pretrained(root / "model")
    dist.barrier()
    layout = DistributedConfig(fsdp_size=2)
    model = AutoModelForCausalLM.from_pretrained(root / "model", distributed_config=layout)
    settings = {"model": model, "callbacks": [SigtermInRank1()], "save_strategy": "no"}
    trainer = make_trainer(root / "own", gradient_accumulation_steps=1, **settings)
    with pytest.raises(Terminated) as stopped:
        trainer.train()
    assert stopped.value.code == 143
    saved = root / "own" / "checkpoint-4"
    assert stopped.value.checkpoint == str(saved)
    assert flaw(saved) is None
    assert not [path.name for path in saved.iterdir() if path.name.startswith(("optimizer", "scheduler", "rng"))]
    assert not (root / "own" / RESUMABLE).exists()
    code = [path.name for path in (root / "model").glob("*.py")]
    assert sorted(path.name for path in saved.glob("*.py")) == sorted(code)  # and none of torch's FSDP
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert loaded.config.auto_map == AutoConfig.from_pretrained(root / "model").auto_map
    for (name, expected), actual in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(actual, expected.full_tensor()), name
    with pytest.raises(CheckpointError, match="does not resume a model that DistributedConfig sharded"):
        trainer.train(resume_from_checkpoint=True)
    trainer.args.load_best_model_at_end = True
    with pytest.raises(ValueError, match="load_best_model_at_end must be off"):
        trainer.train()


def main(root: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    sealed = []
    safe_checkpoint.seal = lambda folder: (sealed.append(folder), seal(folder))
    whole = run(root / "whole")
    assert len(sealed) == (3 if dist.get_rank() == 0 else 0)
    folder = root / "parts"
    with pytest.raises(Terminated) as stopped:
        run(folder, callbacks=[SigtermInRank1()])
    assert stopped.value.code == EXIT_CODE
    steps = [stopped.value.checkpoint]
    # the flag is read a step later, at the same step everywhere
    gathered = [None, None]
    dist.all_gather_object(gathered, steps)
    assert gathered == [[str(folder / "checkpoint-4")]] * 2, gathered
    assert flaw(folder / "checkpoint-4") is None
    assert sorted(path.name for path in (folder / "checkpoint-4").glob("rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    assert (folder / RESUMABLE).read_text() == "checkpoint-4\n"
    resumed = run(folder, resume=True)
    dist.barrier()
    assert not (folder / RESUMABLE).exists()
    assert resumed.began == 4
    assert_same(state(resumed), state(whole))
    with pytest.raises(NonFiniteError) as diverged:
        run(root / "nan", callbacks=[PoisonRank1()])
    assert diverged.value.step == 3
    assert bool(diverged.value.micro_batches) == (dist.get_rank() == 1)
    assert len(diverged.value.rows) == 2
    if hasattr(Trainer, "_sync_replicated_trainable_parameters"):  # not there in transformers 5.17
        without_resuming(root)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
