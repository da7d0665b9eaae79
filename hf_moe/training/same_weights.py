"""Several processes train one model: an evaluation before training must not part them, and the first step proves it.

`evaluate()` and `predict()` before `train()` prepare the bare model; accelerate remembers that, and the Trainer
(transformers 5.17 to 5.24) then trains it without DistributedDataParallel, each process by itself. Under
`DistributedConfig` any forward before training leaves gathered weights, of which an optimizer that is made then steps
copies (up to 5.23).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_moe.adapters.sharded import reshard

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# accelerate's mark on a model that `prepare` is to return as it is
_PREPARED = "_is_accelerate_prepared"


class SameWeightsError(RuntimeError):
    """The processes of a run do not train one model; names the weight, and the reason."""


class SameWeightsCallback(TrainerCallback):
    """Prove after the first optimizer step that all processes have the same gradients and weights, bit for bit.

    For any Trainer; ours have it. It reads every trained weight that processes hold alike (DistributedDataParallel,
    adapters on sharded models, replicas of FSDP2) once and sends 32 bytes for each. Of weights that FSDP2 shards the
    optimizer must have the shards. Not looked at: replicas of tensor parallelism, whose last bits may differ, FSDP
    version 1 and DeepSpeed.

    Raises:
        SameWeightsError: From the Trainer's `train`, in every process.
    """

    _is_proved = False

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self._is_proved = False
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            _refuse_copies(model, optimizer)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        is_skipped = isinstance(optimizer, AcceleratedOptimizer) and optimizer.step_was_skipped
        if not self._is_proved and not is_skipped:
            self._is_proved = True
            if args.deepspeed_plugin is None:
                prove_same_weights(model, args.device)


class SameWeightsMixin(_Trainer):
    """Base class before a Trainer: undo what an evaluation before `train` left, and add `SameWeightsCallback`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(SameWeightsCallback())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        forget_evaluation(self)
        return super().train(*args, **kwargs)


def forget_evaluation(trainer: Any) -> None:
    """Before training, undo what an evaluation did to the model of several processes."""
    model = trainer.model
    reshard(model)
    wraps_itself = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if trainer.accelerator.num_processes == 1 or wraps_itself or _PREPARED not in vars(model):
        return
    delattr(model, _PREPARED)
    if getattr(trainer.model_wrapped, "_orig_mod", None) is model:  # compiled for evaluation, and not wrapped
        trainer.model_wrapped = model


def prove_same_weights(model: nn.Module, device: torch.device) -> None:
    """Compare what several processes hold alike; all of them call this between the optimizer's step and `zero_grad`.

    Raises:
        SameWeightsError: Naming the first weight that differs.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    by_group: dict[Any, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in _replicas(model):
        for group in _groups(parameter):
            by_group.setdefault(group, []).append((name, parameter))
    different: dict[str, list[bool]] = {}
    for group, parameters in by_group.items():
        marks = torch.stack([torch.stack([_bits(p.grad, device), _bits(p, device)]) for _, p in parameters])
        extremes = torch.stack([marks, ~marks])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
        differs = (extremes[0] != ~extremes[1]).tolist()
        different |= {name: flags for (name, _), flags in zip(parameters, differs, strict=True) if any(flags)}
    if different:
        name, (gradient, _) = next(iter(different.items()))
        raise SameWeightsError(_reason(model, name, gradient))


def _replicas(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters that several processes may hold alike."""
    has_flat_shards = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    if has_flat_shards or (getattr(model, "tp_size", None) or 1) > 1:
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def _groups(parameter: Tensor) -> list[Any]:
    """Processes that hold the same part of the parameter; None stands for all."""
    data = parameter.data
    if not isinstance(data, DTensor):
        return [None]
    mesh, names = data.device_mesh, data.device_mesh.mesh_dim_names or ()
    return [mesh.get_group(name) for name in names if name == "dp_replicate" and mesh[name].size() > 1]


def _bits(tensor: Tensor | None, device: torch.device) -> Tensor:
    """The sum of the values' bit patterns, int64: the same on every device and in every order."""
    if tensor is None or tensor.layout != torch.strided:
        return torch.zeros((), dtype=torch.int64, device=device)
    data = tensor.detach()
    local = data.to_local() if isinstance(data, DTensor) else data
    return local.contiguous().view(_INTEGERS[local.element_size()]).sum(dtype=torch.int64).to(device)


def _reason(model: nn.Module, name: str, gradient: bool) -> str:
    what = "gradients" if gradient else "weights"
    finding = f"after the first optimizer step the processes have different {what} ({name!r}): they train apart. "
    if gradient and _PREPARED in vars(model):
        return finding + (
            "evaluate() or predict() came before train(), which makes the Trainer leave out DistributedDataParallel. "
            "Take eval_on_start=True instead, or a class of hf_moe's SafeCheckpointMixin and your Trainer."
        )
    if gradient:
        return finding + "The model is not wrapped in DistributedDataParallel, or gradients are not averaged."
    return (
        finding + "Their gradients are the same: the weights differed before, or the optimizer draws random numbers."
    )


def _refuse_copies(model: nn.Module, optimizer: Any) -> None:
    """Raises SameWeightsError if the optimizer has parameters that the model no longer has."""
    reshard(model)
    own = {id(parameter) for parameter in model.parameters()}
    steps = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if lost := sum(id(parameter) not in own for parameter in steps):
        raise SameWeightsError(
            f"the optimizer has {lost} parameters that are not the model's: a forward before training gathered "
            "weights of FSDP2, and what was gathered would be trained and thrown away. Call reshard() on every "
            "FSDPModule before the optimizer is made, or take MoeTrainer, which does."
        )
