"""The reference against results worked out by hand, and its gradients against finite differences."""

import pytest
import torch
from torch.autograd import gradcheck

from hf_moe import reference
from hf_moe.reference import MoeWeights, Route, RouterSpec
from numerics import ROUTINGS, assert_as_good_as, assert_within, experts_bound, plain_experts

PROBABILITIES = [0.5, 0.3, 0.2]


def route_logits(rows, **spec) -> Route:
    """Route tokens whose router logits are given: the router's weight is the identity."""
    arguments = {name: spec.pop(name) for name in ("bias_X", "token_mask_T", "training") if name in spec}
    logits_TX = torch.tensor(rows, dtype=torch.float64)
    spec.setdefault("num_experts", logits_TX.shape[1] - spec.get("num_null_experts", 0))
    return reference.route(logits_TX, torch.eye(logits_TX.shape[1]).double(), RouterSpec(**spec), **arguments)


def route_probabilities(rows, **spec) -> Route:
    return route_logits(torch.tensor(rows, dtype=torch.float64).log().tolist(), **spec)


def assert_route(route: Route, index, weights) -> None:
    assert route.index_TK.tolist() == index
    torch.testing.assert_close(route.weights_TK, torch.tensor(weights, dtype=torch.float64))


def test_top_k_normalises_the_chosen_probabilities():
    assert_route(route_probabilities([PROBABILITIES], num_experts_per_tok=2), [[0, 1]], [[0.625, 0.375]])


def test_top_k_without_normalisation_keeps_the_probabilities_and_scales_them():
    route = route_probabilities(
        [PROBABILITIES], num_experts_per_tok=2, norm_topk_prob=False, routed_scaling_factor=2.5
    )
    assert_route(route, [[0, 1]], [[1.25, 0.75]])


def test_best_expert_comes_first():
    assert route_probabilities([[0.2, 0.5, 0.3]], num_experts_per_tok=3).index_TK.tolist() == [[1, 2, 0]]


def test_bias_shifts_the_choice_and_never_the_weight():
    logits = torch.tensor([[0.6, 0.5, 0.1]], dtype=torch.float64).logit().tolist()
    bias = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    route = route_logits(logits, num_experts_per_tok=2, router_scoring="sigmoid", bias_X=bias, norm_topk_prob=False)
    assert_route(route, [[2, 0]], [[0.1, 0.6]])


# the best expert is in the second group; the best pair is in the first
GROUPED = [[0.5, 0.45, 0.6, 0.1]]


def test_softmax_groups_rank_by_their_best_expert():
    probabilities = (torch.tensor(GROUPED) / torch.tensor(GROUPED).sum()).tolist()
    route = route_probabilities(probabilities, num_experts_per_tok=1, n_group=2, topk_group=1)
    assert route.index_TK.tolist() == [[2]]


def test_sigmoid_groups_rank_by_their_best_two():
    logits = torch.tensor(GROUPED, dtype=torch.float64).logit().tolist()
    route = route_logits(logits, num_experts_per_tok=2, router_scoring="sigmoid", n_group=2, topk_group=1)
    assert_route(route, [[0, 1]], [[0.5 / 0.95, 0.45 / 0.95]])


def test_a_null_choice_computes_nothing_and_the_real_ones_share_the_weight():
    route = route_probabilities([[0.5, 0.1, 0.4], [0.1, 0.6, 0.3]], num_experts_per_tok=2, num_null_experts=1)
    assert route.choice_TK.tolist() == [[0, 2], [1, 2]]
    assert_route(route, [[0, 2], [1, 2]], [[1.0, 0.0], [1.0, 0.0]])


def test_a_token_of_null_choices_has_weight_zero():
    route = route_probabilities([[0.2, 0.1, 0.4, 0.3]], num_experts_per_tok=2, num_null_experts=2)
    assert route.choice_TK.tolist() == [[2, 3]]
    assert_route(route, [[2, 2]], [[0.0, 0.0]])


@pytest.mark.parametrize(
    ("router_top_p", "kept"), [(0.4, [0, 3, 3]), (0.6, [0, 1, 3]), (0.79, [0, 1, 3]), (0.9, [0, 1, 2])]
)
def test_top_p_keeps_the_shortest_prefix(router_top_p, kept):
    route = route_probabilities([PROBABILITIES], num_experts_per_tok=3, routing="top_p", router_top_p=router_top_p)
    weights = [PROBABILITIES[e] if e < 3 else 0.0 for e in kept]
    assert_route(route, [kept], [[weight / sum(weights) for weight in weights]])
    assert route.choice_TK.tolist() == [kept]


def test_top_p_is_capped():
    route = route_probabilities([PROBABILITIES], num_experts_per_tok=1, routing="top_p", router_top_p=0.99)
    assert_route(route, [[0]], [[1.0]])


def test_dense_blends_every_expert():
    route = route_probabilities([PROBABILITIES], num_experts_per_tok=1, routing="dense")
    assert_route(route, [[0, 1, 2]], [PROBABILITIES])


CHOSEN_BY_EXPERTS = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]]


def test_experts_choose_their_best_tokens():
    route = route_probabilities(
        CHOSEN_BY_EXPERTS, num_experts_per_tok=1, routing="expert_choice", norm_topk_prob=False
    )
    assert_route(route, [[0, 2], [0, 2], [2, 1], [2, 1]], [[0.9, 0.0], [0.8, 0.0], [0.0, 0.3], [0.0, 0.6]])


def test_experts_never_choose_padding():
    mask = torch.tensor([False, True, True, True])
    route = route_probabilities(
        CHOSEN_BY_EXPERTS, num_experts_per_tok=2, routing="expert_choice", norm_topk_prob=False, token_mask_T=mask
    )
    assert_route(route, [[2, 2], [0, 1], [0, 1], [0, 1]], [[0.0, 0.0], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])


# all four tokens choose expert 0; it may keep ceil(1.0 * 4 * 1 / 2) = 2
CROWDED = [[0.6, 0.4], [0.9, 0.1], [0.7, 0.3], [0.8, 0.2]]


@pytest.mark.parametrize(
    ("drop_policy", "index"), [("position", [[0], [0], [2], [2]]), ("probability", [[2], [0], [2], [0]])]
)
def test_capacity_drops_what_does_not_fit(drop_policy, index):
    crowded = {"num_experts_per_tok": 1, "norm_topk_prob": False, "capacity_factor": 1.0, "drop_policy": drop_policy}
    route = route_probabilities(CROWDED, training=True, **crowded)
    weights = [[row[0] if chosen == [0] else 0.0] for row, chosen in zip(CROWDED, index, strict=True)]
    assert_route(route, index, weights)
    assert route.choice_TK.tolist() == [[0]] * 4
    assert route_probabilities(CROWDED, training=False, **crowded).index_TK.tolist() == [[0]] * 4


def test_padding_takes_no_capacity():
    mask = torch.tensor([False, False, True, True])
    route = route_probabilities(CROWDED, num_experts_per_tok=1, capacity_factor=1.0, token_mask_T=mask, training=True)
    assert route.index_TK[2:].tolist() == [[0], [0]]


def test_experts_by_hand():
    hidden = torch.tensor([[1.0, 2.0]])
    gate_up = torch.tensor([[[1.0, 1.0], [1.0, 0.0]], [[1.0, -1.0], [0.0, 1.0]]])  # width 1
    down = torch.tensor([[[1.0], [-1.0]], [[5.0], [5.0]]])
    out = reference.experts(hidden, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]), gate_up, down, torch.relu)
    # expert 0: relu(3) * 1 = 3 -> [3, -3]; expert 1: relu(-1) = 0
    assert out.tolist() == [[1.5, -1.5]]


def test_unused_experts_do_not_matter():
    case = ROUTINGS["last_expert_empty"]()
    case.gate_up[-1] = case.down[-1] = float("nan")
    assert reference.experts(case.hidden, case.index, case.weights, case.gate_up, case.down).isfinite().all()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_plain_torch_is_within_the_a_priori_bound(routing):
    case = ROUTINGS[routing]()
    exact = reference.experts(*vars(case.to(torch.float64)).values())
    plain = plain_experts(*vars(case).values())
    assert_within(plain, exact, experts_bound(case, exact, torch.float32))


def test_the_a_priori_bound_catches_one_wrong_expert():
    case = ROUTINGS["balanced"]()
    exact = reference.experts(*vars(case.to(torch.float64)).values())
    case.index[5, 0] = (case.index[5, 0] + 1) % 4
    with pytest.raises(AssertionError, match="times the bound"):
        assert_within(plain_experts(*vars(case).values()), exact, experts_bound(case, exact, torch.float32))


def test_the_2x_rule_accepts_plain_torch_and_refuses_a_coarser_result():
    case = ROUTINGS["balanced"]().to(torch.bfloat16)
    exact = reference.experts(*vars(case.to(torch.float64)).values())
    plain = plain_experts(*vars(case).values())
    assert_as_good_as(plain, plain, exact)
    with pytest.raises(AssertionError, match="twice plain torch"):
        assert_as_good_as(plain * 1.05, plain, exact)


def decided(choices, scores) -> Route:
    scores_TX = torch.tensor(scores, dtype=torch.float64)
    choice_TK = torch.tensor(choices)
    return Route(scores_TX.log(), scores_TX, scores_TX, choice_TK, choice_TK)


def test_load_balancing_loss_is_one_when_balanced_and_the_number_of_experts_when_collapsed():
    balanced = decided([[0], [1], [2], [3]], [[0.25] * 4] * 4)
    collapsed = decided([[1]] * 4, [[0.0, 1.0, 0.0, 0.0]] * 4)
    assert reference.load_balancing_loss([balanced], 4).item() == 1.0
    assert reference.load_balancing_loss([collapsed], 4).item() == 4.0
    assert reference.load_balancing_loss([balanced, collapsed], 4).item() == 2.5


def test_load_balancing_loss_by_hand():
    route = decided([[0, 1], [0, 2]], [[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]])
    # f = [1/2, 1/4, 1/4], P = [0.55, 0.2, 0.25]
    assert reference.load_balancing_loss([route], 3).item() == pytest.approx(3 * (0.275 + 0.05 + 0.0625))


def test_load_balancing_loss_ignores_padding_and_unused_slots():
    route = decided([[0, 3], [1, 2]], [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    mask = torch.tensor([True, False])
    assert reference.load_balancing_loss([route], 3, token_mask_T=mask).item() == 3.0


def test_load_balancing_loss_pools_null_experts():
    split = decided([[0, 1], [0, 2]], [[0.5, 0.25, 0.25]] * 2)
    uneven = decided([[0, 1], [0, 1]], [[0.5, 0.25, 0.25]] * 2)
    # f = [1/2, null 1/2], P = [1/2, null 1/2]: 3 * (1/4 + 1/4 / 2)
    for route in (split, uneven):
        assert reference.load_balancing_loss([route], 1, num_null=2).item() == pytest.approx(3 * (0.25 + 0.125))


def test_load_balancing_loss_normalises_sigmoid_scores():
    assert reference.load_balancing_loss([decided([[0], [1]], [[0.9, 0.9], [0.1, 0.1]])], 2).item() == 1.0


def test_z_loss_by_hand():
    route = decided([[0], [0]], [[0.5, 0.5], [1.0, 1.0]])._replace(logits_TX=torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    log2 = torch.tensor(2.0).log()
    expected = (log2**2 + (1 + log2) ** 2) / 2
    torch.testing.assert_close(reference.z_loss([route]), expected)
    torch.testing.assert_close(reference.z_loss([route], torch.tensor([True, False])), log2**2)


SPECS = {
    "top_k": RouterSpec(4, 2),
    "unnormalised": RouterSpec(4, 2, norm_topk_prob=False, routed_scaling_factor=2.5),
    "sigmoid_groups": RouterSpec(4, 2, router_scoring="sigmoid", n_group=2, topk_group=1),
    "null": RouterSpec(4, 2, num_null_experts=2),
    "top_p": RouterSpec(4, 3, routing="top_p", router_top_p=0.6),
    "dense": RouterSpec(4, 4, routing="dense"),
    "expert_choice": RouterSpec(4, 2, routing="expert_choice", norm_topk_prob=False),
    "capacity": RouterSpec(4, 2, capacity_factor=1.0, drop_policy="probability"),
}


@pytest.mark.parametrize("name", SPECS)
def test_gradients_match_finite_differences(name):
    spec = SPECS[name]
    candidates = spec.num_experts + spec.num_null_experts
    shapes = [(5, 3), (candidates, 3), (4, 4, 3), (4, 3, 2), (2, 3), (2, 3), (3, 2)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def block(hidden, router, gate_up, down, *shared):
        weights = MoeWeights(router, gate_up, down, shared)
        out, decision = reference.moe_block(hidden, weights, spec, training=True)
        balance = reference.load_balancing_loss([decision], spec.num_experts, spec.num_null_experts)
        return out, balance, reference.z_loss([decision])

    assert gradcheck(block, inputs)


def test_no_tokens():
    out, decision = reference.moe_block(
        torch.zeros(0, 3), MoeWeights(torch.zeros(4, 3), torch.zeros(4, 4, 3), torch.zeros(4, 3, 2)), SPECS["top_k"]
    )
    assert out.shape == (0, 3)
    assert decision.index_TK.shape == decision.weights_TK.shape == (0, 2)
