"""The hook of mkdocs.yml: pages that are written while the site is built, and links that leave docs/.

The reference is not committed, so that it cannot differ from the code. Nothing here loads a model or needs a network.

    hook.py            this file: which pages there are, and links into the repository
    configuration.py   every key of every recipe, from its dataclasses
    command_line.py    every command of hf-moe, from typer
    api.py             the public names and the modules that people import, for mkdocstrings
    models.py          run by hand: writes the table of docs/models.md, from families.json
    try_families.py    run by hand: writes families.json
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import api  # noqa: E402
import command_line  # noqa: E402
import configuration  # noqa: E402

PAGES = {
    "reference/configuration.md": configuration.page,
    "reference/command-line.md": command_line.page,
    "reference/api.md": api.names_page,
    "reference/modules.md": api.modules_page,
    "contributing.md": lambda: (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "]("),
}
# pages that are alone under their tab need no second menu, and the table of models takes the whole width
HIDDEN = {
    "index.md": ["navigation"],
    "troubleshooting.md": ["navigation"],
    "contributing.md": ["navigation"],
    "models.md": ["navigation", "toc"],
}
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    for path, write in PAGES.items():
        files.append(File.generated(config, path, content=write()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Send links to files outside docs/ to the repository."""
    page.meta["hide"] = HIDDEN.get(page.file.src_uri, [])
    return in_repository(markdown, page.file.src_uri, config["repo_url"])


def in_repository(markdown: str, source: str, repository: str) -> str:
    """Links to files of the repository that are no page: at `repository`.

    Raises:
        FileNotFoundError: If the repository has no such file.
    """

    def found(link: re.Match[str]) -> str:
        inside = source != "contributing.md" or (DOCS / link[1]).exists()
        target = ((DOCS / source).parent if inside else ROOT).joinpath(link[1]).resolve()
        if target.is_relative_to(DOCS):
            return link[1]
        if not target.exists():
            raise FileNotFoundError(f"docs/{source} links to {link[1]}, which does not exist.")
        kind = "tree" if target.is_dir() else "blob"
        return f"{repository}/{kind}/main/{target.relative_to(ROOT).as_posix()}"

    return _LINK.sub(found, markdown)
