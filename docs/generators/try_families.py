"""Try what hf_moe offers on a tiny model of every MoE family of transformers: the data of docs/models.md.

    python docs/generators/try_families.py            # writes families.json and docs/models.md; about ten minutes
    python docs/generators/try_families.py --check    # fails where the file says something else

Each entry is what happened: a feature ran and its result was compared, or an error of ours said why not. The models
are those of the tests (tests/tiny_models.py): random weights in the real classes. Nothing here runs on a GPU: the
Triton kernels run in their interpreter.
"""

import argparse
import copy
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import triton_interpreter  # noqa: E402

triton_interpreter.switch_on_without_gpu()

import torch  # noqa: E402
import transformers  # noqa: E402
from peft import get_peft_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

import hf_moe  # noqa: E402
import models  # noqa: E402
from hf_moe.adapters.export import AdapterExportError  # noqa: E402
from hf_moe.adapters.readable import UnreadableAdapterError, refuse_unreadable  # noqa: E402
from hf_moe.experts.contract import activation_of  # noqa: E402
from hf_moe.finetuning.arguments import RecipeError  # noqa: E402
from hf_moe.finetuning.packing_check import check_packing  # noqa: E402
from hf_moe.layers.watch_routing import watch_routing  # noqa: E402
from hf_moe.training.balancing.checks import BalancingError, balanced_layers  # noqa: E402
from hf_moe.training.balancing.terms import BalancingTerms  # noqa: E402
from tiny_lora import accelerated, adapted  # noqa: E402
from tiny_models import FAMILIES, build_tiny, experts_class  # noqa: E402
from tiny_multimodal import MULTIMODAL, build_multimodal  # noqa: E402

DATA = Path(__file__).with_name("families.json")
BACKENDS = ("hf_moe_triton", "hf_moe_cpu", "hf_moe_grouped", "hf_moe_reference")
_TOLERANCE = 1e-4  # of the largest value: float32 sums in another order
_PACKED_ROW = 64
# what hf_moe says no with; everything else is a fault and stops the script
_REFUSALS = (AdapterExportError, UnreadableAdapterError, RecipeError, BalancingError)


def try_family(family: str) -> dict[str, Any]:
    """Everything that the table says of a family: "" for what ran, or the reason why not."""
    model, inputs = build_tiny(family)
    whole, text = build_multimodal(family) if family in MULTIMODAL else (model, inputs)
    experts = next(module for module in model.modules() if type(module) is experts_class(family))
    form = activation_of(experts)
    return {
        "model_type": whole.config.model_type,
        "classes": [experts_class(family).__name__, type(whole).__name__],
        "checkpoint": _checkpoint(type(whole.config)),
        "activation": form.activation if form else "",
        "backends": {name: _refusal(_run_backend, model, inputs, name) for name in BACKENDS},
        "lora": _refusal(_train_lora, model, inputs, whole),
        "adapter_experts": _refusal(_train_adapter_experts, model, inputs),
        "per_expert": _refusal(_export, model),
        "packing": _refusal(_pack, whole),
        "own_balancing": _has_own_balancing(whole, text),
        "balancing": {term: _refusal(_balance, model, inputs, term) for term in ("aux_loss", "z_loss", "bias_update")},
    }


def _refusal(attempt: Callable[..., None], *args: Any) -> str:
    """Reason of ours against `attempt`, or "" if it ran."""
    try:
        attempt(*args)
    except _REFUSALS as error:
        return str(error)
    return ""


def _checkpoint(config_class: type) -> str:
    """Checkpoint that transformers' own documentation of the configuration names."""
    source = inspect.getsource(inspect.getmodule(config_class))
    return next(iter(re.findall(r'checkpoint="([^"]+)"', source)), "")


def _assert_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    error = (actual.double() - expected.double()).abs().max().item()
    if not error <= _TOLERANCE * expected.abs().max().item():
        raise AssertionError(f"{what}: differs by {error:.3g}")


@torch.no_grad()
def _run_backend(model: nn.Module, inputs: dict[str, Tensor], name: str) -> None:
    model.set_experts_implementation("eager")
    expected = model(**inputs)[0]
    model.set_experts_implementation(name)
    _assert_equal(model(**inputs)[0], expected, name)


def _trained(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The output; after a backward that must reach every trained parameter."""
    out = model(**inputs)[0]
    out.square().mean().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missed = [name for name, parameter in trained.items() if parameter.grad is None]
    if missed or not trained:
        raise AssertionError(f"no gradient in {missed}")
    return out.detach()


def _train_lora(model: nn.Module, inputs: dict[str, Tensor], whole: nn.Module) -> None:
    """LoRA on both projections of every expert: as PEFT computes it, with a router that stays, readable by PEFT."""
    refuse_unreadable(get_peft_model(copy.deepcopy(whole), hf_moe.expert_lora_config(whole, r=2)))
    model.set_experts_implementation("eager")
    stock = adapted(model, r=2)
    fast = accelerated(stock)
    _assert_equal(_trained(fast, inputs), stock(**inputs)[0].detach(), "expert LoRA")
    hf_moe.verify_router_frozen(fast)


def _train_adapter_experts(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Adapter experts beside every expert layer: exactly the base at first, with gradients of their own."""
    base = copy.deepcopy(model).requires_grad_(False)
    base.set_experts_implementation("hf_moe")
    with torch.no_grad():
        expected = base(**inputs)[0]
    tuned = get_peft_model(base, hf_moe.AdapterExpertsConfig(num_adapter_experts=2, adapter_width=8, top_k=1))
    if not torch.equal(_trained(tuned.eval(), inputs), expected):
        raise AssertionError("adapter experts change the model at the start")


def _export(model: nn.Module) -> None:
    """A pair of factors for every expert, which stock PEFT reads back."""
    with tempfile.TemporaryDirectory() as folder:
        tuned = adapted(model, r=2)
        model.config.save_pretrained(f"{folder}/base")
        tuned.peft_config["default"].base_model_name_or_path = f"{folder}/base"
        tuned.save_pretrained(f"{folder}/adapter")
        try:
            hf_moe.export_adapter(f"{folder}/adapter", f"{folder}/out", model_type=model.config.model_type)
        except AdapterExportError as error:
            raise AdapterExportError(str(error).replace(f"{folder}/", "")) from error


def _pack(whole: nn.Module) -> None:
    """Packed examples; how much they change is of these weights and this machine, that they do is not."""
    if not hasattr(whole, "lm_head") and whole.get_output_embeddings() is None:
        raise RecipeError(f"{type(whole).__name__} has no language-model head to train.")
    try:
        check_packing(whole, _PACKED_ROW)
    except RecipeError as error:
        raise RecipeError(re.sub(r": other examples .* explains [^ ]+\. ", ". ", str(error))) from error


@torch.no_grad()
def _has_own_balancing(whole: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether transformers' forward returns a balancing loss when asked for the router's logits."""
    if "output_router_logits" not in whole.config.to_dict() | whole.config.get_text_config().to_dict():
        return False
    out = whole(**inputs, output_router_logits=True)
    return getattr(out, "aux_loss", None) is not None


def _balance(model: nn.Module, inputs: dict[str, Tensor], term: str) -> None:
    """A term of BalancingConfig on the family, with nothing said of its scores."""
    coefficient = {"aux_loss": "aux_loss_coef", "z_loss": "z_loss_coef", "bias_update": "bias_update_rate"}[term]
    config = hf_moe.BalancingConfig(**{coefficient: 0.1})
    layers = balanced_layers(model, config)
    if term == "bias_update":
        return
    terms = BalancingTerms(config, layers)
    with watch_routing(model, terms.add):
        model(**inputs)
    for loss in terms.losses(torch.tensor(1.0)).values():
        loss.backward()


def try_all() -> dict[str, Any]:
    triton_interpreter.repair()
    transformers_logging.set_verbosity_error()
    families = {}
    for family in FAMILIES:
        print(family, flush=True)
        families[family] = try_family(family)
    return {"transformers": transformers.__version__, "families": families}


def differences(written: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What the file says otherwise, of the families that both know."""
    both = written["families"].keys() & found["families"].keys()
    return [
        f"{family}: {field} is {entry[field]!r}, the file says {written['families'][family].get(field)!r}"
        for family in sorted(both)
        for entry in [found["families"][family]]
        for field in entry
        if entry[field] != written["families"][family].get(field)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    found = try_all() if (arguments := parser.parse_args()) else {}
    if not arguments.check:
        DATA.write_text(json.dumps(found, indent=1) + "\n")
        models.PAGE.write_text(models.page(), encoding="utf-8")
    elif wrong := differences(json.loads(DATA.read_text()), found):
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
