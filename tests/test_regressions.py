"""The table of what once was wrong names tests that exist."""

import ast
import re
from pathlib import Path

TABLE = Path(__file__).with_name("REGRESSIONS.md")
ROOT = TABLE.parents[1]


def test_every_row_names_a_test_that_exists():
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 5
    for what, wrong, tests in rows:
        assert what.strip(), tests
        assert wrong.strip(), what
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)(?:\[[^`]*\])?`", tests)
        assert named, what
        for file, function in named:
            tree = ast.parse((ROOT / file).read_text())
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert function in functions, f"{file}::{function}, of {what.strip()!r}, does not exist"
