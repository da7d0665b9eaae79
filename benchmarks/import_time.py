"""What `import hf_moe` adds to `import transformers, torch`.

    python benchmarks/import_time.py

Fresh processes, both sides alternating, CPU seconds (user + system) and wall seconds, medians and the ratio's median.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROUNDS = 9
SIDES = {"transformers_torch": "import transformers, torch", "hf_moe": "import hf_moe"}
RESULT = Path(__file__).parent / "results" / "import_time.json"


def seconds(statement: str) -> dict[str, float]:
    """CPU and wall seconds of a fresh interpreter that runs `statement`."""
    before, start = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"cpu_s": cpu, "wall_s": wall}


def main() -> None:
    for statement in SIDES.values():  # fills the file cache
        seconds(statement)
    rounds = [{side: seconds(statement) for side, statement in SIDES.items()} for _ in range(ROUNDS)]
    result = {
        "date": date.today().isoformat(),
        "device": f"cpu, {platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("hf-moe", "torch", "transformers")},
        "rounds": ROUNDS,
    }
    for unit in ("cpu_s", "wall_s"):
        medians = {side: round(statistics.median(r[side][unit] for r in rounds), 3) for side in SIDES}
        ratio = statistics.median(r["hf_moe"][unit] / r["transformers_torch"][unit] for r in rounds)
        result[unit] = {**medians, "ratio": round(ratio, 3)}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
