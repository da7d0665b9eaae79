"""The flat form of a call: nothing is lost on the way through a torch op, and names stand for their values."""

import pytest
import torch

import kernel_cases
from hf_moe.kernels.layer_call import ADAPTED_CALL, CALL, LowRank, LowRankPair, flatten, unflatten

PAIR = LowRank(torch.zeros(4, 2, 16), torch.zeros(4, 48, 2), 0.5)
ADAPTERS = {
    "none": None,
    "both": LowRankPair(PAIR, PAIR._replace(scale=2.0)),
    "up": LowRankPair(PAIR, None),
    "down": LowRankPair(None, PAIR),
    "neither": LowRankPair(None, None),
}


def same(one, other) -> bool:
    if isinstance(one, tuple):
        return type(one) is type(other) and all(map(same, one, other))
    return one is other or one == other


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_the_flat_form_becomes_the_same_call(adapters):
    call = kernel_cases.layer("balanced", "gpt_oss").call(ADAPTERS[adapters])
    call = call._replace(experts=call.experts._replace(up_scale=torch.ones(1), down_scale=torch.zeros(1)))
    assert same(unflatten(flatten(call)), call)


@pytest.mark.parametrize(("adapters", "schema"), [("none", CALL), ("both", ADAPTED_CALL)])
def test_every_value_stands_where_the_schema_names_it(adapters, schema):
    call = kernel_cases.layer("balanced", "gpt_oss").call(ADAPTERS[adapters])
    flat = dict(zip((argument.split()[-1] for argument in schema.split(", ")), flatten(call), strict=True))
    assert flat["hidden"] is call.hidden_TH
    assert flat["weights"] is call.weights_TK
    assert flat["down_bias"] is call.experts.down_bias
    assert flat["up_weight_scale"] is call.experts.up_scale is None
    assert {name: flat[name] for name in call.form._fields} == call.form._asdict()
    if call.low_rank is not None:
        assert flat["down_b"] is call.low_rank.down.b
        assert (flat["up_scale"], flat["down_scale"]) == (0.5, 2.0)


@pytest.mark.parametrize(("device", "copied"), [("meta", True), ("cpu", False)])
def test_a_cast_brings_the_rows_of_peft_s_b_together_where_no_cpu_reads_them(device, copied):
    peft_s = torch.zeros(48, 2, 4, device=device).permute(2, 0, 1)
    assert PAIR._replace(b=peft_s).to(torch.bfloat16).b.is_contiguous() == copied
