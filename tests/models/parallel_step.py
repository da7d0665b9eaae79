"""Forward and backward of saved models under transformers' tensor and expert parallelism; run by torchrun.

parallel_step.py FOLDER JSON     (a list of [model folder name, experts implementation, DistributedConfig arguments])
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hf_moe  # noqa: F401
from tiny_hf_moe import random_ids


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def step(folder: Path, experts_implementation: str, **layout: int) -> dict:
    model = AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation=experts_implementation, distributed_config=DistributedConfig(**layout)
    ).train()
    ids = random_ids()
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    gradients = {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
    return {"logits": whole(outputs.logits.detach()), "gradients": gradients}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = [step(folder / name, experts, **layout) for name, experts, layout in json.loads(sys.argv[2])]
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
