"""The documentation says what the code says: messages, names, levels, families. CI builds the site."""

import ast
import json
import re
import sys

import pytest

from hf_moe.io.installation import REPOSITORY
from test_imports import LEVELS, MODULES, ROOT

DOCS = ROOT / "docs"
sys.path.append(str(DOCS / "generators"))
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "mkdocs.yml"]
TREES = [ast.parse(file.read_text(encoding="utf-8")) for file in MODULES.values()]
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


def test_the_pages_name_one_repository_and_switches_that_exist():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"https://github\.com/\w+/hf_moe", text)) == {REPOSITORY}
    switches = {name for literal in literals() for name in re.findall(r"HF_MOE_\w+", literal)}
    assert set(re.findall(r"HF_MOE_[A-Z_]+", text)) <= switches


def test_contributing_gives_the_levels():
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(level): tuple(re.findall(r"`(\w+)`", units)) for level, units in rows} == LEVELS


def test_the_api_page_has_every_public_name_and_modules_that_exist():
    import api

    assert sorted(name for names in api.NAMES.values() for name in names) == sorted(api.homes())
    assert {f"hf_moe.{name}" for names in api.MODULES.values() for name in names} <= MODULES.keys()


def test_the_page_of_models_is_written_from_the_data():
    import models

    assert models.PAGE.read_text(encoding="utf-8") == models.page(), "python docs/generators/models.py writes it"


@pytest.mark.slow
def test_the_table_of_models_is_what_a_family_does_and_leaves_none_out():
    """CI tries every family: `try_families.py --check`."""
    pytest.importorskip("triton")
    import try_families

    written = json.loads(try_families.DATA.read_text(encoding="utf-8"))["families"]
    assert set(try_families.FAMILIES) <= written.keys()
    assert try_families.try_family("gpt_oss") == written["gpt_oss"]
