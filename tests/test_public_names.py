"""The names at the root: few, the same for Python, editors and type checkers; none that once stood there is lost."""

import ast
import importlib
import re
import warnings
from pathlib import Path

import pytest

import hf_moe

STUB = Path(hf_moe.__file__).with_suffix(".pyi")
# all that was public at the root before most names were left to their modules
ONCE_PUBLIC = re.findall(
    r"\w+",
    """
    AdapterExpertsConfig BalancingCallback BalancingConfig BalancingError BalancingMixin CollapseCallback
    ExpertSelection Gate GatedRollbackCallback HfMoeConfig HfMoeForCausalLM HfMoeForQuestionAnswering
    HfMoeForSequenceClassification HfMoeForTokenClassification HfMoeModel ModelChoice MoeLayer MoeTrainer
    RouterFreezeCallback RouterNotFrozenError RoutingMetricsCallback RoutingTrace SafeCheckpointMixin
    SameWeightsCallback TextProbe accelerate_adapters bits_per_byte check_index_range checked_routing compare_models
    compare_traces count_expert_load diagnose expert_lora_config explain explain_config export_adapter
    fold_selected_experts freeze_router load_adapter mask_expert_lora mask_experts merge_and_check model_card
    moe_layers record_choices record_routing register replay_routing router_hash routing_agreement save_router_hash
    select_experts trace_texts train_selected_experts verify_adapter_base verify_router_frozen
    """,
)
MOVED = sorted(set(ONCE_PUBLIC) - set(hf_moe.__all__))
RENAMED = {"Gate": "RoutingThresholds", "GatedRollbackCallback": "RollbackCallback"}


def test_the_root_has_few_names_and_dir_lists_them():
    assert len(ONCE_PUBLIC) == 57
    assert len(hf_moe.__all__) <= 25
    assert set(hf_moe.__all__) <= set(dir(hf_moe))
    assert not set(MOVED) & set(dir(hf_moe))


def test_the_stub_names_what_the_package_offers():
    """`__init__.pyi` is what type checkers and editors read in place of the imports on first use."""
    imports = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ImportFrom)]
    in_stub = {(node.module, alias.name, alias.asname) for node in imports for alias in node.names}
    assert in_stub == {(module, name, name) for module, names in hf_moe._HOMES.items() for name in names}


@pytest.mark.parametrize("name", hf_moe.__all__)
def test_a_public_name_gives_no_warning(name, recwarn):
    assert getattr(hf_moe, name).__name__ == name
    assert not [warning for warning in recwarn if warning.category is FutureWarning]


@pytest.mark.parametrize("name", MOVED)
def test_a_moved_name_is_found_with_a_warning_that_names_its_new_place(name):
    with pytest.warns(FutureWarning, match=rf"^hf_moe\.{name} has moved") as recorded:
        found = getattr(hf_moe, name)
    module, new_name = re.search(r"`from ([\w.]+) import (\w+)`", str(recorded[0].message)).groups()
    assert new_name == RENAMED.get(name, name)
    assert found is getattr(importlib.import_module(module), new_name)


@pytest.mark.parametrize("use", ["hf_moe.diagnose", "from hf_moe import diagnose"])
def test_the_warning_points_at_the_line_that_uses_the_name_and_is_shown_once_for_it(tmp_path, use):
    script = tmp_path / "script.py"
    code = compile(f"import hf_moe\n\nfor _ in range(3):\n    {use}\n{use}\n", str(script), "exec")
    with warnings.catch_warnings(record=True, action="default") as shown:
        exec(code, {})
    assert [(warning.filename, warning.lineno) for warning in shown] == [(str(script), 4), (str(script), 5)]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hf_moe' has no attribute 'nothing'"):
        _ = hf_moe.nothing
