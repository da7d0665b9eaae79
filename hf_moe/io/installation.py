"""How to install more of this package: the command that fits how it was installed itself."""

import json
from importlib import metadata
from pathlib import Path

REPOSITORY = "https://github.com/OWNER/hf_moe"
"""Where the source lies: `urls` of pyproject.toml, which a test compares."""

_CLONE = Path(__file__).resolve().parents[2]


def install_command(extra: str) -> str:
    """Return the shell command that adds an extra of pyproject.toml, or several with commas between them.

    It names the clone that hf_moe runs from; elsewhere what pip once installed it from, and the repository where pip
    kept no record. hf_moe is on no package index, so that the name alone would install nothing.
    """
    if (_CLONE / "pyproject.toml").is_file():
        return f'pip install -e "{_CLONE}[{extra}]"'
    return f'pip install "hf-moe[{extra}] @ {_origin()}"'


def _origin() -> str:
    """URL that pip takes: of the archive, folder or commit in its own record (PEP 610), or of the repository."""
    try:
        record = metadata.distribution("hf-moe").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        record = None
    if record is None:
        return f"git+{REPOSITORY}"
    origin = json.loads(record)
    if "vcs_info" in origin:
        return f"{origin['vcs_info']['vcs']}+{origin['url']}@{origin['vcs_info']['commit_id']}"
    return origin["url"]
