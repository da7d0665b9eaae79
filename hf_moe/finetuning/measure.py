"""Held-out metrics of every domain: loss, bits per byte of the tokens that have a label, chosen experts, samples."""

import math
import time
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from hf_moe.comparison.routing_agreement import RoutingChoices, record_choices
from hf_moe.data.encoding import IGNORED
from hf_moe.data.packing import Rows
from hf_moe.finetuning.domains import Measurable
from hf_moe.finetuning.prepare import Job
from hf_moe.finetuning.samples import Sample, write_samples
from hf_moe.observability.health import Health
from hf_moe.observability.recording import record_routing


@dataclass(frozen=True)
class HeldOut:
    """Negative log-likelihood of the labelled tokens in nats, and what it is divided by."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "loss": self.loss, "bits_per_byte": self.bits_per_byte}


@torch.no_grad()
def evaluate_rows(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Rows, *, batch_size: int = 8) -> HeldOut:
    """Measure every labelled token once; logits in float32, the sum in float64.

    Raises:
        ValueError: If no token has a label, or the labelled tokens are no text.
    """
    num_bytes = text_bytes(tokenizer, rows)
    if not rows.loss_tokens or not num_bytes:
        raise ValueError("no held-out token has a label: there is nothing to measure. Hold out more records.")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats = 0.0
    try:
        for begin in range(0, len(rows), batch_size):
            end = begin + batch_size
            batch = {name: column[begin:end].long().to(device) for name, column in rows.columns.items()}
            labels = batch.pop("labels")[:, 1:].flatten()
            logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            keep = labels != IGNORED
            loss = F.cross_entropy(logits[keep].float(), labels[keep], reduction="none")
            nats += float(loss.double().sum())
    finally:
        model.train(was_training)
    return HeldOut(nats, int((rows.columns["labels"][:, 1:] != IGNORED).sum()), num_bytes)


def text_bytes(tokenizer: PreTrainedTokenizerBase, rows: Rows) -> int:
    """UTF-8 bytes of the labelled text, without special tokens."""
    total = 0
    for labels in rows.columns["labels"]:
        ids = labels[labels != IGNORED].tolist()
        total += len(tokenizer.decode(ids, skip_special_tokens=True).encode())
    return total


@dataclass(frozen=True)
class Measured:
    """Held-out metrics and chosen experts by domain; `health` is the verdict on the routing of all.

    `samples` is what the model wrote, `sample_seconds` the time that this took.
    """

    metrics: dict[str, HeldOut]
    choices: dict[str, RoutingChoices]
    health: Health
    samples: list[Sample]
    sample_seconds: float


def measure(job: Job[Measurable], model: nn.Module) -> Measured:
    """Held-out loss of every domain, the experts chosen for its tokens, the routing's health, and a few samples."""
    batch_size, domains = job.training.per_device_eval_batch_size, job.data.domains
    metrics = {
        name: evaluate_rows(model, job.tokenizer, domain.held_out_rows, batch_size=batch_size)
        for name, domain in domains.items()
    }
    with record_routing(model) as trace:
        choices = {
            name: record_choices(model, domain.probe(job.data.longest), batch_size=batch_size)
            for name, domain in domains.items()
        }
    begin = time.perf_counter()
    samples = write_samples(job, model)
    return Measured(metrics, choices, trace.health(), samples, time.perf_counter() - begin)
