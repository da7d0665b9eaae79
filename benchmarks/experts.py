"""Time and memory of each experts implementation.

    python benchmarks/experts.py                               the CPU plan, about 20 minutes on 2 cores
    python benchmarks/experts.py --device cuda                 the GPU plan
    python benchmarks/experts.py --experts 64 --tokens 1 16    a part of it
    python benchmarks/experts.py --page                        plots, targets and the section of docs/backends.md

Implementations run side by side on the same tensors, through transformers' own interface: the experts module of a real
family, with `config._experts_implementation` set to each name. Each is compared with float64 first; one that is wrong
is not timed, and the command fails. Results are written after every case: the same command continues after an
interruption, and measures again what was measured with other code.
"""

import sys

from expert_layers.command import parser, run

if __name__ == "__main__":
    sys.exit(run(parser(__doc__).parse_args()))
