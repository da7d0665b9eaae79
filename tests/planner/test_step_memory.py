"""The estimate of a training step's memory against the peak that a profiler sees."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hf_moe.adapters.expert_lora import accelerate_adapters, expert_lora_config
from hf_moe.planner.saved_bytes import saved_bytes
from hf_moe.planner.step_memory import StepMemory, measured_step_memory
from tiny_hf_moe import tiny_config
from tiny_models import build_tiny
from tiny_moe import hf_moe_model

FACTOR = 1.15  # the banner says "about"


def row_of(length: int, vocab: int = 300) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(length)}


def with_lora(model):
    model = get_peft_model(model, expert_lora_config(model, r=4))
    accelerate_adapters(model)
    return model


def peak(model: nn.Module, row: dict[str, torch.Tensor], batch_size: int, accumulation: int) -> int:
    """Weights, moments, and the largest sum of bytes that a step allocates above those at its start."""
    batch = {name: column.expand(batch_size, -1).clone() for name, column in row.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()

    def step() -> None:
        for _ in range(accumulation):
            model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the moments
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        largest = max(largest, total)
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    return sum(p.nbytes for p in model.parameters()) + moments + largest


SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 600, "max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("family", "adapted", "options", "batch_size"),
    [
        ("hf_moe", False, {}, 6),
        ("hf_moe", True, {"accumulates": True}, 4),
        ("qwen3_moe", True, {"checkpointing": True}, 8),
        ("mixtral", False, {"accumulates": True, "checkpointing": True}, 4),
        ("qwen3_moe", True, {"bfloat16": True}, 6),
    ],
)
def test_the_estimate_is_near_the_peak(family, adapted, options, batch_size):
    model = hf_moe_model(**SIZES) if family == "hf_moe" else build_tiny(family, **SIZES)[0]
    options = dict(options)
    model = model.bfloat16() if options.pop("bfloat16", False) else model
    model = with_lora(model) if adapted else model
    row = row_of(96)
    estimate = measured_step_memory(model, row, batch_size=batch_size, **options)
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    measured = peak(model, row, batch_size, accumulation=2 if options.get("accumulates") else 1)
    assert measured / FACTOR < estimate.total < measured * FACTOR


def test_a_look_changes_nothing():
    model = hf_moe_model(router_jitter_noise=0.1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    measured_step_memory(model, row_of(16, 60), batch_size=2)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_weights_are_not_counted_as_activations():
    config = tiny_config()
    model = hf_moe_model()
    rows = (row_of(length, config.vocab_size) for length in (16, 32))
    one, two = (saved_bytes(model, {name: column[None] for name, column in row.items()}) for row in rows)
    assert 1.8 < two / one < 2.2  # grows with the tokens; weights would not


def test_frozen_weights_need_no_gradients():
    model = hf_moe_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)
    memory = measured_step_memory(model, row_of(8, 60), batch_size=1)
    assert memory.gradients == model.model.embed_tokens.weight.nbytes
    assert memory.optimizer == 2 * memory.gradients


def test_it_says_about_and_the_parts():
    memory = StepMemory(2**30, 2**21, 2**20, 3 * 2**20, 2**20, accumulates=False)
    assert memory.total == 2**30 + 6 * 2**20
    assert str(memory).startswith("about 1.0 GiB at the peak: weights 1.0 GiB, optimizer 2 MiB, gradients 1 MiB")
    assert "activations 4 MiB" in str(memory)
