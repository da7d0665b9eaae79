"""Kill a training run (SIGKILL) at every step of a save and at random times: it must resume to the same weights.

    python tests/killed_runs.py --points 6 --random 2 --groups 1       prints JSON

One parent imports the libraries once and forks a child for every run; it never trains itself. A save's steps are found
by listening in the child: Python's audit events for files and folders below the output folder, `os.fsync`, and the
writers of torch and safetensors, which are also killed with half of their file written.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from transformers import TrainerCallback

from hf_moe.training.checkpointing.checkpoints import flaw
from hf_moe.training.checkpointing.termination import EXIT_CODE
from safe_runs import SAVE_EVERY, STEPS, make_trainer, state

KILLED_SAVE = 4
NEVER = 10**9
_PEEK = os.WEXITED | os.WNOHANG | os.WNOWAIT
FILE_EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")


class KillInSave(TrainerCallback):
    """SIGKILL before the `at`-th step of the save of `KILLED_SAVE`; all steps are written to `log`."""

    def __init__(self, folder: Path, at: int, log: Path | None = None):
        self.folder, self.at, self.log = str(folder), at, log
        self.events: list[str] = []
        self.armed = False

    def on_train_begin(self, args, state, control, **kwargs):
        sys.addaudithook(self._audit)
        os.fsync = self._wrap(os.fsync, "fsync")
        torch.save = self._halving(torch.save, lambda value, file, *rest, **more: file)
        safetensors.torch.serialize_file = self._halving(
            safetensors.torch.serialize_file, lambda tensors, file, *rest, **more: file
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.armed = state.global_step == KILLED_SAVE

    def on_step_begin(self, args, state, control, **kwargs):
        if self.armed and self.log is not None:
            self.armed = False
            self.log.write_text(json.dumps(self.events))

    def step(self, name: str, half: Callable[[], None] = lambda: None) -> None:
        if not self.armed:
            return
        self.events.append(name)
        if len(self.events) == self.at + 1:
            self.armed = False
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event, arguments):
        if self.armed and event in FILE_EVENTS and str(arguments[0]).startswith(self.folder):
            self.step(f"{event} {Path(str(arguments[0])).name}")

    def _wrap(self, function, name):
        def wrapped(*args, **kwargs):
            self.step(name)
            return function(*args, **kwargs)

        return wrapped

    def _halving(self, function, path_of):
        def wrapped(*args, **kwargs):
            path = Path(path_of(*args, **kwargs))
            self.step(f"write {path.name}")
            result = function(*args, **kwargs)
            self.step(f"half of {path.name}", lambda: os.truncate(path, path.stat().st_size // 2))
            return result

        return wrapped


class Announce(TrainerCallback):
    """Creates a file when training begins."""

    def __init__(self, file: Path):
        self.file = file

    def on_train_begin(self, args, state, control, **kwargs):
        self.file.touch()


def child(
    work: Callable[[], None],
    kill_after: float | None = None,
    number: int = signal.SIGKILL,
    begun: Path | None = None,
) -> int:
    """Run `work` in a forked process of its own group; its exit code, negative if a signal ended it.

    Args:
        kill_after: Seconds until the group gets the signal `number`; counted from when `begun` is there, if given.
    """
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        code = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            work()
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after is not None:
        while begun is not None and not begun.exists() and os.waitid(os.P_PID, pid, _PEEK) is None:
            time.sleep(0.001)
        time.sleep(kill_after)
        with suppress(ProcessLookupError):  # it may have ended
            os.killpg(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(folder: Path, result: Path, *callbacks: TrainerCallback, workers: int = 0) -> None:
    """Resume if there is something to resume, and keep weights, optimizer and the step it began at."""
    trainer = make_trainer(folder, callbacks=callbacks, dataloader_num_workers=workers)
    trainer.train(resume_from_checkpoint="auto")
    torch.save({"began": trainer.began, "state": state(trainer)}, result)


class Runs:
    def __init__(self, root: Path):
        self.root = root
        self.expected = self.finish(root / "whole")["state"]
        # what a later run takes: the first one also loads what all of them need
        begin, begun = time.perf_counter(), root / "begun"
        assert child(lambda: train(root / "timed", root / "unused.pt", Announce(begun))) == 0
        self.seconds = time.perf_counter() - begin
        self.training_seconds = time.time() - begun.stat().st_mtime
        begun.unlink()

    def finish(self, folder: Path, workers: int = 0) -> dict:
        result = folder.with_name(folder.name + ".pt")
        code = child(lambda: train(folder, result, workers=workers))
        if code != 0:
            raise RuntimeError(f"{folder.name} did not resume: exit code {code}")
        return torch.load(result)

    def judge(self, folder: Path, at_least: int, workers: int = 0) -> dict:
        """Resume a killed run. Raises if it cannot, begins too early, or ends with other values."""
        found = self.finish(folder, workers)
        same = found["state"].keys() == self.expected.keys() and all(
            torch.equal(found["state"][name], value) for name, value in self.expected.items()
        )
        left = [path.name for path in folder.iterdir()]
        whole = left == [f"checkpoint-{STEPS}"] and flaw(folder / left[0]) is None
        if not (same and whole and found["began"] >= at_least):
            raise RuntimeError(f"{folder.name}: same {same}, began at {found['began']}, left {left}")
        shutil.rmtree(folder)
        return {"resumed_from": found["began"], "identical": same}

    def steps_of_a_save(self) -> list[str]:
        folder, log = self.root / "steps", self.root / "steps.json"
        assert child(lambda: train(folder, self.root / "steps.pt", KillInSave(folder, NEVER, log))) == 0
        return json.loads(log.read_text())

    def kill_in_save(self, at: int, name: str) -> dict:
        folder = self.root / f"point-{at}"
        code = child(lambda: train(folder, self.root / "unused.pt", KillInSave(folder, at)))
        assert code == -signal.SIGKILL, f"{name}: exit code {code}"
        # the checkpoint before the killed one is there, whatever happened
        return {"killed": f"before step {at + 1} of a save", "step": name} | self.judge(
            folder, KILLED_SAVE - SAVE_EVERY
        )

    def kill_at_random(self, rng: random.Random, number: int) -> dict:
        """Up to three kills one after another, the later ones while it resumes. The first hits for sure."""
        folder = self.root / f"random-{number}"
        times, codes = [], [0]
        while codes == [0]:  # it had ended before
            shutil.rmtree(folder, ignore_errors=True)
            times = [rng.uniform(0, self.seconds)]
            codes = [child(lambda: train(folder, self.root / "unused.pt"), times[0])]
        for after in [rng.uniform(0, self.seconds) for _ in range(rng.randint(0, 2))]:
            times.append(after)
            codes.append(child(lambda: train(folder, self.root / "unused.pt"), after))
        assert set(codes) <= {0, -signal.SIGKILL}, codes
        killed = {"killed": "at random times", "seconds": [round(t, 3) for t in times], "exit_codes": codes}
        return killed | self.judge(folder, 0)

    def terminate_group(self, rng: random.Random, number: int) -> dict:
        """SIGTERM to the run and the workers of its DataLoader at once, as a scheduler does, while it trains."""
        folder, begun, code = self.root / f"group-{number}", self.root / "begun", 0
        while code in (0, -signal.SIGTERM):  # it had trained its last step before
            shutil.rmtree(folder, ignore_errors=True)
            begun.unlink(missing_ok=True)
            after = rng.uniform(0, self.training_seconds)
            work = partial(train, folder, self.root / "unused.pt", Announce(begun), workers=2)
            code = child(work, after, signal.SIGTERM, begun)
        assert code == EXIT_CODE, code
        killed = {"killed": "SIGTERM to the group", "seconds": round(after, 3), "exit_code": code}
        return killed | self.judge(folder, 1, workers=2)


def spread(count: int, total: int) -> list[int]:
    """`count` of `total` positions, evenly; all if there are fewer."""
    return (
        sorted({round(i * (total - 1) / max(1, count - 1)) for i in range(count)})
        if count < total
        else list(range(total))
    )


def kill_runs(points: int, randoms: int, groups: int, seed: int = 0) -> dict:
    """Raises RuntimeError or AssertionError at the first run that does not survive."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        runs = Runs(Path(root))
        steps = runs.steps_of_a_save()
        killed = [runs.kill_in_save(at, steps[at]) for at in spread(points, len(steps))]
        killed += [runs.kill_at_random(rng, number) for number in range(randoms)]
        killed += [runs.terminate_group(rng, number) for number in range(groups)]
    return {"steps_of_a_save": steps, "runs": killed}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for option in ("points", "random", "groups"):
        parser.add_argument(f"--{option}", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(kill_runs(options.points, options.random, options.groups), indent=1))
