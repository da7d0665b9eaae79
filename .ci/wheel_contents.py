"""Check that the wheel in the given folder holds tracked files alone: hf_moe/, its command, and all of recipes/."""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile


def main(folder: str) -> None:
    (wheel,) = Path(folder).glob("hf_moe-*.whl")
    names = set(ZipFile(wheel).namelist())
    patterns = ("hf_moe", "hf_moe_command.py", *(f"recipes/*.{ending}" for ending in ("py", "yaml", "jsonl", "jinja")))
    listing = subprocess.run(["git", "ls-files", *patterns], check=True, capture_output=True, text=True)
    tracked = listing.stdout.split()
    installed = {f"hf_moe/{name}" if name.startswith("recipes/") else name for name in tracked}
    missing = sorted(installed - names)
    unwanted = sorted(name for name in names - installed if ".dist-info/" not in name)
    if missing or unwanted:
        raise SystemExit(f"{wheel.name}: missing {missing}, unwanted {unwanted}")
    print(f"{wheel.name}: {len(names)} files")


if __name__ == "__main__":
    main(sys.argv[1])
