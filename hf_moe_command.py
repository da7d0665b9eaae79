"""Entry point of `hf-moe`, outside of the package, whose import takes seconds: an interruption there is a sentence."""

import os
import sys


def main() -> None:
    if not sys.stderr.isatty():
        # in a file each step of a progress bar is a line; tqdm reads this when it is imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        from hf_moe.cli import main as run

        run()
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
