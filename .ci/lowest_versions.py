"""Print `name==version` for the lower bound of every dependency in pyproject.toml: pip constraints for the oldest set.

Torch keeps its tested version: an older one would be a download of gigabytes.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT_AT_TESTED_VERSION = "torch"
EXTRAS = ("push", "recipes", "triton")


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirement in project["dependencies"] + [line for name in EXTRAS for line in extras[name]]:
        match = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,.*)?", requirement)
        if match is None:
            raise SystemExit(
                f"{requirement!r} in pyproject.toml must read name>=version, so that the bound can be tested."
            )
        name, version = match[1], match[2]
        print(tested_line(name) if name == KEPT_AT_TESTED_VERSION else f"{name}=={version}")


def tested_line(name: str) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


if __name__ == "__main__":
    main()
