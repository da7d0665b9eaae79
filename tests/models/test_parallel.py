"""The tensor- and expert-parallel plans give what one process gives, for modes with and without unused slots."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_moe  # noqa: F401
from tiny_hf_moe import DECODERS, random_ids, tiny_config
from torchrun import torchrun

WORKER = Path(__file__).with_name("parallel_step.py")
NAMES = ["shared_and_dense", "sigmoid_groups_bias", "null_experts", "top_p"]
# tensor parallel; expert parallel that masks the slots of other processes; expert parallel that exchanges tokens
LAYOUTS = [{"tp_size": 2}, {"tp_size": 2, "ep_size": 2}, {"fsdp_size": 2, "ep_size": 2}]
SHARDED = {"fsdp_size": 2}


def single_process(name: str, folder: Path) -> dict:
    model = AutoModelForCausalLM.from_config(tiny_config(**DECODERS[name])).train()
    model.save_pretrained(folder)
    ids = random_ids()
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": outputs.logits.detach(), "gradients": gradients}


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    expected = {name: single_process(name, tmp_path / name) for name in NAMES}
    runs = [(name, "grouped_mm", layout) for name in NAMES for layout in LAYOUTS]
    runs += [("null_experts", experts, layout) for experts in ("hf_moe", "hf_moe_grouped") for layout in LAYOUTS]
    runs += [("shared_and_dense", "hf_moe", SHARDED)]
    torchrun(WORKER, str(tmp_path), json.dumps(runs))
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for (name, experts, layout), actual in zip(runs, results, strict=True):
        # sums in another order: a few float32 ulp of the largest value
        torch.testing.assert_close(
            actual["logits"], expected[name]["logits"], atol=1e-6, rtol=0, msg=f"{name} {experts} {layout}"
        )
        for parameter, gradient in expected[name]["gradients"].items():
            error = (actual["gradients"][parameter] - gradient).abs().max() / gradient.abs().max()
            assert error < 5e-6, (name, experts, layout, parameter)
