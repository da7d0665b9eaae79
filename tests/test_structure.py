"""The package stays easy to find one's way in: a map in every folder, no folder, file or function that is too long."""

import ast
import math
import re
from collections import Counter

import pytest

from test_imports import LEVEL_OF, MODULES, ROOT

PACKAGES = sorted(module for module, file in MODULES.items() if file.name == "__init__.py")


def path_of(module: str) -> str:
    return MODULES[module].relative_to(ROOT).as_posix()


def names_in_map(docstring: str) -> list[str]:
    """Names in the lines `    name.py   what is in it` and `    name/   ...` of a docstring."""
    return re.findall(r"^    (\w+(?:\.py|/)) +\S", docstring, re.MULTILINE)


def map_of(package: str) -> list[str]:
    return names_in_map(ast.get_docstring(ast.parse(MODULES[package].read_text()), clean=False) or "")


def parts_of(package: str) -> set[str]:
    """Modules and subpackages of a package as a map names them."""
    inside = [module for module in MODULES if module.rpartition(".")[0] == package]
    return {module.rpartition(".")[2] + ("/" if module in PACKAGES else ".py") for module in inside}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_opens_with_a_map_of_its_modules(package):
    named, there, folder = Counter(map_of(package)), parts_of(package), MODULES[package].parent
    wrong = [f"{name} is missing" for name in sorted(there - named.keys())]
    wrong += [f"{name} does not exist" for name in named.keys() - there if not (folder / name).exists()]
    wrong += [f"{name} stands there {times} times" for name, times in named.items() if times > 1]
    assert not wrong, (
        f"Mend the map in {path_of(package)}, a line `    name.py   what is in it` for each module, `    name/   ...` "
        f"for each subpackage: {'; '.join(wrong)}."
    )


def test_the_first_map_follows_the_levels():
    levels = [LEVEL_OF[name.removesuffix("/").removesuffix(".py")] for name in map_of("hf_moe")]
    assert levels == sorted(levels), "Order the map in hf_moe/__init__.py as LEVELS in tests/test_imports.py."


def test_the_check_reads_a_map():
    text = "A package.\n\n    a.py   one\n           and b.py\n    c/     two\n    d.py, e.py\n\nf.py   three"
    assert names_in_map(text) == ["a.py", "c/"]


def longest(sizes: dict[str, int], most: int = 0) -> list[str]:
    """`name: size` of those over `most`, the largest first."""
    return [f"{name}: {size}" for name, size in Counter(sizes).most_common() if size > most]


def percentile_95(sizes: dict[str, int]) -> int:
    """The smallest size that at least 95 of 100 do not exceed."""
    return sorted(sizes.values())[math.ceil(0.95 * len(sizes)) - 1]


def functions() -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function, methods and nested ones too, by where it stands."""
    return {
        f"{path_of(module)}:{node.lineno} {node.name}": node
        for module, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def number_of_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return sum(isinstance(node, ast.arg) for node in ast.iter_child_nodes(function.args))


def test_no_folder_has_more_than_16_modules():
    sizes = Counter(MODULES[module].parent.relative_to(ROOT).as_posix() for module in MODULES.keys() - set(PACKAGES))
    assert not (over := longest(sizes, most=16)), f"Divide by subject, or join modules that change together: {over}"


def test_every_file_has_fewer_than_620_lines():
    sizes = {path_of(module): len(file.read_text().splitlines()) for module, file in MODULES.items()}
    assert not (over := longest(sizes, most=619)), f"Divide by subject: {over}"


def test_most_functions_fit_a_screen():
    sizes = {place: node.end_lineno - node.lineno + 1 for place, node in functions().items()}
    assert percentile_95(sizes) < 30, f"Divide some of the longest functions: {longest(sizes)[:20]}"


def test_most_kernel_functions_take_at_most_12_parameters():
    kernels = {place: node for place, node in functions().items() if place.startswith("hf_moe/kernels/")}
    sizes = {place: number_of_parameters(node) for place, node in kernels.items()}
    assert percentile_95(sizes) <= 12, f"Pass records where these take many: {longest(sizes, most=12)}"


def test_no_banner_divides_a_file():
    """Two subjects are two files; recipes, which are read from top to bottom, may number their steps."""
    files = {path_of(module): file for module, file in MODULES.items() if not module.startswith("hf_moe.recipes")}
    banners = [place for place, file in files.items() if re.search(r"(?m)^ *# ?[-=]{3,}", file.read_text())]
    assert not banners, f"Divide by subject, or leave the banner out: {banners}"
