"""Read README and docs as a reader does: blocks of code in order, commands line by line, links and anchors."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SHELLS = ("bash", "console")
# an HTML comment before a block says why it does not run here: <!-- not run: needs a GPU -->
_BLOCK = re.compile(
    r"^(?:[ ]*<!-- not run: (?P<reason>[^\n]+?) -->\n+)?"
    r"(?P<indent>[ ]*)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_HEADING = re.compile(r"^#{1,6} +(?P<title>.+?)(?: *\{ *#(?P<anchor>[\w-]+) *\})?$", re.MULTILINE)
_LINK = re.compile(r"(?<!\!)\[[^\]\n]*(?:\n[^\]\n]*)?\]\(([^)\s]+)(?: \"[^\"]*\")?\)|\!\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: Of its first line of code, from 1.
        reason: Why it does not run here; None if it does.
    """

    language: str
    code: str
    line: int
    reason: str | None


def pages() -> list[Path]:
    """README and what the site is made of."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        indent = len(match["indent"])
        code = "".join(line[indent:] or "\n" for line in match["code"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(match["language"], code, line, match["reason"]))
    return found


def program(page: Path) -> str:
    """The page's Python, every block on its own lines, so that a traceback names the line of the page."""
    lines: list[str] = []
    for block in blocks(page):
        if block.language == "python" and block.reason is None:
            lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    return "\n".join(lines)


def shown_files(page: Path) -> dict[str, str]:
    """What the page shows of YAML files under their names, as in "You have `law.yaml`:"."""
    text = page.read_text(encoding="utf-8")
    return dict(re.findall(r"`([\w.]+\.yaml)`:\n\n```yaml\n(.*?)```", text, re.DOTALL))


def commands(block: Block) -> Iterator[list[str]]:
    """Every command of a shell block as words; of a console block the lines after a `$`."""
    if block.language not in SHELLS:
        return
    code = block.code
    if block.language == "console":
        code = "\n".join(line[2:] for line in code.splitlines() if line.startswith("$ "))
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                command = command[1:]
            if command:
                yield command


def anchors(page: Path) -> set[str]:
    """What a link to the page may name after `#`, as Python-Markdown makes it of a heading."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    found = set(re.findall(r"<a (?:id|name)=\"([\w-]+)\"", text))
    for match in _HEADING.finditer(text):
        title = re.sub(r"[`*]|\]\([^)]*\)|\[", "", match["title"])
        found.add(match["anchor"] or re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()))
    return found


def broken_links(page: Path) -> list[str]:
    """Links of the page to files or headings that are not there; those that a build generates, the build checks."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for link in (one or other for one, other in _LINK.findall(text)):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if target.is_relative_to(DOCS / "reference") or target == DOCS / "contributing.md":
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    return broken
