"""Run a worker script in two processes of this machine, as `torchrun` does.

They are forked from a server that has imported what they need once: in new interpreters the imports took longer than
the work.
"""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import sys
from pathlib import Path

PROCESSES = 2
TIMEOUT = 280
_PRELOADED = [
    "torch.distributed",
    "transformers.trainer",
    "peft",
    "hf_moe.training.trainer",
    "hf_moe.adapters.expert_lora",
]


def torchrun(worker: Path, *arguments: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    port = _free_port()
    processes = [
        context.Process(target=_run, args=(str(worker), arguments, rank, port), daemon=True)
        for rank in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    _wait_for_all(processes)


def _wait_for_all(processes: list[multiprocessing.Process]) -> None:
    """One that fails ends the others, which would wait for it."""
    running = {process.sentinel: process for process in processes}
    while running:
        ended = multiprocessing.connection.wait(running, TIMEOUT)
        failed = [running[sentinel].exitcode for sentinel in ended if running[sentinel].exitcode != 0]
        if failed or not ended:
            for process in processes:
                process.kill()
            raise AssertionError(f"a worker ended with {failed[0]}" if failed else f"no end within {TIMEOUT} s")
        for sentinel in ended:
            del running[sentinel]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _run(worker: str, arguments: tuple[str, ...], rank: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    sys.argv = [worker, *arguments]
    sys.path.insert(0, str(Path(worker).parent))
    runpy.run_path(worker, run_name="__main__")
