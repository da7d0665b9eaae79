"""The MoE block of every routing mode against the float64 reference: decision, output, every gradient, both losses.

float64 must agree to a few units in the last place, float32 to the a-priori rounding bound, bfloat16 to twice the
error of plain torch. The choice of experts must be the exact one in every dtype.
"""

from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from hf_moe import reference
from hf_moe.models.configuration_hf_moe import HfMoeConfig
from hf_moe.models.losses import load_balancing_loss, router_z_loss
from hf_moe.models.modeling_hf_moe import HfMoeForCausalLM, HfMoeRouter, HfMoeSparseMoeBlock
from hf_moe.reference import MoeWeights, Route, RouterSpec
from numerics import assert_as_good_as, assert_within, block_bounds, plain_experts

ENCODER = {"routing": "expert_choice", "is_causal": False, "use_cache": False}
GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
SIGMOID = {"router_scoring": "sigmoid"}

VARIANTS: dict[str, dict] = {
    "top_k": {},
    "top_1": {"num_experts_per_tok": 1},
    "every_expert": {"num_experts_per_tok": 8},
    "one_expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "unnormalised": {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "sigmoid": {**SIGMOID, "routed_scaling_factor": 2.5},
    "sigmoid_unnormalised": {**SIGMOID, "norm_topk_prob": False},
    "softmax_bias": {"router_bias": True},
    "sigmoid_bias": {**SIGMOID, "router_bias": True},
    "softmax_groups": GROUPS,
    "deepseek_v3": {**SIGMOID, **GROUPS, "router_bias": True, "routed_scaling_factor": 2.5, "num_shared_experts": 1},
    "null": {"num_null_experts": 4, "num_experts_per_tok": 3},
    "null_sigmoid_bias": {**SIGMOID, "num_null_experts": 4, "router_bias": True},
    "null_unnormalised": {"num_null_experts": 4, "norm_topk_prob": False},
    "more_null_than_experts": {"num_experts": 2, "num_null_experts": 8, "num_experts_per_tok": 4},
    "top_p": {"routing": "top_p", "router_top_p": 0.5, "num_experts_per_tok": 4},
    "top_p_unnormalised": {"routing": "top_p", "router_top_p": 0.5, "num_experts_per_tok": 4, "norm_topk_prob": False},
    "top_p_all": {"routing": "top_p", "router_top_p": 1.0, "num_experts_per_tok": 8},
    "dense": {"routing": "dense"},
    "dense_sigmoid": {"routing": "dense", **SIGMOID, "routed_scaling_factor": 0.5},
    "dense_sigmoid_unnormalised": {"routing": "dense", **SIGMOID, "norm_topk_prob": False},
    "expert_choice": {**ENCODER, "norm_topk_prob": False},
    "expert_choice_normalised": {**ENCODER, "norm_topk_prob": True},
    "expert_choice_sigmoid_scaled": {**ENCODER, **SIGMOID, "norm_topk_prob": False, "routed_scaling_factor": 2.0},
    "expert_choice_capacity": {**ENCODER, "norm_topk_prob": False, "capacity_factor": 1.7},
    "expert_choice_takes_all": {**ENCODER, "norm_topk_prob": False, "capacity_factor": 8.0},
    "capacity_position": {"capacity_factor": 0.8},
    "capacity_probability": {"capacity_factor": 0.8, "drop_policy": "probability"},
    "capacity_probability_unnormalised": {
        "capacity_factor": 0.8,
        "drop_policy": "probability",
        "norm_topk_prob": False,
    },
    "capacity_top_p": {"routing": "top_p", "router_top_p": 0.5, "num_experts_per_tok": 4, "capacity_factor": 0.3},
    "capacity_null": {"num_null_experts": 4, "num_experts_per_tok": 3, "capacity_factor": 0.5},
    "shared": {"num_shared_experts": 2},
    "gelu": {"hidden_act": "gelu"},
    "jitter": {"router_jitter_noise": 0.1},
}
MASKED = ("top_k", "null", "expert_choice", "capacity_position", "capacity_probability", "capacity_null")
TOKENS = 24
PARAMETERS = {"gate.weight": "router", "experts.gate_up_proj": "gate_up_proj", "experts.down_proj": "down_proj"}
SHARED = {f"shared_experts.{part}_proj.weight": f"shared_{part}" for part in ("gate", "up", "down")}


@dataclass
class Result:
    route: Route
    out: Tensor
    gradients: dict[str, Tensor]


def tiny_config(variant: str, backend: str = "eager") -> HfMoeConfig:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    config = HfMoeConfig(**{**sizes, **heads, "num_experts": 8, "num_experts_per_tok": 2, **VARIANTS[variant]})
    config._experts_implementation = backend
    return config


def router_spec(config: HfMoeConfig) -> RouterSpec:
    return RouterSpec(**{field.name: getattr(config, field.name) for field in fields(RouterSpec)})


def build_block(config: HfMoeConfig, dtype: torch.dtype) -> HfMoeSparseMoeBlock:
    """A block in training mode whose parameters are random and exact in bfloat16."""
    block = HfMoeSparseMoeBlock(config, config)
    with torch.no_grad():
        for tensor in [*block.parameters(), *block.buffers()]:
            tensor.copy_((0.4 * torch.randn(tensor.shape)).bfloat16())
    return block.to(dtype).train()


def build_inputs(dtype: torch.dtype, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    hidden, cotangent = torch.randn(2, tokens, 16).bfloat16().to(dtype)
    return hidden.requires_grad_(), cotangent


def padding(masked: bool, tokens: int = TOKENS) -> Tensor | None:
    return torch.arange(tokens) % 5 != 1 if masked else None


def run_block(block: HfMoeSparseMoeBlock, hidden: Tensor, cotangent: Tensor, mask: Tensor | None) -> Result:
    torch.manual_seed(1)
    _, weights, index, decision = block.gate(hidden, mask)
    torch.manual_seed(1)
    out = block(hidden[None], None if mask is None else mask[None])[0]
    named = {"hidden": hidden, **{(PARAMETERS | SHARED)[name]: leaf for name, leaf in block.named_parameters()}}
    gradients = torch.autograd.grad(out, list(named.values()), cotangent)
    route = Route(decision.router_logits, decision.scores, weights, index, decision.choice)
    return Result(route, out, dict(zip(named, gradients, strict=True)))


def reference_leaves(block: HfMoeSparseMoeBlock, hidden: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    named = {"hidden": hidden, **{(PARAMETERS | SHARED)[name]: leaf for name, leaf in block.named_parameters()}}
    return {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in named.items()}


def reference_weights(block: HfMoeSparseMoeBlock, leaves: dict[str, Tensor]) -> MoeWeights:
    shared = tuple(leaves[name] for name in SHARED.values()) if block.shared_experts is not None else None
    bias = block.gate.e_score_correction_bias
    bias = None if bias is None else bias.detach().to(torch.promote_types(leaves["hidden"].dtype, torch.float32))
    return MoeWeights(leaves["router"], leaves["gate_up_proj"], leaves["down_proj"], shared, bias)


def jitter(block: HfMoeSparseMoeBlock, hidden: Tensor) -> Tensor | None:
    """The noise that the router draws, in the precision that it draws it in."""
    amount = block.gate.config.router_jitter_noise
    if not (amount and block.training):
        return None
    torch.manual_seed(1)
    noise = torch.empty_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return noise.uniform_(1 - amount, 1 + amount)


def run_reference(
    block: HfMoeSparseMoeBlock, hidden: Tensor, cotangent: Tensor, mask: Tensor | None, dtype=torch.float64
) -> Result:
    config = block.gate.config
    leaves = reference_leaves(block, hidden, dtype)
    noise = jitter(block, hidden)
    out, route = reference.moe_block(
        leaves["hidden"],
        reference_weights(block, leaves),
        router_spec(config),
        act=block.experts.act_fn,
        noise_TH=None if noise is None else noise.to(dtype),
        token_mask_T=mask,
        training=block.training,
    )
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent.to(dtype))
    return Result(route, out, dict(zip(leaves, gradients, strict=True)))


def plain_block(block: HfMoeSparseMoeBlock, hidden: Tensor, cotangent: Tensor, mask: Tensor | None) -> Result:
    """The block in plain torch, in the dtype of `hidden`, with the router in float32."""
    leaves = reference_leaves(block, hidden, hidden.dtype)
    weights = reference_weights(block, leaves)
    spec = router_spec(block.gate.config)
    route = reference.route(
        leaves["hidden"], weights.router, spec, bias_X=weights.bias, token_mask_T=mask, training=block.training
    )
    out = plain_experts(leaves["hidden"], route.index_TK, route.weights_TK, weights.gate_up_proj, weights.down_proj)
    if weights.shared is not None:
        out = out + reference.mlp(leaves["hidden"], *weights.shared)
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent)
    return Result(route, out, dict(zip(leaves, gradients, strict=True)))


def assert_same_choice(actual: Route, exact: Route) -> None:
    assert torch.equal(actual.choice_TK, exact.choice_TK), "choice"
    assert torch.equal(actual.index_TK, exact.index_TK), "index"


def cases(variants=VARIANTS):
    return [(variant, False) for variant in variants] + [(variant, True) for variant in variants if variant in MASKED]


@pytest.mark.parametrize(("variant", "masked"), cases())
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_float64_is_exact(variant, masked, training):
    block = build_block(tiny_config(variant), torch.float64).train(training)
    hidden, cotangent = build_inputs(torch.float64)
    mask = padding(masked)
    actual = run_block(block, hidden, cotangent, mask)
    exact = run_reference(block, hidden, cotangent, mask)
    assert_same_choice(actual.route, exact.route)
    tight = {"rtol": 1e-10, "atol": 1e-12}
    for name in ("logits_TX", "scores_TX", "weights_TK"):
        torch.testing.assert_close(getattr(actual.route, name), getattr(exact.route, name), **tight)
    torch.testing.assert_close(actual.out, exact.out, **tight)
    for name, gradient in exact.gradients.items():
        torch.testing.assert_close(actual.gradients[name], gradient, **tight, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("variant", "masked"), cases([name for name in VARIANTS if name != "gelu"]))
@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
def test_float32_is_within_the_rounding_bound(variant, masked, backend):
    block = build_block(tiny_config(variant, backend), torch.float32)
    hidden, cotangent = build_inputs(torch.float32)
    mask = padding(masked)
    actual = run_block(block, hidden, cotangent, mask)
    exact = run_reference(block, hidden, cotangent, mask)
    assert_same_choice(actual.route, exact.route)
    leaves = reference_leaves(block, hidden, torch.float64)
    bounds = block_bounds(
        leaves["hidden"], reference_weights(block, leaves), router_spec(block.gate.config), exact.route, cotangent
    )
    assert actual.route.weights_TK.dtype == torch.float32
    assert_within(actual.route.weights_TK, exact.route.weights_TK, bounds.weights_TK, "top_k_weights")
    assert_within(actual.out, exact.out, bounds.out, "output")
    for name, gradient in exact.gradients.items():
        assert_within(actual.gradients[name], gradient, bounds.gradients[name], f"gradient of {name}")


@pytest.mark.parametrize("variant", ["top_k", "capacity_position", "null", "deepseek_v3"])
def test_the_rounding_bound_catches_one_wrong_expert(variant, monkeypatch):
    block = build_block(tiny_config(variant), torch.float32)
    hidden, cotangent = build_inputs(torch.float32)
    exact = run_reference(block, hidden, cotangent, None)
    leaves = reference_leaves(block, hidden, torch.float64)
    bounds = block_bounds(
        leaves["hidden"], reference_weights(block, leaves), router_spec(block.gate.config), exact.route, cotangent
    )
    route = HfMoeRouter.forward

    def one_wrong(self, *arguments):
        output = route(self, *arguments)
        token = (output.top_k_index[:, 0] < self.num_experts).nonzero()[-1]
        output.top_k_index[token, 0] = (output.top_k_index[token, 0] + 1) % self.num_experts
        return output

    monkeypatch.setattr(HfMoeRouter, "forward", one_wrong)
    wrong = run_block(block, hidden, cotangent, None)
    with pytest.raises(AssertionError, match="times the bound"):
        assert_within(wrong.out, exact.out, bounds.out)


BFLOAT16 = ("top_k", "deepseek_v3", "null", "top_p", "dense", "expert_choice", "capacity_probability", "shared")


@pytest.mark.parametrize("variant", BFLOAT16)
@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
def test_bfloat16_is_as_good_as_plain_torch(variant, backend):
    block = build_block(tiny_config(variant, backend), torch.bfloat16)
    hidden, cotangent = build_inputs(torch.bfloat16, tokens=96)
    exact = run_reference(block, hidden, cotangent, None)
    plain = plain_block(block, hidden, cotangent, None)
    actual = run_block(block, hidden, cotangent, None)
    assert_same_choice(actual.route, exact.route)
    assert actual.route.weights_TK.dtype == torch.float32
    assert_as_good_as(actual.out, plain.out, exact.out)
    if backend == "batched_mm":
        return  # of transformers: made for decoding, it adds up the gradients of a weight in bfloat16, row by row
    for name, gradient in exact.gradients.items():
        assert_as_good_as(actual.gradients[name], plain.gradients[name], gradient)


def our_losses(block: HfMoeSparseMoeBlock, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    decision = block.gate(hidden, mask).decision
    return load_balancing_loss(decision, block.num_experts, mask), router_z_loss(decision, mask)


def exact_losses(
    block: HfMoeSparseMoeBlock, leaves: dict[str, Tensor], mask: Tensor | None
) -> tuple[Tensor, Tensor, Route]:
    config = block.gate.config
    weights = reference_weights(block, leaves)
    route = reference.route(
        leaves["hidden"], weights.router, router_spec(config), bias_X=weights.bias, token_mask_T=mask, training=True
    )
    balance = reference.load_balancing_loss([route], config.num_experts, config.num_null_experts, mask)
    return balance, reference.z_loss([route], mask), route


def loss_cases():
    return [case for case in cases() if case[0] not in ("jitter", "gelu", "shared")]


@pytest.mark.parametrize(("variant", "masked"), loss_cases())
def test_losses_in_float64_are_exact(variant, masked):
    block = build_block(tiny_config(variant), torch.float64)
    hidden, _ = build_inputs(torch.float64)
    mask = padding(masked)
    leaves = reference_leaves(block, hidden, torch.float64)
    for actual, exact in zip(our_losses(block, hidden, mask), exact_losses(block, leaves, mask)[:2], strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-14)
        ours = torch.autograd.grad(actual, [hidden, block.gate.weight], retain_graph=True)
        theirs = torch.autograd.grad(exact, [leaves["hidden"], leaves["router"]], retain_graph=True)
        for gradient, exact_gradient in zip(ours, theirs, strict=True):
            torch.testing.assert_close(gradient, exact_gradient, rtol=1e-10, atol=1e-13)


def loss_logit_sizes(block: HfMoeSparseMoeBlock, route: Route, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of both losses by the logits with differences made sums [T, X]: what rounding is relative to."""
    config = block.gate.config
    candidates = config.num_experts + config.num_null_experts
    valid = torch.ones(len(route.scores_TX), dtype=torch.bool) if mask is None else mask
    share = reference._shares(route.choice_TK, candidates, mask)
    if config.num_null_experts:
        share[config.num_experts :] = share[config.num_experts :].mean()
    scores = route.scores_TX.detach()
    probability = scores / scores.sum(-1, keepdim=True)
    balance = candidates * probability * (share + (probability * share).sum(-1, keepdim=True))
    z = 2 * route.logits_TX.detach().logsumexp(-1, keepdim=True).abs() * route.logits_TX.detach().softmax(-1)
    return tuple(size * valid[:, None] / valid.sum() for size in (balance, z))


@pytest.mark.parametrize(("variant", "masked"), loss_cases())
def test_losses_in_float32_are_within_the_rounding_bound(variant, masked):
    block = build_block(tiny_config(variant), torch.float32)
    hidden, _ = build_inputs(torch.float32)
    mask = padding(masked)
    leaves = reference_leaves(block, hidden, torch.float64)
    *exact, route = exact_losses(block, leaves, mask)
    absolute_hidden, absolute_router = leaves["hidden"].detach().abs(), leaves["router"].detach().abs()
    chain = TOKENS + hidden.shape[1] + 3 * len(absolute_router) + 20
    largest_logit = (absolute_hidden @ absolute_router.T).max()
    factor = chain * torch.finfo(torch.float32).eps / 2 * (1 + 2 * largest_logit)
    sizes = loss_logit_sizes(block, route, mask)
    for actual, true, size in zip(our_losses(block, hidden, mask), exact, sizes, strict=True):
        assert actual.dtype == torch.float32
        magnitude = torch.maximum(true.detach(), largest_logit**2) if size is sizes[1] else true.detach()
        assert_within(actual, true.detach(), factor * magnitude, "loss")
        ours = torch.autograd.grad(actual, [hidden, block.gate.weight], retain_graph=True)
        theirs = torch.autograd.grad(true, [leaves["hidden"], leaves["router"]], retain_graph=True)
        assert_within(ours[0], theirs[0], factor * (size @ absolute_router), "gradient of hidden")
        assert_within(ours[1], theirs[1], factor * (size.T @ absolute_hidden), "gradient of the router")


def test_losses_of_padding_alone_are_zero():
    block = build_block(tiny_config("top_k"), torch.float32)
    hidden, _ = build_inputs(torch.float32)
    for loss in our_losses(block, hidden, torch.zeros(TOKENS, dtype=torch.bool)):
        assert loss.item() == 0.0


def test_a_nan_token_stays_in_its_token():
    block = build_block(tiny_config("top_k"), torch.float32)
    hidden, _ = build_inputs(torch.float32)
    expected = block(hidden[None])[0].detach()
    poisoned = hidden.detach().clone()
    poisoned[3] = float("nan")
    actual = block(poisoned[None])[0]
    assert actual[3].isnan().all()
    others = torch.arange(TOKENS) != 3
    torch.testing.assert_close(actual[others], expected[others], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "expert_choice_takes_all"])
@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token(variant, backend, tokens):
    block = build_block(tiny_config(variant, backend), torch.float32).eval()
    hidden, cotangent = build_inputs(torch.float32, tokens)
    out = block(hidden[None])[0]
    assert out.shape == (tokens, 16)
    if tokens:
        exact = run_reference(block, hidden, cotangent, None)
        torch.testing.assert_close(out, exact.out.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["top_k", "sigmoid_bias", "null", "top_p", "dense"])
def test_model_losses_are_the_mean_over_layers_of_the_decisions_made(variant):
    config = tiny_config(variant)
    model = HfMoeForCausalLM(config).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name:
                parameter.normal_(std=0.4)
    routers = [module for module in model.modules() if isinstance(module, HfMoeRouter)]
    seen: list[Tensor] = []
    for router in routers:
        router.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    input_ids = torch.randint(0, 32, (3, 8))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :3] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    outputs = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    mask = attention_mask.bool().flatten()
    spec = router_spec(config)
    routes = [
        reference.route(hidden, router.weight, spec, bias_X=router.e_score_correction_bias, training=True)
        for hidden, router in zip(seen, routers, strict=True)
    ]
    balance = reference.load_balancing_loss(routes, config.num_experts, config.num_null_experts, mask)
    z = reference.z_loss(routes, mask)
    torch.testing.assert_close(outputs.aux_loss, balance, check_dtype=False, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(outputs.z_loss, z, check_dtype=False, rtol=1e-6, atol=0.0)
    cross_entropy = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected = cross_entropy + config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
    torch.testing.assert_close(outputs.loss, expected, check_dtype=False, rtol=1e-6, atol=0.0)
    plain = model.eval()(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
    torch.testing.assert_close(plain.loss, cross_entropy, check_dtype=False, rtol=1e-6, atol=0.0)
