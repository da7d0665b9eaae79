"""Which experts a domain uses: scores as computed by hand, and the smallest set that reaches a budget."""

import pytest
import torch

from hf_moe.adapters.esft import train_selected_experts
from hf_moe.adapters.expert_selection import ExpertSelection
from hf_moe.adapters.select_experts import _smallest_set, select_experts
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.models.modeling_hf_moe import HfMoeModel
from tiny_hf_moe import encoder_config, random_ids
from tiny_models import build_tiny
from tiny_moe import hf_moe_model, tiny_tokenizer, with_expert_lora, words

BUILD = {
    "hf_moe": hf_moe_model,
    "hf_moe_null": lambda: hf_moe_model(num_null_experts=4),
    "hf_moe_top_p": lambda: hf_moe_model(routing="top_p", num_experts_per_tok=4, router_top_p=0.4),
    **{
        family: lambda family=family: build_tiny(family)[0]
        for family in ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "gemma4")
    },
}
ROWS = [random_ids(1, length, seed=length)[0] for length in (5, 9, 3, 12)]


def routed(model, ids):
    """What each router hands over for one row: weights and ids `[S, K]` per layer."""
    caught = []
    hooks = [
        layer.router.register_forward_hook(lambda module, inputs, output: caught.append(output[1:3]))
        for layer in moe_layers(model)
    ]
    with torch.no_grad():
        model(input_ids=ids[None])
    for hook in hooks:
        hook.remove()
    return caught


def hand_scores(model, method):
    """ESFT's scores, row by row and slot by slot."""
    layers = moe_layers(model)
    scores = [[0.0] * layer.num_experts for layer in layers]
    for ids in ROWS:
        for layer, (weights, index) in enumerate(routed(model, ids)):
            for token_weights, token_index in zip(weights.tolist(), index.tolist(), strict=True):
                for weight, expert in zip(token_weights, token_index, strict=True):
                    if expert < layers[layer].num_experts:
                        scores[layer][expert] += (weight if method == "gate" else 1.0) / len(ids)
    return [[score / sum(layer) for score in layer] for layer in scores]


@pytest.mark.parametrize("method", ["gate", "frequency"])
@pytest.mark.parametrize("name", BUILD)
def test_scores_are_those_of_a_hand_computation(name, method):
    model = BUILD[name]()
    if name == "gpt_oss":  # its router gives [T, E] weights in old versions: then nothing to compare with
        assert routed(model, ROWS[0])[0][0].shape == routed(model, ROWS[0])[0][1].shape
    selection = select_experts(model, ROWS, method=method, budget=0.5, batch_size=3, progress=False)
    assert selection.num_tokens == 29
    for layer, expected in zip(selection.layers.values(), hand_scores(model, method), strict=True):
        assert layer.scores == pytest.approx(expected, abs=1e-6)
        best = sorted(range(len(expected)), key=lambda expert: -layer.scores[expert])
        count = next(n for n in range(1, 9) if sum(layer.scores[expert] for expert in best[:n]) >= 0.5)
        assert layer.experts == tuple(sorted(best[:count]))


def test_padding_does_not_count():
    model = hf_moe_model()
    padded = [
        {"input_ids": torch.cat([row, torch.full((4,), 7)]), "attention_mask": [1] * len(row) + [0] * 4}
        for row in ROWS
    ]
    one, two = (select_experts(model, rows, progress=False) for rows in (ROWS, padded))
    assert one.num_tokens == two.num_tokens
    for plain, with_padding in zip(one.layers.values(), two.layers.values(), strict=True):
        assert plain.scores == pytest.approx(with_padding.scores, abs=1e-6)


def test_rows_may_be_texts_ids_or_mappings():
    tokenizer = tiny_tokenizer()
    model = hf_moe_model(vocab_size=len(tokenizer))
    texts = [words(12, seed) for seed in range(3)]
    kinds = [
        texts,
        [{"text": text} for text in texts],
        [tokenizer(text)["input_ids"] for text in texts],
        [{"input_ids": torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int32)} for text in texts],
    ]
    selections = [select_experts(model, rows, tokenizer, progress=False) for rows in kinds]
    assert all(selection == selections[0] for selection in selections)


def test_no_more_tokens_are_measured_than_asked_for(capsys):
    model = hf_moe_model()
    selection = select_experts(model, ROWS, max_tokens=7)
    assert selection.num_tokens == 7
    shown = capsys.readouterr().err
    assert "scoring experts: 100%" in shown
    assert "7/7" in shown
    assert select_experts(model, ROWS, max_length=4, progress=False).num_tokens == 4 + 4 + 3 + 4
    first = select_experts(model, [ROWS[0], ROWS[1][:2]], progress=False)
    assert first == selection


def test_the_model_is_left_as_it_was():
    model = hf_moe_model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    select_experts(model, ROWS, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert not any(layer.experts._forward_pre_hooks for layer in moe_layers(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_wrapped_models_give_the_same_selection():
    plain = select_experts(hf_moe_model(), ROWS, progress=False)
    assert select_experts(with_expert_lora(hf_moe_model()), ROWS, progress=False) == plain
    trained = train_selected_experts(hf_moe_model(), plain)
    again = select_experts(trained, ROWS, progress=False)
    for one, two in zip(plain.layers.values(), again.layers.values(), strict=True):
        assert one.scores == pytest.approx(two.scores, abs=1e-5)


SMALLEST = {
    "one is enough": ([0.1, 0.6, 0.3], 0.5, (1,)),
    "exactly reached": ([0.25, 0.25, 0.5], 0.75, (0, 2)),
    "ties: lower ids": ([0.25, 0.25, 0.25, 0.25], 0.3, (0, 1)),
    "all of the mass": ([0.7, 0.0, 0.3], 1.0, (0, 2)),
    "one expert": ([1.0], 0.1, (0,)),
}


@pytest.mark.parametrize("case", SMALLEST)
def test_the_smallest_set_that_reaches_the_budget(case):
    shares, budget, expected = SMALLEST[case]
    assert _smallest_set(shares, budget) == expected


def test_a_larger_budget_chooses_more():
    counts = [
        sum(
            len(layer.experts)
            for layer in select_experts(hf_moe_model(), ROWS, budget=b, progress=False).layers.values()
        )
        for b in (0.1, 0.5, 0.9, 1.0)
    ]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


BAD_CALLS = {
    "method": ({"method": "random"}, ValueError, "method must be 'gate' or 'frequency'"),
    "no budget": ({"budget": 0.0}, ValueError, r"budget must be in \(0, 1\]"),
    "budget in percent": ({"budget": 20}, ValueError, r"budget must be in \(0, 1\]"),
    "NaN budget": ({"budget": float("nan")}, ValueError, "budget must be"),
    "max_tokens": ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1"),
    "one text": ({"dataset": "a text"}, TypeError, "iterable of rows, got one str"),
    "no rows": ({"dataset": []}, ValueError, "the dataset has no token"),
    "empty rows": ({"dataset": [[], []]}, ValueError, "the dataset has no token"),
    "no tokenizer": ({"dataset": ["a text"]}, ValueError, "pass the model's tokenizer"),
    "other columns": ({"dataset": [{"prompt": "x"}]}, TypeError, "must have 'input_ids' or 'text', got 'prompt'"),
    "a number": ({"dataset": [3]}, TypeError, "row 0 must be a text, token ids or a mapping, got int"),
    "floats": ({"dataset": [[0.5, 1.0]]}, TypeError, "must be integers in one dimension"),
    "two dimensions": ({"dataset": [[[1, 2]]]}, TypeError, "must be integers in one dimension"),
    "short mask": ({"dataset": [{"input_ids": [1, 2], "attention_mask": [1]}]}, ValueError, "one value for each of 2"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused(case):
    changes, error, message = BAD_CALLS[case]
    arguments = {"dataset": ROWS, "progress": False, **changes}
    with pytest.raises(error, match=message):
        select_experts(hf_moe_model(), **arguments)


def test_layers_that_no_token_reaches_are_left_out(caplog):
    """Text in a model with vision experts."""
    model, inputs = build_tiny("ernie4_5_vl_moe")
    selection = select_experts(model, list(inputs["input_ids"]), progress=False)
    vision = {name: layer for name, layer in selection.layers.items() if "vision" in name}
    assert vision
    assert all(layer.experts == layer.scores == () for layer in vision.values())
    assert all(layer.experts for name, layer in selection.layers.items() if name not in vision)
    assert "no token of the dataset reached" in caplog.text
    assert ExpertSelection.from_dict(selection.to_dict()) == selection


def test_weights_that_are_not_finite_are_refused():
    model = hf_moe_model()
    model.model.embed_tokens.weight.data[ROWS[0][0]] = float("nan")
    with pytest.raises(ValueError, match=r"routing weights of 'model.layers.0.mlp' are negative or not finite"):
        select_experts(model, ROWS, progress=False)


def test_models_that_cannot_be_measured_are_refused():
    with pytest.raises(ValueError, match="Linear has no MoE layer"):
        select_experts(torch.nn.Linear(2, 2), ROWS)
    for factor in (0.5, 1.0):  # half of the slots of two are as many rows as tokens
        encoder = HfMoeModel(encoder_config(routing="expert_choice", capacity_factor=factor)).eval()
        with pytest.raises(TypeError, match="expert choice"):
            select_experts(encoder, ROWS, progress=False)


# ---- the record
