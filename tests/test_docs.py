"""The documentation says what the code says: messages, names, families, links."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SOURCES = [file for folder in ("hf_moe", "recipes") for file in sorted((ROOT / folder).rglob("*.py"))]
TREES = [ast.parse(file.read_text(encoding="utf-8")) for file in SOURCES]
TROUBLESHOOTING = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
HOLE = "\0"  # what an f-string fills in


def literals() -> set[str]:
    """Every string of the code, f-strings with a hole for each value."""
    found = set()
    for node in (node for tree in TREES for node in ast.walk(tree)):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
            found.add("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def error_classes() -> set[str]:
    classes = [node for tree in TREES for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {node.name for node in classes if node.name.endswith("Error") and not node.name.startswith("_")}


def messages() -> list[str]:
    """The messages that the page lists: in headings, and where a sentence begins with one."""
    return re.findall(r"^(?:### [^`\n]*)?`([^`\n]+(?: |…)[^`\n]*)`(?: is an? |$)", TROUBLESHOOTING, re.MULTILINE)


def test_every_message_of_the_troubleshooting_is_in_the_code():
    code = literals()
    assert len(messages()) > 40

    def is_there(message: str) -> bool:
        parts = [re.escape(part.strip(" ")) for part in message.split("…") if part.strip(" .,:()")]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        return any(pattern.search(text) for text in code)

    assert [message for message in messages() if not is_there(message)] == []


def test_every_error_of_ours_has_an_entry_in_the_troubleshooting():
    assert {name for name in error_classes() if f"`{name}`" not in TROUBLESHOOTING} == set()
