"""Weights of which a process holds a part: DTensors (FSDP2, tensor parallelism), FSDP version 1, DeepSpeed ZeRO-3."""

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def reshard(model: nn.Module) -> None:
    """Give back what FSDP2 gathered for a forward, so that parameters are the sharded ones, which are trained.

    It keeps the modules with `reshard_after_forward=False` gathered until a backward (under `DistributedConfig`
    the last norm and the head): `parameters()` then yields plain tensors that are thrown away later.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """True if a parameter is a DTensor."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_tensor(tensor: Tensor, name: str) -> Tensor:
    """The tensor on the CPU, gathered if it is a DTensor: every process of its mesh calls this, in one order.

    Raises:
        ValueError: If its values are not there (meta device), or DeepSpeed keeps them elsewhere (ZeRO stage 3).
    """
    if tensor.is_meta:
        raise ValueError(f"router {name} is on the meta device: it has no weights. Load the model first.")
    if hasattr(tensor, "ds_status"):
        raise ValueError(
            f"router {name} is partitioned by DeepSpeed ZeRO-3, where it has no values to compare. Train with ZeRO-2 "
            "or FSDP2, or without the proof of frozen routers."
        )
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def refuse_flat_shards(model: nn.Module) -> None:
    """Raises ValueError if FSDP version 1 holds the weights: a router's parameters are then pieces of flat ones."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "FSDP version 1 keeps no router as a tensor of its own, so it cannot be compared. Use version 2 "
            '(fsdp_config={"fsdp_version": 2}).'
        )
