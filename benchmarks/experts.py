"""How fast and how lean is each experts implementation?

    python benchmarks/experts.py                               the CPU plan, about 20 minutes on 2 cores
    python benchmarks/experts.py --device cuda                 the GPU plan
    python benchmarks/experts.py --experts 64 --tokens 1 16    a part of it
    python benchmarks/experts.py --readme                      plots, targets and the README's section from the results

Implementations run side by side on the same tensors, through the host's own interface: the experts module of a real
family, with `config._experts_implementation` set to each name. Each is compared with float64 first; one that is wrong
is not timed, and the command fails. Results are written after every case: the same command goes on after an
interruption, and measures again what was measured with other code.
"""

import argparse
import sys
from pathlib import Path

from expert_layers.command import run

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--experts", type=int, nargs="+", help="only layers with so many experts")
    parser.add_argument("--tokens", type=int, nargs="+", help="only so many tokens")
    parser.add_argument("--dtypes", nargs="+", help="only these dtypes")
    parser.add_argument("--modes", nargs="+", help="only these modes")
    parser.add_argument("--implementations", nargs="+", help="only these, besides the host's own")
    parser.add_argument("--seconds", type=float, help="budget of a case's rounds")
    parser.add_argument("--threads", type=int, help="default: every core that the process may use")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work?")
    parser.add_argument("--fresh", action="store_true", help="forget the results that are there")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="measure nothing: plots and targets of the results")
    parser.add_argument("--readme", action="store_true", help="as --report, and write the README's section")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
