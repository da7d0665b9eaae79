"""Whole models against the float64 reference: logits, training loss and the gradient of every parameter.

The exact model is the same model with each MoE block computed by `hf_moe.reference` (loops over tokens and slots)
and the balancing losses by the reference too; attention, norms and the task's loss (computed in float32)
are those of transformers on both sides.
"""

import copy
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from hf_moe import reference
from hf_moe.models.modeling_hf_moe import HfMoeForCausalLM, HfMoeForTokenClassification, HfMoeSparseMoeBlock
from hf_moe.reference import MoeWeights, Route, RouterSpec
from tiny_hf_moe import DECODERS, ENCODERS, encoder_config, left_padded, random_ids, tiny_config

# sums in another order, in float64
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
COEFFICIENTS = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in ENCODERS:
        model = HfMoeForTokenClassification(encoder_config(**ENCODERS[name], **COEFFICIENTS))
    else:
        model = HfMoeForCausalLM(tiny_config(**DECODERS[name], **COEFFICIENTS))
    model.set_experts_implementation("eager")
    with torch.no_grad():  # routers far from ties, a bias that changes choices
        for block in sparse_blocks(model):
            block.gate.weight.normal_(std=1.0)
            if block.gate.e_score_correction_bias is not None:
                block.gate.e_score_correction_bias.normal_(std=0.1)
    return model.double().train()


def sparse_blocks(model: nn.Module) -> list[HfMoeSparseMoeBlock]:
    return [module for module in model.modules() if isinstance(module, HfMoeSparseMoeBlock)]


def use_reference(block: HfMoeSparseMoeBlock, mask: Tensor, routes: list[Route]) -> None:
    """Let the block compute with the reference, and add each decision to `routes`."""
    config = block.gate.config
    spec = RouterSpec(**{field.name: getattr(config, field.name) for field in fields(RouterSpec)})

    def forward(hidden_states: Tensor, token_mask: Tensor | None = None, late_gradient: None = None) -> Tensor:
        shared = block.shared_experts
        weights = MoeWeights(
            block.gate.weight,
            block.experts.gate_up_proj,
            block.experts.down_proj,
            shared and (shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight),
            block.gate.e_score_correction_bias,
        )
        tokens = hidden_states.flatten(0, 1)
        noise = None
        if config.router_jitter_noise:
            amount = config.router_jitter_noise
            noise = torch.empty_like(tokens).uniform_(1 - amount, 1 + amount)
        output, route = reference.moe_block(tokens, weights, spec, noise_TH=noise, token_mask_T=mask, training=True)
        routes.append(route)
        return output.view_as(hidden_states)

    block.forward = forward


def exact(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and training loss with the reference in every MoE block."""
    config, routes = model.config, []
    flat = mask.bool().flatten()
    for block in sparse_blocks(model):
        use_reference(block, flat, routes)
    torch.manual_seed(1)
    logits = model(ids, attention_mask=mask).logits
    size = config.vocab_size if isinstance(model, HfMoeForCausalLM) else config
    task = model.loss_function(logits, labels, size)
    # layers may differ in their number of experts: a mean over layers of each layer's loss
    blocks = sparse_blocks(model)
    balance = [
        reference.load_balancing_loss([route], block.num_experts, config.num_null_experts, flat)
        for route, block in zip(routes, blocks, strict=True)
    ]
    z = reference.z_loss(routes, flat)
    return logits, task + config.router_aux_loss_coef * torch.stack(balance).mean() + config.router_z_loss_coef * z


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_logits_loss_and_every_gradient(name):
    model = build(name)
    twin = copy.deepcopy(model)
    ids, mask = left_padded(random_ids(), 3)
    labels = (ids if name in DECODERS else ids % 2).masked_fill(mask == 0, -100)

    torch.manual_seed(1)
    outputs = model(ids, attention_mask=mask, labels=labels)
    outputs.loss.backward()
    logits, loss = exact(twin, ids, mask, labels)
    loss.backward()

    real = mask.bool()
    torch.testing.assert_close(outputs.logits[real], logits[real], **CLOSE)
    torch.testing.assert_close(outputs.loss, loss, **CLOSE)
    expected = dict(twin.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[parameter_name].grad, **CLOSE, msg=lambda text, at=parameter_name: f"{at}: {text}"
        )
