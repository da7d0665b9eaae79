"""The steps between torch's grouped products, against float64.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, P pre-activation
width (2I gated, I ungated).
"""

import pytest
import torch
from torch import Tensor

import kernel_cases
from hf_moe.kernels.triton import between_products
from hf_moe.kernels.triton.routing import RowOrder, sort_rows
from kernel_cases import DTYPES, FORMS, Layer, assert_right

NAN = float("nan")
EPS = torch.finfo(torch.float32).eps


def order_of(case: Layer) -> RowOrder:
    return sort_rows(case.index, case.num_experts, case.num_experts + 1)


def poisoned(rows: Tensor, order: RowOrder) -> Tensor:
    """Rows past the last expert's end hold NaN, as a product leaves them unwritten."""
    return torch.cat([rows[: order.expert_end_E[-1]], torch.full_like(rows[order.expert_end_E[-1] :], NAN)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ["sentinels", "odd_sizes", "no_tokens"])
def test_gather_copies_rows_and_zeroes_those_of_no_expert(routing, dtype, device):
    case = kernel_cases.layer(routing).to(dtype, device)
    order, top_k = order_of(case), case.index.shape[1]
    rows_NH = between_products.launch_gather_rows(case.hidden, order, top_k)
    expected = case.hidden[order.order_N.long() // top_k]
    expected[order.expert_end_E[-1] :] = 0
    assert torch.equal(rows_NH, expected)
    strided = case.hidden.T.contiguous().T
    assert torch.equal(between_products.launch_gather_rows(strided, order, top_k), expected)


@pytest.mark.parametrize("routing", ["sentinels", "odd_sizes", "no_tokens"])
def test_row_of_slot_inverts_the_order(routing, device):
    case = kernel_cases.layer(routing).to(torch.float32, device)
    order = order_of(case)
    expected = torch.full_like(order.order_N, -1)
    end = int(order.expert_end_E[-1])
    expected[order.order_N[:end].long()] = torch.arange(end, dtype=torch.int32, device=device)
    assert torch.equal(between_products.launch_row_of_slot(order), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted_biased"])
@pytest.mark.parametrize("routing", ["sentinels", "odd_sizes", "repeated_indices", "no_tokens"])
def test_combine_matches_float64(routing, weighted, dtype, device):
    case = kernel_cases.layer(routing, bias=True).to(dtype, device)
    order, (tokens, top_k) = order_of(case), case.index.shape
    slots_NH = torch.randn(tokens * top_k, case.hidden.shape[1]).to(device, dtype)
    ids = {"index_TK": case.index, "num_ids": case.num_experts + 1}
    options = {"weights_TK": case.weights, "bias": case.down_bias, **ids} if weighted else {}
    rows_NH = poisoned(slots_NH[order.order_N.long()], order)
    actual = between_products.launch_combine_rows(
        rows_NH, between_products.launch_row_of_slot(order), top_k, **options
    )

    def plain(to: torch.dtype, absolute: bool = False) -> Tensor:
        values, bias, weights = (x.to(to) for x in (slots_NH, case.down_bias, case.weights.reshape(-1, 1)))
        if absolute:
            values, bias, weights = values.abs(), bias.abs(), weights.abs()
        if weighted:
            values = (values + bias[case.index.reshape(-1).clamp(max=len(bias) - 1)]) * weights
        values = values.masked_fill(case.index.reshape(-1, 1) == case.num_experts, 0.0)
        return values.view(tokens, top_k, values.shape[1]).sum(1)

    assert_right(actual, plain(dtype), plain(torch.float64), plain(torch.float64, absolute=True), (top_k + 3) * EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_activation_matches_float64_and_keeps_the_biased_product(form, dtype, device):
    case = kernel_cases.layer("sentinels", form).to(dtype, device)
    order, end = order_of(case), int(order_of(case).expert_end_E[-1])
    P = case.up_weight.shape[2 if case.form.transposed else 1]
    product_NP = torch.randn(case.index.numel(), P).to(device, dtype)
    pre_NP = poisoned(product_NP, order)
    act_NI = between_products.launch_activation(pre_NP, order, case.form, case.up_bias)
    expert_N = case.index.reshape(-1)[order.order_N.long()][:end]

    def plain(to: torch.dtype, absolute: bool = False) -> tuple[Tensor, Tensor]:
        pre = product_NP[:end].to(to)
        bias = 0 if case.up_bias is None else case.up_bias[expert_N].to(to)
        pre = pre.abs() + abs(bias) if absolute else pre + bias
        return pre, kernel_cases.activate(pre, case.form, absolute)

    baseline, exact, sizes = plain(dtype), plain(torch.float64), plain(torch.float64, absolute=True)
    for i, actual in enumerate((pre_NP, act_NI)):
        assert not actual[end:].any()
        assert_right(actual[:end], baseline[i], exact[i], sizes[i], 40 * EPS)
