"""Builds the kernels beforehand: `python -m hf_moe.kernels.cpu --target x86-64-v3 --target x86-64-v4`."""

import argparse
import os

from .build import build_library
from .cache import LEVELS, NATIVE, PLACE


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hf_moe.kernels.cpu", description=__doc__)
    parser.add_argument(
        "--target",
        action="append",
        choices=[NATIVE, *LEVELS],
        help=f"an instruction set; '{NATIVE}' (the default) runs on processors that are like this one alone, a level "
        "on all that have it. Of several, each machine takes the best that it can run.",
    )
    parser.epilog = f"The libraries go into the folder that {PLACE} names, and are found there."
    for target in parser.parse_args().target or [NATIVE]:
        try:
            library = build_library(target)
        except RuntimeError as error:
            raise SystemExit(str(error)) from error
        if not library.is_relative_to(os.environ.get(PLACE, "/")):
            raise SystemExit(f"{PLACE}={os.environ[PLACE]!r} cannot be written: make that folder writable.")
        print(f"{target}: {library}")


if __name__ == "__main__":
    main()
