"""The proof of frozen routers on weights that are sharded over two processes; run by torchrun.

sharded_routers.py FOLDER     (holds a saved model in `model`)
"""

import json
import sys
from inspect import signature
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hf_moe.adapters.frozen_router import (
    RouterNotFrozenError,
    freeze_router,
    save_router_hash,
    verify_adapter_base,
    verify_router_frozen,
)
from hf_moe.layers.moe_layers import moe_layers
from tiny_hf_moe import random_ids

# transformers 5.17 knows no ep_size
KNOWN = signature(DistributedConfig).parameters
LAYOUTS = {"fsdp": {"fsdp_size": 2}, "fsdp, ep": {"fsdp_size": 2, "ep_size": 2}, "tp": {"tp_size": 2}}
LAYOUTS = {name: layout for name, layout in LAYOUTS.items() if layout.keys() <= KNOWN.keys()}


def load(folder, layout):
    """`fully_shard` is what accelerate's FSDP version 2 applies; here it keeps what a forward gathers."""
    if layout != "fully_shard":
        config = DistributedConfig(**LAYOUTS[layout])
        return AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=config)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=False)
    return fully_shard(model)


def outcome(folder: Path, layout: str) -> dict:
    model = load(folder, layout).train()
    ids = random_ids()
    model(ids, labels=ids)  # gathers weights, some of which stay so
    digest = freeze_router(model)
    record = folder / layout
    save_router_hash(record, model)
    dist.barrier()
    weights = [layer.router.weight for layer in moe_layers(model)]
    model(ids, labels=ids).loss.backward()
    found = {
        "hash": digest,
        "sharded": all(isinstance(weight.data, DTensor) for weight in weights),
        "trainable": any(weight.requires_grad or weight.grad is not None for weight in weights),
        "same base": verify_adapter_base(record, model, strict=True),
    }
    with torch.no_grad():
        weights[-1].mul_(1.5)
    try:
        verify_router_frozen(model, digest)
        found["change"] = "not found"
    except RouterNotFrozenError:
        found["change"] = "found"
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    outcomes = {layout: outcome(folder, layout) for layout in [*LAYOUTS, "fully_shard"]}
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()
