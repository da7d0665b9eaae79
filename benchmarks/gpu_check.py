"""The first minutes on a GPU: is every kernel right, how fast, which tiles are better, where does the time go?

    python benchmarks/gpu_check.py --output "$OUT" --seconds 440        torch for CUDA, triton, transformers and peft
    python benchmarks/gpu_check.py --output OUT --tiny                  the same code on a CPU, in Triton's interpreter

Four stages, in this order: check, times, sweep, profile. Each runs in processes of its own and until its share of the
time is over, so that a crash (an illegal access, a device assertion) costs one part; every result is written when it
is there, and what is wrong is not timed. After them come the GPU tests: python -m pytest tests/kernels -m gpu -n 4.

What is written: facts, checks, experts_cuda (times: the file of benchmarks/experts.py), sweep, profile (.json), and
summary.txt, which says which prediction (gpu_checks/predictions.json) a measurement lies outside of. Exits with 1 if
something is wrong. hf_moe need not be installed.

After it, --tiles sm_90 runs nothing: it writes OUTPUT/sm_90.json, that device's tile table after sweep.json.
"""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # hf_moe need not be installed; the tests know what is right
if "--tiny" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from benchmarks.gpu_checks.command import parser, run  # noqa: E402

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # who stops the run gets its summary, as with Ctrl-C
    sys.exit(run(parser(__doc__).parse_args()))
