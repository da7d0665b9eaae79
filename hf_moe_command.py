"""Entry point of `hf-moe`, outside of the package, whose import takes seconds: an interruption there is a sentence."""

import sys


def main() -> None:
    try:
        from hf_moe.cli import main as run

        run()
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
