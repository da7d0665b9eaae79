"""How long the two commands of the README take a stranger: a fresh clone and a fresh environment for each.

    python benchmarks/readme_commands.py
    python benchmarks/readme_commands.py --only quickstart --keep FOLDER    # and keep what it wrote

Measures the committed state. The package index must be reachable; everything else is offline.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "readme_commands.json"
WRITTEN = "quickstart-output"


def commands() -> list[str]:
    """The README's code lines that install the project from its clone and run it."""
    return re.findall(r"^python -m pip install .* && .*$", (ROOT / "README.md").read_text(), re.MULTILINE)


def seconds(command: str, keep: Path | None) -> float:
    """Wall seconds of `command` in a new clone with a new environment."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "hf_moe")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        subprocess.run([sys.executable, "-m", "venv", str(clone / ".venv")], check=True)
        environment = {**os.environ, "PATH": f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}"}
        environment.pop("PYTHONPATH", None)
        start = time.perf_counter()
        subprocess.run(command, shell=True, check=True, cwd=clone, env=environment)
        taken = time.perf_counter() - start
        if keep is not None and (clone / WRITTEN).exists():
            shutil.copytree(clone / WRITTEN, keep)
        return taken


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", metavar="WORD", help="the commands that hold this word")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help=f"copy {WRITTEN} to this new folder")
    options = parser.parse_args()
    written = json.loads(RESULT.read_text())["commands"] if RESULT.exists() else {}
    machine = {
        "device": f"cpu, {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": "constraints.txt",
    }
    measured = {
        command: {"wall_s": round(seconds(command, options.keep), 1), "date": date.today().isoformat(), **machine}
        for command in commands()
        if options.only in command
    }
    kept = {command: times for command, times in written.items() if command in commands()}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"commands": kept | measured}, indent=2) + "\n")
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
