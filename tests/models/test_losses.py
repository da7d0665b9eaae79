"""What the balancing losses see: collapse in any layer, no padding, the whole batch where asked."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from hf_moe.models.losses import (
    GlobalBatchCounts,
    balancing_losses,
    count_assignments,
    load_balancing_loss,
    router_z_loss,
)
from hf_moe.models.outputs import HfMoeModelOutputWithPast
from hf_moe.models.routing import RoutingDecision, choose_top_k
from tiny_hf_moe import left_padded, random_ids, tiny_config

EXPERTS, TOKENS = 8, 64


def decision_for(logits: torch.Tensor, num_slots: int = 1) -> RoutingDecision:
    scores = logits.softmax(-1)
    return RoutingDecision(logits, scores, choose_top_k(scores, num_slots))


def collapsed_onto(expert: int) -> torch.Tensor:
    logits = torch.full((TOKENS, EXPERTS), -20.0)
    logits[:, expert] = 20.0
    return logits


def balanced() -> torch.Tensor:
    logits = torch.full((TOKENS, EXPERTS), -20.0)
    logits[torch.arange(TOKENS), torch.arange(TOKENS) % EXPERTS] = 20.0
    return logits


def test_balanced_is_one_and_collapsed_is_the_number_of_experts():
    assert load_balancing_loss(decision_for(balanced()), EXPERTS) == pytest.approx(1.0)
    assert load_balancing_loss(decision_for(collapsed_onto(3)), EXPERTS) == pytest.approx(EXPERTS)


def test_each_layer_collapsed_onto_its_own_expert_is_seen():
    """transformers pools the layers and reports 1.0, perfectly balanced."""
    layers = [collapsed_onto(expert) for expert in range(EXPERTS)]
    assert load_balancing_loss_func(tuple(layers), EXPERTS, 1) == pytest.approx(1.0)
    model = AutoModelForCausalLM.from_config(tiny_config())
    outputs = HfMoeModelOutputWithPast(router_decisions=tuple(decision_for(logits) for logits in layers))
    aux_loss, _ = balancing_losses(outputs.router_decisions, None, model.config.num_null_experts)
    assert aux_loss == pytest.approx(EXPERTS)


def test_the_gradient_moves_load_away_from_the_crowded_expert():
    logits = torch.zeros(TOKENS, EXPERTS)
    logits[:, 0] = 1.0
    logits.requires_grad_()
    load_balancing_loss(decision_for(logits), EXPERTS).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_padding_is_left_out_even_when_it_is_not_a_number():
    logits = torch.randn(TOKENS, EXPERTS)
    padded = torch.cat([torch.full((16, EXPERTS), torch.nan), logits]).requires_grad_()
    mask = torch.cat([torch.zeros(16), torch.ones(TOKENS)])
    expected = decision_for(logits, 2)
    choice = torch.cat([torch.zeros(16, 2, dtype=torch.long), expected.choice])
    actual = RoutingDecision(padded, padded.softmax(-1), choice)
    torch.testing.assert_close(load_balancing_loss(actual, EXPERTS, mask), load_balancing_loss(expected, EXPERTS))
    torch.testing.assert_close(router_z_loss(actual, mask), router_z_loss(expected))


def test_all_padding_gives_zero_not_nan():
    decision = decision_for(torch.randn(TOKENS, EXPERTS))
    mask = torch.zeros(TOKENS)
    assert load_balancing_loss(decision, EXPERTS, mask) == 0
    assert router_z_loss(decision, mask) == 0


def test_no_tokens():
    decision = decision_for(torch.randn(0, EXPERTS))
    assert load_balancing_loss(decision, EXPERTS) == 0
    assert router_z_loss(decision) == 0


def test_a_model_ignores_padding_in_its_balancing_losses():
    model = AutoModelForCausalLM.from_config(tiny_config()).eval()
    ids = random_ids()
    padded, mask = left_padded(ids, 7)
    expected = model(ids, output_router_logits=True)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    actual = model(padded, attention_mask=mask, position_ids=position_ids, output_router_logits=True)
    torch.testing.assert_close(actual.aux_loss, expected.aux_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.z_loss, expected.z_loss, atol=1e-5, rtol=1e-5)


def test_evaluation_loss_is_the_cross_entropy_alone():
    model = AutoModelForCausalLM.from_config(tiny_config(router_aux_loss_coef=1.0))
    ids = random_ids()
    training, evaluation = model.train()(ids, labels=ids), model.eval()(ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(
        training.loss - evaluation.loss, training.aux_loss + 0.001 * training.z_loss, atol=1e-5, rtol=1e-5
    )


def test_null_experts_are_pooled():
    """A load that is uneven among the null experts alone is no imbalance."""
    even = torch.full((TOKENS, EXPERTS), -20.0)
    even[torch.arange(TOKENS), torch.arange(TOKENS) % EXPERTS] = 20.0
    crowded = even.clone()
    crowded[:, 4:] = -20.0
    crowded[(torch.arange(TOKENS) % EXPERTS) >= 4, 4] = 20.0  # all of the null tokens choose the first null expert
    for logits in (even, crowded):
        assert load_balancing_loss(decision_for(logits), num_experts=4) == pytest.approx(1.0)
    assert load_balancing_loss(decision_for(crowded), num_experts=EXPERTS) > 1.5


def test_global_batch_counts_accumulate_over_a_step_and_start_again():
    counts = [count_assignments(decision_for(collapsed_onto(expert))) for expert in range(2)]
    batch = GlobalBatchCounts()
    first = batch.update(counts[:1], torch.tensor(0.5))[0]
    second = batch.update(counts[1:], torch.tensor(0.5))[0]
    third = batch.update(counts[:1], torch.tensor(1.0))[0]
    torch.testing.assert_close(first, counts[0])
    torch.testing.assert_close(second, counts[0] + counts[1])
    torch.testing.assert_close(third, counts[0])
    torch.testing.assert_close(batch.update(counts[1:], None)[0], counts[1])


def test_global_batch_counts_take_three_uneven_micro_batches():
    counts = [torch.ones(EXPERTS) * size for size in (1, 2, 3)]
    batch = GlobalBatchCounts()
    for _ in range(2):
        totals = [
            batch.update([count], torch.tensor(share))[0]
            for count, share in zip(counts, (1 / 6, 2 / 6, 3 / 6), strict=True)
        ]
        assert [total[0].item() for total in totals] == [1, 3, 6]
