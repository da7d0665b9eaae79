"""The command that installs an extra fits how hf_moe was installed, and names what pyproject.toml has."""

import ast
import json
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_moe.io import installation
from hf_moe.io.installation import REPOSITORY, install_command

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_a_clone_is_named_by_its_folder():
    assert install_command("recipes,trl") == f'pip install -e "{ROOT}[recipes,trl]"'


@pytest.mark.parametrize(
    ("record", "origin"),
    [
        (None, f"git+{REPOSITORY}"),
        ({"url": "file:///src/hf_moe", "dir_info": {}}, "file:///src/hf_moe"),
        ({"url": REPOSITORY, "vcs_info": {"vcs": "git", "commit_id": "94da46b"}}, f"git+{REPOSITORY}@94da46b"),
    ],
    ids=["no record", "a folder", "a commit"],
)
def test_elsewhere_the_origin_is_named(monkeypatch, tmp_path, record, origin):
    monkeypatch.setattr(installation, "_CLONE", tmp_path)
    record = None if record is None else json.dumps(record)
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: record))
    assert install_command("eval") == f'pip install "hf-moe[eval] @ {origin}"'


def test_a_copy_without_metadata_is_sent_to_the_repository(monkeypatch, tmp_path):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installation, "_CLONE", tmp_path)
    monkeypatch.setattr(metadata, "distribution", missing)
    assert install_command("eval") == f'pip install "hf-moe[eval] @ git+{REPOSITORY}"'


def test_the_repository_is_the_one_of_the_project():
    urls = PROJECT["urls"]
    assert urls["Repository"] == REPOSITORY
    assert all(url.startswith(REPOSITORY) for url in urls.values())


def calls_in(source: str) -> list[str]:
    """First arguments of `install_command` and `require`, where they are written out."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    named = [call.args[0] for call in calls if getattr(call.func, "id", None) in ("install_command", "require")]
    return [argument.value for argument in named if isinstance(argument, ast.Constant)]


def test_every_extra_that_the_code_names_exists_and_no_index_is_claimed():
    listing = subprocess.run(
        ["git", "ls-files", "hf_moe/*.py", "recipes/*.py"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    sources = {name: (ROOT / name).read_text() for name in listing.stdout.split()}
    extras = {extra for source in sources.values() for call in calls_in(source) for extra in call.split(",")}
    assert {"recipes", "eval", "push", "trl", "triton"} <= extras <= set(PROJECT["optional-dependencies"])
    sources.pop("hf_moe/io/installation.py", None)
    assert [name for name, source in sources.items() if "hf-moe[" in source] == []
