"""The package's shape: imports point down, `import hf_moe` is cheap and repeatable, the wheel holds every package."""

import ast
import json
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A unit may import units of lower levels only; units of one level do not import each other.
LEVELS = {
    1: ("reference", "io", "kernels", "models", "lazy_imports"),  # of hf_moe these import themselves alone
    2: ("layers",),
    3: ("experts", "loading"),
    4: ("adapters", "quantization", "offload", "observability", "data"),
    5: ("training", "surgery", "distributed", "planner"),
    6: ("evaluation", "hub", "registration"),
    7: ("comparison",),
    8: ("generation", "finetuning"),
    9: ("recipes",),
    10: ("cli", "__init__"),
}
LEVEL_OF = {unit: level for level, units in LEVELS.items() for unit in units}
# Beyond the levels: kernels/ and the reference need torch alone, experts/ runs the experts of any model, and what
# measures knows nothing of training and publishing.
FORBIDDEN_PAIRS = {
    *(("kernels", "transformers"), ("reference", "transformers"), ("experts", "models")),
    *(("evaluation", "training"), ("comparison", "hub")),
}
# what a checkpoint on the Hub carries: every import of these that is not transformers' is of one another
SHIPPED_WITH_CHECKPOINTS = "modeling_hf_moe"


def module_files() -> dict[str, Path]:
    """Every module by its installed name: recipes/ is installed as hf_moe.recipes."""
    files = {}
    for folder, prefix in ((ROOT / "hf_moe", "hf_moe"), (ROOT / "recipes", "hf_moe.recipes")):
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            files[".".join((prefix, *parts))] = file
    return files


MODULES = module_files()


def unit_of(module: str) -> str:
    """The folder or top-level file that a module belongs to: `hf_moe.training.trainer` -> `training`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(module: str, source: str) -> set[str]:
    """Full names of the modules that `module` imports, wherever in the file; only our own and transformers' matter."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base]).rstrip(".")
            submodules = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {base}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    return found


def import_graph() -> dict[str, set[str]]:
    return {module: imports_of(module, file.read_text()) for module, file in MODULES.items()}


def is_ours(module: str) -> bool:
    return module.split(".")[0] == "hf_moe"


def wrong_direction(graph: dict[str, set[str]]) -> list[str]:
    wrong = []
    for module, imported in graph.items():
        unit = unit_of(module)
        for name in imported:
            target = unit_of(name) if is_ours(name) else name.split(".")[0]
            points_down = not is_ours(name) or target == unit or LEVEL_OF.get(target, 99) < LEVEL_OF[unit]
            if not points_down or (unit, target) in FORBIDDEN_PAIRS:
                wrong.append(f"{module} (level {LEVEL_OF[unit]}) imports {name}")
    return wrong


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """A cycle of modules, as a path that ends where it starts."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done or module not in graph:
            return None
        for name in sorted(graph[module]):
            if cycle := visit(name, [*path, module]):
                return cycle
        done.add(module)
        return None

    return next((cycle for module in graph if (cycle := visit(module, []))), None)


def test_every_unit_has_a_level():
    assert {unit_of(module) for module in MODULES} <= LEVEL_OF.keys()


def test_imports_point_down_also_inside_functions():
    assert wrong_direction(import_graph()) == []


def test_no_import_cycles():
    assert find_cycle(import_graph()) is None


def test_relative_imports_stay_in_their_unit():
    """One dot beside what ships with checkpoints, up to the folder's own top in kernels/; nowhere else."""
    wrong = []
    for module, file in MODULES.items():
        depth = len(module.split(".")) - 2 + (file.name == "__init__.py")  # dots that still end inside the unit
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                dots = {"models": 1, "kernels": depth}.get(unit_of(module), 0)
                allowed = node.level <= dots and "." not in (node.module or "")
                wrong += [] if allowed else [f"{module}:{node.lineno}"]
    assert wrong == []


def test_files_shipped_with_checkpoints_need_no_hf_moe():
    """The Hub's copier follows one-dot imports from the modeling file; an absolute one would need hf_moe installed."""
    pending, shipped = {f"hf_moe.models.{SHIPPED_WITH_CHECKPOINTS}"}, set()
    while pending:
        module = pending.pop()
        shipped.add(module)
        tree = ast.parse(MODULES[module].read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [] if node.level else [node.module or ""]
                pending |= {f"hf_moe.models.{node.module}"} - shipped if node.level else set()
            assert not any(is_ours(name) for name in names), f"{module}:{node.lineno} imports {names}"
    assert "hf_moe.models.configuration_hf_moe" in shipped


def test_the_checks_see_a_wrong_import_and_a_cycle():
    graph = {"hf_moe.reference": {"hf_moe.layers.storage"}, "hf_moe.layers.storage": {"hf_moe.reference"}}
    assert wrong_direction(graph) == ["hf_moe.reference (level 1) imports hf_moe.layers.storage"]
    assert find_cycle(graph) is not None
    source = "def f():\n    from hf_moe.cli import main\n    from . import routing\n    import_module('hf_moe.hub')"
    assert imports_of("hf_moe.models.losses", source) == {"hf_moe.cli", "hf_moe.models.routing", "hf_moe.hub"}


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter at the repository's root."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


TRANSFORMERS = "import torch, transformers"


def import_seconds(statement: str) -> float:
    """CPU seconds, which a busy machine stretches less than the wall clock."""
    return float(
        run_python(f"import time; start = time.process_time(); {statement}; print(time.process_time() - start)")
    )


def import_cost_ratio(pairs: int = 3) -> float:
    rounds = [(import_seconds(TRANSFORMERS), import_seconds("import hf_moe")) for _ in range(pairs)]
    theirs, ours = zip(*rounds, strict=True)
    return statistics.median(ours) / statistics.median(theirs)


@pytest.mark.slow
@pytest.mark.long
def test_import_costs_less_than_one_and_a_half_times_that_of_transformers():
    ratios: list[float] = []
    while len(ratios) < 3 and (not ratios or min(ratios) >= 1.5):
        ratios.append(import_cost_ratio())
    assert min(ratios) < 1.5, ratios


def test_import_loads_no_optional_library():
    listing = "import sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    # the Auto classes that we register with: in transformers 5.17 they import torch._dynamo, and that triton
    auto_classes = f"{TRANSFORMERS}; transformers.AutoModelForCausalLM"
    loaded = set(run_python(f"import hf_moe; {listing}").split()) - set(
        run_python(f"{auto_classes}; {listing}").split()
    )
    assert loaded & {"triton", "datasets", "evaluate", "lm_eval", "matplotlib", "peft", "jinja2"} == set()


def test_registration_adds_one_model_type_and_can_be_repeated():
    out = run_python(
        """
import importlib, json
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
before = set(CONFIG_MAPPING.keys())
import hf_moe
hf_moe.registration.register()
importlib.reload(hf_moe.registration)
importlib.reload(hf_moe)
hf_moe.registration.register()
from hf_moe.models.modeling_hf_moe import HfMoeForCausalLM
config = AutoConfig.for_model("hf_moe", hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                              num_key_value_heads=2, num_experts=2, num_experts_per_tok=1, vocab_size=8,
                              intermediate_size=16, moe_intermediate_size=16)
class Mine(AutoModelForCausalLM._model_mapping[type(config)]):
    pass
model = AutoModelForCausalLM.from_config(config)
same = type(model) is HfMoeForCausalLM and issubclass(Mine, HfMoeForCausalLM)
print(json.dumps([sorted(set(CONFIG_MAPPING.keys()) ^ before), same]))
"""
    )
    assert json.loads(out.splitlines()[-1]) == [["hf_moe"], True]


def test_the_wheel_holds_every_package():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {module for module, file in MODULES.items() if file.name == "__init__.py"} | {"hf_moe.recipes"}
    folders = {module.rpartition(".")[0] for module in MODULES if "." in module}
    assert set(pyproject["tool"]["setuptools"]["packages"]) == packages
    assert folders <= packages, "a folder without __init__.py"
    command = pyproject["project"]["scripts"]["hf-moe"].partition(":")[0]
    assert command in pyproject["tool"]["setuptools"]["py-modules"]
