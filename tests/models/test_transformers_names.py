"""What is renamed in transformers, or given to a model that does not read it, is an error and not another number."""

import pytest
import torch
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.integrations import moe

from hf_moe import registration
from hf_moe.models.modeling_hf_moe import (
    CACHE,
    HfMoeForCausalLM,
    HfMoeForQuestionAnswering,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeModel,
)
from hf_moe.models.transformers_names import CACHE_NAMES, READ_BELOW_THE_MODEL, cache_name, check_parameters
from tiny_hf_moe import random_ids, tiny_config

CLASSES = [
    HfMoeModel,
    HfMoeForCausalLM,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeForQuestionAnswering,
]


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("model_class", CLASSES[:3])
def test_a_cache_is_read_under_either_name(model_class, name):
    torch.manual_seed(0)
    model, ids = model_class(tiny_config(pad_token_id=0)).eval(), random_ids()
    cache = model(input_ids=ids[:, :-1], use_cache=True)[CACHE]
    step = model(input_ids=ids[:, -1:], attention_mask=torch.ones_like(ids), **{name: cache})
    assert step[CACHE] is cache
    assert cache.get_seq_length() == ids.shape[1]
    whole = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    first = 0 if model_class is HfMoeModel else "logits"
    expected = whole[first] if model_class is HfMoeForSequenceClassification else whole[first][:, -1:]
    torch.testing.assert_close(step[first], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_class", [HfMoeModel, HfMoeForCausalLM])
def test_two_caches_are_refused(model_class):
    model, ids = model_class(tiny_config()), random_ids()
    cache = model(input_ids=ids, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="one key/value cache"):
        model(input_ids=ids, **dict.fromkeys(CACHE_NAMES, cache))


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("name", ["token_type_ids", "kv_cache", "seq_idx"])
def test_an_argument_that_nothing_reads_is_an_error(model_class, name):
    model, ids = model_class(tiny_config()), random_ids()
    with pytest.raises(TypeError, match=f"reads no argument '{name}'"):
        model(input_ids=ids, **{name: ids})


def test_the_rows_of_a_pack_may_be_marked_twice():
    model, ids = HfMoeModel(tiny_config()).eval(), random_ids()[:1]
    positions = torch.arange(ids.shape[1])[None] % 6
    marked_twice = model(input_ids=ids, position_ids=positions, seq_idx=(positions == 0).cumsum(-1))
    assert torch.equal(marked_twice[0], model(input_ids=ids, position_ids=positions)[0])


def test_what_continuous_batching_passes_is_read():
    own = {"input_ids", "attention_mask", "position_ids", "use_cache", *CACHE_NAMES}
    assert set(PagedAttentionArgs.__annotations__) <= own | READ_BELOW_THE_MODEL


def test_a_renamed_argument_of_transformers_is_refused_by_name():
    def mask(config, kv_store): ...

    with pytest.raises(ImportError, match=r"mask takes a key/value cache under none of .* \(5\.17 to 5\.24\)"):
        cache_name(mask)
    with pytest.raises(ImportError, match="mask has no parameter position_ids"):
        check_parameters({mask: ("config", "position_ids")})


def test_a_registry_without_its_names_is_refused(monkeypatch):
    monkeypatch.delattr(moe, "ExpertsInterface")
    with pytest.raises(ImportError, match=r"transformers\.integrations\.moe has no ExpertsInterface"):
        registration.register()
