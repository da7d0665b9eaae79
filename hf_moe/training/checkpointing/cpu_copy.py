"""Numbers on their way from the device to the CPU."""

import torch
from torch import Tensor


class CpuCopy:
    """A copy of a tensor in CPU memory, begun now and read later, so that a GPU need not stop for it."""

    def __init__(self, values: Tensor):
        self._done: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._values = values.cpu()

    def tolist(self) -> list[float]:
        """The values; waits until the device has got to where the copy was begun."""
        if self._done is not None:
            self._done.synchronize()
        return self._values.tolist()
