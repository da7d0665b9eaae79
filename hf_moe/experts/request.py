"""Request, the record that a backend is chosen by, and Backend, one row of their table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hf_moe.experts.pipeline import Operators
from hf_moe.layers.storage import ExpertStorage


class Request(NamedTuple):
    """A call of experts, as far as it decides what runs them; constants, so that torch.compile can take the answer.

    Attributes:
        experts: The module.
        format: Of its storage.
        dtype: That its storage computes in.
        device: Where it runs.
        widths: Of one expert's down projection, out and in.
        many_rows: Whether an expert gets, on average, at least the rows of the chip's entry in `crossover.json`.
        adapted: Whether low-rank factors come with the call, or are the experts. transformers' kernels cannot take
            them, and no number of rows takes them from the fused operators.
    """

    experts: Any
    format: str
    dtype: torch.dtype
    device: torch.device
    widths: tuple[int, int]
    many_rows: bool = False
    adapted: bool = False


def request_for(
    experts: Any,
    storage: ExpertStorage,
    device: torch.device | None = None,
    many_rows: bool = False,
    adapted: bool = False,
) -> Request:
    """A request for experts in `storage`, on its device or on another."""
    device = storage.device if device is None else device
    return Request(experts, storage.format, storage.dtype, device, storage.shape("down"), many_rows, adapted)


# why it cannot be run, as a sentence that ends with a way out; None: it can. Slowness and memory are no reason
Refusal = Callable[[Request], str | None]


def refuses_nothing(request: Request) -> None:
    """No reason against any request."""


def suits_nothing(request: Request) -> None:
    """No reason for any request."""


@dataclass(frozen=True)
class Backend:
    """One row of the table.

    Attributes:
        name: Of the row.
        refuses: Why it cannot run a request.
        load: Imports, and builds if it must, its operators; None for transformers' own and for the reference.
            RuntimeError: they cannot be built.
        takes: Formats of weights that it reads; None for every storage that multiplies by itself.
        suits: Why `hf_moe` would choose it for a request; None: not for this one.
        asked_for_as: For `experts_implementation=`, where several rows share a name: the first that can runs.
        takes_low_rank: Whether the factors of adapters on the experts may come with the call.
    """

    name: str
    refuses: Refusal = refuses_nothing
    load: Callable[[], Operators] | None = None
    takes: tuple[str, ...] | None = None
    suits: Callable[[Request], str | None] = suits_nothing
    asked_for_as: str = ""
    takes_low_rank: bool = False

    @property
    def public_name(self) -> str:
        """Name that a user asks for."""
        return self.asked_for_as or self.name
