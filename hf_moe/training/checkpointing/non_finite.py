"""Stop a run at a loss or gradient that is NaN or infinite, with the rows of the data that it came from.

One such step turns all weights into NaN; the Trainer continues, logs a loss of 0.0 (`logging_nan_inf_filter`) and
saves.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler
from transformers import Trainer

from hf_moe.training.checkpointing.cpu_copy import CpuCopy

Rows = tuple[int, ...]


class NonFiniteError(FloatingPointError):
    """Training has diverged: a loss, a gradient or a weight is NaN or infinite.

    Attributes:
        step: The optimizer step, counted from 1.
        micro_batches: Which of the step's batches had such a loss, counted from 1; empty if all losses are finite.
        rows: Their indices in the training data set; empty if the sampler does not give them.
        checkpoint: The last checkpoint of this run, from before, or None.
    """

    def __init__(self, what: str, step: int, micro_batches: Rows = (), rows: Rows = (), checkpoint: str | None = None):
        self.step, self.micro_batches, self.rows, self.checkpoint = step, micro_batches, rows, checkpoint
        last = f"{checkpoint!r} is from before and good" if checkpoint else "no checkpoint had been saved"
        super().__init__(
            f"{what} at step {step}: training has diverged, and nothing of it was saved; {last}. Look at the data of "
            "this step, or lower the learning rate."
        )


class FiniteTrainingMixin(Trainer):
    """Stops at the first step whose loss or gradient norm is not finite.

    On the CPU before the optimizer uses it. On a GPU a step later, as reading a value at once would stop the device:
    the values are copied while the next step runs; what is saved is always checked first. With the gradient scaler of
    float16, which skips steps whose gradients overflow, only the loss is checked.
    """

    last_checkpoint: str | None = None
    """The checkpoint that this run saved last, or came from."""
    _unread: "deque[_Step]"

    def get_train_dataloader(self) -> DataLoader:
        dataloader = super().get_train_dataloader()
        self._unread = deque()
        self._row_log = _RowLog.of(dataloader, self.args)
        return dataloader

    def _run_epoch(self, **epoch: Any) -> None:
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            # nothing is left to do for a run that resumed: the Trainer would do one more step
            self.control.should_training_stop = True
            return
        resumed = epoch["resume_from_checkpoint"] is not None and epoch["epoch"] == epoch["epochs_trained"]
        self._micro_batch = epoch["steps_trained_in_current_epoch"] if resumed else 0
        self._losses: list[Tensor] = []
        super()._run_epoch(**epoch)
        self.check_finite()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        self._micro_batch += 1
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once a step, after the last backward and before the optimizer."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        values = [*self._losses, self._checked_norm(grad_norm)]
        copy = CpuCopy(torch.stack([value.detach().float().to(self.args.device) for value in values]))
        first = self._micro_batch - len(self._losses)
        rows = self._row_log.rows(range(first, self._micro_batch)) if self._row_log else []
        self._unread.append(_Step(self.state.global_step + 1, copy, rows))
        self._losses = []
        self.check_finite(leave=1 if self.args.device.type == "cuda" else 0)
        return grad_norm

    def check_finite(self, leave: int = 0) -> None:
        """Raise NonFiniteError if a step was not finite, for all but the `leave` newest steps."""
        while len(self._unread) > leave:
            self._unread.popleft().check(self.last_checkpoint)

    def _checked_norm(self, grad_norm: Any) -> Tensor:
        if grad_norm is None or self.accelerator.scaler is not None:
            return torch.zeros(())
        return grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else torch.as_tensor(grad_norm)


@dataclass(frozen=True)
class _Step:
    """The values to check of a step: the losses of its micro-batches, then the gradient norm."""

    step: int
    values: CpuCopy
    rows: list[Rows]

    def check(self, checkpoint: str | None) -> None:
        *losses, norm = self.values.tolist()
        bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            rows = tuple(row for number in bad if self.rows for row in self.rows[number])
            where = f"in micro-batch {_few([n + 1 for n in bad])} of {len(losses)}{_named(rows)}"
            what = f"the loss is {losses[bad[0]]} {where}"
            raise NonFiniteError(what, self.step, tuple(n + 1 for n in bad), rows, checkpoint)
        if not math.isfinite(norm):
            rows = tuple(row for batch in self.rows for row in batch)
            what = f"the gradient norm is {norm}, though the losses are finite{_named(rows)},"
            raise NonFiniteError(what, self.step, (), rows, checkpoint)


def non_finite_weight(model: nn.Module) -> str | None:
    """The name of a trained parameter with a NaN or infinite value, or None."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.numel():
            least, most = parameter.detach().aminmax()  # NaN wins; makes no second tensor as isfinite does
            if not bool((least.isfinite() & most.isfinite()).all()):
                return name
    return None


class _RowLog:
    """Rows of the data set by micro-batch of this process."""

    def __init__(self, sampler: "_Recorder", batch_size: int, processes: int, process: int):
        self.sampler, self.batch_size, self.processes, self.process = sampler, batch_size, processes, process

    @classmethod
    def of(cls, dataloader: DataLoader, args: Any) -> "_RowLog | None":
        """Put a recorder around the sampler; None if the loader's batches do not follow from its sampler alone."""
        from accelerate.data_loader import BatchSamplerShard

        batches, processes, process = dataloader.batch_sampler, 1, 0
        if isinstance(batches, BatchSamplerShard) and not batches.split_batches:
            processes, process, batches = batches.num_processes, batches.process_index, batches.batch_sampler
        if type(batches) is not BatchSampler or isinstance(dataloader.dataset, IterableDataset):
            return None
        ahead = 4 + 2 * args.gradient_accumulation_steps + dataloader.num_workers * (dataloader.prefetch_factor or 0)
        batches.sampler = _Recorder(batches.sampler, ahead * processes * batches.batch_size)
        return cls(batches.sampler, batches.batch_size, processes, process)

    def rows(self, micro_batches: range) -> list[Rows]:
        """By micro-batch, which are counted from the beginning of the epoch."""
        begins = [(number * self.processes + self.process) * self.batch_size for number in micro_batches]
        return [self.sampler.between(begin, begin + self.batch_size) for begin in begins]


class _Recorder(Sampler):
    """A sampler that remembers the last indices it gave, and is otherwise the one inside."""

    def __init__(self, sampler: Any, most: int):
        self.sampler = sampler
        self.recent: deque[int] = deque(maxlen=most)
        self.count = 0

    def __iter__(self) -> Iterator[int]:
        self.recent.clear()
        self.count = 0
        for index in self.sampler:
            self.recent.append(index)
            self.count += 1
            yield index

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def between(self, begin: int, end: int) -> Rows:
        """The indices given from position `begin` to `end` of this epoch, as far as they are remembered."""
        oldest = self.count - len(self.recent)
        return tuple(self.recent[at - oldest] for at in range(max(begin, oldest), min(end, self.count)))


def _few(numbers: Any) -> str:
    listed = [str(number) for number in numbers]
    return ", ".join(listed if len(listed) <= 16 else [*listed[:16], f"and {len(listed) - 16} more"])


def _named(rows: Rows) -> str:
    return f" (rows {_few(rows)} of the training data)" if rows else ""
