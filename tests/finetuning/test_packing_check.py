"""A model is packed only if examples do not see those before them in the row: judged by gradients, all families."""

import pytest
import torch

from hf_moe.finetuning.arguments import RecipeError
from hf_moe.finetuning.packing_check import check_packing
from tiny_models import FAMILIES, build_tiny, model_class
from tiny_moe import hf_moe_model

CAUSAL = [family for family in FAMILIES if model_class(family).__name__.endswith("ForCausalLM")]
ROW = 64


def sees_what_came_before(model) -> bool:
    """Return whether a packed example's logits have a gradient to the embeddings of the example before it."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(4, vocabulary, (2, 32), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(16).repeat(2).expand(2, -1)
    kept = {}
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: kept.update(out=out))
    try:
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 16:]
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(logits.square().sum(), kept["out"])
    return bool(gradient[:, :16].abs().max() > 0)


def is_refused(model, row_length=ROW) -> bool:
    try:
        check_packing(model, row_length)
    except RecipeError as error:
        return "does not keep packed examples apart" in str(error)
    return False


@pytest.mark.parametrize("family", ["hf_moe", *CAUSAL])
def test_every_family_is_refused_or_exact(family):
    model = hf_moe_model() if family == "hf_moe" else build_tiny(family)[0]
    leaks = sees_what_came_before(model)
    assert is_refused(model) == leaks
    if not family.startswith("inkling2"):  # its tiny model runs in float32 alone
        assert is_refused(model.to(torch.bfloat16)) == leaks
    assert not model.training


@pytest.mark.parametrize("seed", range(6))
def test_convolutions_leak_whatever_the_weights(seed):
    """They used to pass with 5 to 10 % of the logits."""
    assert is_refused(build_tiny("lfm2_moe", seed=seed)[0])


@pytest.mark.parametrize("family", [name for name in ("axk2", "hy_v4", "deepseek_v32") if name in CAUSAL])
def test_ties_of_sparse_attention_are_no_leak(family):
    """Alone, an example's ties among index scores of 0 break differently, where nothing comes before it as well."""
    model, _ = build_tiny(family, seed=1)
    ids = torch.randint(4, 96, (16, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first = model(input_ids=ids, position_ids=torch.arange(16).repeat(2).expand(16, -1), use_cache=False).logits
        alone = model(input_ids=ids[:, :16], use_cache=False).logits
    assert (first[:, :16] - alone).abs().max() > 1e-3
    assert not is_refused(model)


def blurred(model, reach: int):
    """As `model`, with embeddings that look `reach` tokens back, across examples."""

    def look_back(module, args, out):
        return out + torch.nn.functional.pad(out, (0, 0, reach, 0))[:, : out.shape[1]]

    model.get_input_embeddings().register_forward_hook(look_back)
    model.config.index_topk = reach
    return model


def test_a_reach_that_fits_the_row_is_exceeded():
    model = blurred(build_tiny("qwen3_moe")[0], 100)
    assert not is_refused(model, 100)
    assert is_refused(model, 256)


def test_a_leak_of_the_size_of_rounding_passes_and_a_larger_one_does_not():
    model, _ = build_tiny("qwen3_moe")
    strength = {"value": 0.0}

    def look_back(module, args, out):
        return out + strength["value"] * torch.nn.functional.pad(out, (0, 0, 1, 0))[:, :-1]

    model.get_input_embeddings().register_forward_hook(look_back)
    for value, refused in ((0.0, False), (1e-9, False), (1e-4, True)):
        strength["value"] = value
        assert is_refused(model) == refused


def test_logits_that_are_not_finite_are_named():
    model, _ = build_tiny("qwen3_moe")
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(RecipeError, match="logits that are not finite"):
        check_packing(model.train(), ROW)
    assert model.training
