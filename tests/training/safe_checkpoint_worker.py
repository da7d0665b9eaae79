"""Two processes: rank 0 alone seals, SIGTERM to one process ends both at one step, and they resume exactly.

torchrun --nproc_per_node 2 safe_checkpoint_worker.py FOLDER
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hf_moe.training import safe_checkpoint
from hf_moe.training.checkpoints import flaw, seal
from hf_moe.training.non_finite import NonFiniteError
from hf_moe.training.termination import EXIT_CODE, Terminated
from safe_runs import assert_same, make_trainer, state


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
    resumed = run(folder, resume=True)
    assert resumed.began == 4
    assert_same(state(resumed), state(whole))
    with pytest.raises(NonFiniteError) as diverged:
        run(root / "nan", callbacks=[PoisonRank1()])
    assert diverged.value.step == 3
    assert bool(diverged.value.micro_batches) == (dist.get_rank() == 1)
    assert len(diverged.value.rows) == 2
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
