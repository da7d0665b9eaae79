"""Only the chosen experts train: nothing else has a gradient, an optimizer state, or another bit."""

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_moe.adapters.esft import (
    SelectedExperts,
    fold_selected_experts,
    mask_expert_lora,
    train_selected_experts,
)
from hf_moe.adapters.expert_lora import accelerate_adapters
from hf_moe.adapters.expert_selection import ExpertSelection
from hf_moe.adapters.frozen_router import freeze_router, verify_router_frozen
from hf_moe.data.packing import PackedRows
from hf_moe.experts.backends import BACKENDS
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.training.trainer import MoeTrainer
from tiny_hf_moe import random_ids
from tiny_models import FAMILIES, build_tiny
from tiny_moe import hf_moe_model, in_own_memory, with_expert_lora

NATIVE = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss")
BUILD = {
    "hf_moe": hf_moe_model,
    "hf_moe_null": lambda: hf_moe_model(num_null_experts=4),
    "hf_moe_capacity": lambda: hf_moe_model(capacity_factor=0.5),
    **{family: lambda family=family: build_tiny(family)[0] for family in NATIVE},
}
CHOSEN = (1, 2, 6)
IDS = random_ids(3, 10)


@pytest.fixture(params=BUILD)
def model(request):
    return BUILD[request.param]()


def selection_of(model, chosen=CHOSEN):
    """Other experts in every layer; in a model of several, the first layer keeps all of its experts."""
    names = [layer.name for layer in moe_layers(model)]
    return ExpertSelection.from_experts(
        model, {name: [(expert + i) % 8 for expert in chosen] for i, name in enumerate(names) if i or len(names) == 1}
    )


def loss_of(model):
    if not hasattr(model, "lm_head") and not isinstance(model, PeftModel):
        return model(input_ids=IDS).last_hidden_state.square().mean()
    return model(input_ids=IDS, labels=IDS).loss


def train_adamw(model, steps=3):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.5)
    model.train()
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return optimizer


def state_numel(optimizer):
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() for value in states if value.dim() > 0)


def copy_of(state):
    return {name: value.clone() for name, value in state.items()}


def assert_only_chosen_moved(before, after, selection):
    """Every tensor outside of the experts and every slice that was not chosen has the same bits."""
    assert before.keys() == after.keys()
    rows = {f"{name}.experts": list(layer.experts) for name, layer in selection.layers.items()}
    for name, old in before.items():
        chosen = rows.get(name.rpartition(".")[0], [])
        same = [i for i in range(len(old)) if i not in chosen] if old.dim() else slice(None)
        assert torch.equal(after[name][same], old[same]), name
        for expert in chosen:
            assert not torch.equal(after[name][expert], old[expert]), (name, expert)


def test_the_model_computes_the_same(model):
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        after = train_selected_experts(model, selection_of(model))(input_ids=IDS).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_native_family_is_served(family):
    """Same output, gradients for the chosen slices alone, the plain model afterwards."""
    model, inputs = build_tiny(family)
    if model.config._experts_implementation == "eager":
        model.set_experts_implementation("hf_moe")
    selection = ExpertSelection.from_experts(model, {layer.name: CHOSEN for layer in moe_layers(model)})
    keys = list(model.state_dict())
    before = output_of(model, inputs).detach()
    after = output_of(train_selected_experts(model, selection), inputs)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    after.square().mean().backward()
    assert sum(p.grad.numel() for p in model.parameters() if p.grad is not None) == selection.num_parameters
    assert list(fold_selected_experts(model).state_dict()) == keys


def output_of(model, inputs):
    torch.manual_seed(0)  # some families draw noise
    return next(value for value in model(**inputs).values() if torch.is_tensor(value) and value.is_floating_point())


def is_before_5_23():
    return tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23)


IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "hf_moe", "hf_moe_grouped", "hf_moe_reference")


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_skips_the_others_rows(family, implementation):
    assert implementation in BACKENDS
    if implementation == "eager" and (family == "gpt_oss" or is_before_5_23()):
        pytest.skip("transformers' loop cannot skip slots: refused, see below")
    model, _ = build_tiny(family)
    model.set_experts_implementation("eager")
    selection = selection_of(model)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    model.set_experts_implementation(implementation)
    train_selected_experts(model, selection)
    loss_of(model).backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in grads)
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-5)


def test_adamw_with_weight_decay_moves_the_chosen_slices_only(model):
    selection = selection_of(model)
    router = freeze_router(model)
    before = copy_of(model.state_dict())
    train_selected_experts(model, selection)
    optimizer = train_adamw(model)
    assert verify_router_frozen(model, router)
    assert_only_chosen_moved(before, model.state_dict(), selection)
    assert state_numel(optimizer) == 2 * selection.num_parameters
    plain = fold_selected_experts(model)
    assert_only_chosen_moved(before, plain.state_dict(), selection)


def test_gradients_exist_for_the_chosen_slices_only(model):
    selection = selection_of(model)
    train_selected_experts(model, selection)
    loss_of(model).backward()
    with_grad = {name: p.grad.numel() for name, p in model.named_parameters() if p.grad is not None}
    assert sum(with_grad.values()) == selection.num_parameters
    assert all(".experts.trained_slices." in name for name in with_grad)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == selection.num_parameters


@pytest.mark.parametrize("kind", ["experts", "lora"])
def test_it_compiles_as_one_graph(kind):
    model, inputs = build_tiny("qwen3_moe")
    model.set_experts_implementation("hf_moe_grouped")
    selection = selection_of(model)
    if kind == "lora":
        model = lora_of(model)
        accelerate_adapters(model)
        mask_expert_lora(model, selection)
    else:
        train_selected_experts(model, selection)
    expected = model(**inputs).logits
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(actual, expected)
    actual.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["hf_moe", *NATIVE])
def test_equals_full_fine_tuning_with_masked_gradients(name):
    """SGD in float64: the same numbers as gradients of everything, set to zero outside of the chosen slices."""
    ours, full = BUILD[name]().double(), BUILD[name]().double()
    for model in (ours, full):
        model.set_experts_implementation("hf_moe_reference")
    selection = selection_of(ours)
    train_selected_experts(ours, selection)
    chosen = {f"{name}.experts": list(layer.experts) for name, layer in selection.layers.items()}
    for _ in range(3):
        for model in (ours, full):
            loss_of(model).backward()
        with torch.no_grad():
            for parameter in ours.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
            for path, parameter in full.named_parameters():
                for expert in chosen.get(path.rpartition(".")[0], []):
                    parameter[expert] -= 0.5 * parameter.grad[expert]
        ours.zero_grad()
        full.zero_grad()
    for path, value in fold_selected_experts(ours).state_dict().items():
        torch.testing.assert_close(value, full.state_dict()[path], rtol=1e-9, atol=1e-12)


def test_a_save_at_any_time_is_an_ordinary_checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    train_selected_experts(model, selection_of(model))
    train_adamw(model)
    model.save_pretrained(tmp_path / "tuned")
    keys = [load_file(tmp_path / name / "model.safetensors").keys() for name in ("base", "tuned")]
    assert keys[0] == keys[1]
    loaded = type(model).from_pretrained(tmp_path / "tuned").eval()
    plain = fold_selected_experts(model)
    for name, value in plain.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(in_own_memory(loaded)(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_folding_gives_the_plain_model_back(model):
    classes = {name: type(module) for name, module in model.named_modules()}
    flags = [vars(layer.experts).get("_is_expert_parallel") for layer in moe_layers(model)]
    before = copy_of(model.state_dict())
    folded = fold_selected_experts(train_selected_experts(model, selection_of(model)))
    assert folded is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert [vars(layer.experts).get("_is_expert_parallel") for layer in moe_layers(model)] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    train_selected_experts(model, selection_of(model))  # and again


def test_the_layers_are_still_found(model):
    before = [(layer.name, layer.num_experts, layer.top_k) for layer in moe_layers(model)]
    experts = [layer.experts for layer in moe_layers(model)]
    train_selected_experts(model, selection_of(model))
    assert [(layer.name, layer.num_experts, layer.top_k) for layer in moe_layers(model)] == before
    assert all(layer.experts is old for layer, old in zip(moe_layers(model), experts, strict=True))


def test_a_state_dict_loads_into_base_and_slices(model):
    other = copy_of(model.state_dict())
    other = {name: value + 0.25 if value.is_floating_point() else value for name, value in other.items()}
    train_selected_experts(model, selection_of(model))
    model.load_state_dict(other)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other[name]), name
    assert all(torch.equal(value, other[name]) for name, value in fold_selected_experts(model).state_dict().items())


def test_a_state_dict_of_single_experts_is_refused():
    model, _ = build_tiny("qwen3_moe")
    train_selected_experts(model, selection_of(model))
    with pytest.raises(ValueError, match=r"holds every expert singly\. Load the checkpoint with from_pretrained"):
        model.load_state_dict({"model.layers.1.mlp.experts.0.gate_proj.weight": torch.zeros(1)}, strict=False)
    model.load_state_dict({"model.norm.weight": torch.zeros(32)}, strict=False)


ROWS = PackedRows(torch.randint(0, 64, (24, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int32))


def trainer_of(model, folder, trainer_class=MoeTrainer):
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        gradient_checkpointing=True,
    )
    return trainer_class(model=model, args=arguments, train_dataset=ROWS)


@pytest.mark.parametrize("name", ["hf_moe", "qwen3_moe", "gpt_oss"])
def test_a_run_resumes_where_it_stopped(name, tmp_path):
    selection = selection_of(BUILD[name]())
    one = train_selected_experts(BUILD[name](), selection)
    trainer_of(one, tmp_path / "one").train()
    two = train_selected_experts(BUILD[name](), selection)
    trainer = trainer_of(two, tmp_path / "two")
    trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert state_numel(trainer.optimizer) == 2 * selection.num_parameters
    for path, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[path], value, rtol=1e-6, atol=1e-7)
    loaded = type(one).from_pretrained(tmp_path / "one" / "checkpoint-4")
    assert all(torch.equal(value, one.state_dict()[path]) for path, value in loaded.state_dict().items())


def test_the_hosts_trainer_does_not_resume_on_the_wrong_experts(tmp_path):
    model = train_selected_experts(build_tiny("qwen3_moe")[0], selection_of(build_tiny("qwen3_moe")[0]))
    trainer_of(model, tmp_path).train()
    with pytest.raises(ValueError, match=r"resume with hf_moe\.MoeTrainer"):
        trainer_of(model, tmp_path, Trainer).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def quantised(model):
    experts = moe_layers(model)[1].experts
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.int8), requires_grad=False)


def parametrised(model):
    nn.utils.parametrize.register_parametrization(moe_layers(model)[1].experts, "down_proj", nn.Identity())


def offloaded(model):
    experts = moe_layers(model)[1].experts
    experts.forward = experts.forward


def distributed(model):
    experts = moe_layers(model)[1].experts
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, nn.Parameter(getattr(experts, name)[:4].detach()))


@pytest.fixture(autouse=True)
def _registry_as_it_was():
    yield
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    type(ALL_EXPERTS_FUNCTIONS)._global_mapping.pop("somebodys", None)


def unknown_implementation(model):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("somebodys", ALL_EXPERTS_FUNCTIONS["grouped_mm"])
    model.set_experts_implementation("somebodys")


REFUSED = {
    quantised: "stored as torch.int8",
    parametrised: "quantised or offloaded",
    offloaded: "quantised or offloaded",
    distributed: "has 4 slices for 8 experts",
    unknown_implementation: "experts_implementation='somebodys' can skip slots is unknown",
}


@pytest.mark.parametrize("change", REFUSED)
def test_experts_that_cannot_be_split_are_refused_and_nothing_changes(change):
    model = hf_moe_model()
    selection = selection_of(model)
    change(model)
    with pytest.raises(ValueError, match=REFUSED[change]):
        train_selected_experts(model, selection)
    assert not any(isinstance(module, SelectedExperts) for module in model.modules())
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize("family", ["nemotron_h", "gpt_oss"])
def test_a_loop_that_cannot_skip_slots_is_refused(family):
    model, _ = build_tiny(family)
    model.set_experts_implementation("eager")
    selection = selection_of(model)
    with pytest.raises(ValueError, match=r"the class's own loop .* cannot skip slots .*; use 'hf_moe'"):
        train_selected_experts(model, selection)
    model.set_experts_implementation("hf_moe")
    loss_of(train_selected_experts(model, selection)).backward()


def test_bad_selections_and_states_are_refused():
    model = hf_moe_model()
    with pytest.raises(ValueError, match="no expert to train"):
        train_selected_experts(model, ExpertSelection.from_experts(model, {}))
    with pytest.raises(ValueError, match="was made for other MoE layers"):
        train_selected_experts(hf_moe_model(num_hidden_layers=2), selection_of(model))
    with pytest.raises(ValueError, match="no expert of this model is trained"):
        fold_selected_experts(model)
    with pytest.raises(ValueError, match="wrapped by ParamWrapper; merge or unload"):
        train_selected_experts(with_expert_lora(hf_moe_model()), selection_of(model))
    train_selected_experts(model, selection_of(model))
    with pytest.raises(ValueError, match="they already are; call fold_selected_experts"):
        train_selected_experts(model, selection_of(model))


@pytest.mark.skipif("muse_spark" not in FAMILIES, reason="the installed transformers has no such family")
def test_experts_with_a_norm_of_their_own_share_it():
    model, _ = build_tiny("muse_spark")
    selection = selection_of(model)
    before = copy_of(model.state_dict())
    train_selected_experts(model, selection)
    train_adamw(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    norms = [name for name in before if "post_expert_norm" in name]
    assert norms
    assert all(torch.equal(after[name], before[name]) for name in norms)
    model.load_state_dict(before)


# ---- expert LoRA


LORA_BUILD = {name: BUILD[name] for name in ("hf_moe", *NATIVE)}


@pytest.fixture(params=LORA_BUILD)
def base(request):
    return LORA_BUILD[request.param]()


def lora_of(base):
    torch.manual_seed(7)
    return with_expert_lora(base, target_parameters=["experts.gate_up_proj", "experts.down_proj"])


def factors_by_expert(state):
    """PEFT's factors with the experts first: A `[E, R, in]`, B `[E, out, R]`."""
    found = {}
    for name, value in state.items():
        if "lora_A" in name:
            found[name] = value.reshape(8, -1, value.shape[-1])
        elif "lora_B" in name:
            found[name] = value.reshape(len(value), -1, 8).permute(2, 0, 1)
    assert found
    return found


def chosen_of(name, selection):
    return next(list(layer.experts) for path, layer in selection.layers.items() if f"{path}." in name)


@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
def test_masked_lora_moves_the_chosen_slices_only(base, accelerated, tmp_path):
    selection = selection_of(base)
    tuned = lora_of(base)
    if accelerated:
        accelerate_adapters(tuned)
    before = factors_by_expert(copy_of(tuned.state_dict()))
    assert mask_expert_lora(tuned, selection) is tuned
    optimizer = train_adamw(tuned)
    after = factors_by_expert(tuned.state_dict())
    trained = 0
    for name, old in before.items():
        chosen = chosen_of(name, selection)
        rest = [expert for expert in range(8) if expert not in chosen]
        assert torch.equal(after[name][rest], old[rest])
        # where B is zero, an expert without a token keeps it
        moved = [not torch.equal(after[name][expert], old[expert]) for expert in chosen]
        assert all(moved) if "lora_A" in name else any(moved) or not chosen
        trained += old[chosen].numel()
    assert state_numel(optimizer) == 2 * trained
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == trained


def test_masked_lora_is_stock_in_the_file_and_leaves_other_experts_to_the_base(base, tmp_path):
    base.save_pretrained(tmp_path / "base")
    stock = lora_of(type(base).from_pretrained(tmp_path / "base"))
    stock.save_pretrained(tmp_path / "stock")
    selection = selection_of(base)
    tuned = mask_expert_lora(lora_of(base), selection)
    train_adamw(tuned)
    tuned.save_pretrained(tmp_path / "masked")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stock", "masked")]
    assert {name: value.shape for name, value in files[0].items()} == {
        name: value.shape for name, value in files[1].items()
    }
    plain = type(base).from_pretrained(tmp_path / "base").eval()
    before = copy_of(plain.state_dict())
    loaded = PeftModel.from_pretrained(plain, tmp_path / "masked").eval()
    with torch.no_grad():
        assert torch.equal(in_own_memory(loaded)(input_ids=IDS).logits, tuned(input_ids=IDS).logits)
    merged = tuned.merge_and_unload().state_dict()
    for name, layer in selection.layers.items():
        rest = [expert for expert in range(8) if expert not in layer.experts]
        for weight in ("gate_up_proj", "down_proj"):
            path = f"{name}.experts.{weight}"
            assert torch.equal(merged[path][rest], before[path][rest])
            moved = [not torch.equal(merged[path][expert], before[path][expert]) for expert in layer.experts]
            assert any(moved) or not moved


def test_masked_lora_equals_masked_gradients(base):
    """SGD in float64 beside stock PEFT, whose gradients are set to zero outside of the chosen slices."""
    base = base.double()
    base.set_experts_implementation("eager")
    selection = selection_of(base)
    state = copy_of(base.state_dict())
    ours = mask_expert_lora(lora_of(base), selection)
    other = type(base)(base.config).double().eval()
    other.load_state_dict(state)
    other.set_experts_implementation("eager")
    stock = lora_of(other)
    for _ in range(3):
        for model in (ours, stock):
            loss_of(model).backward()
        with torch.no_grad():
            for parameter in ours.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
            for name, parameter in stock.named_parameters():
                if parameter.grad is not None:
                    values, grads = (factors_by_expert({name: tensor})[name] for tensor in (parameter, parameter.grad))
                    for expert in chosen_of(name, selection):
                        values[expert] -= 0.5 * grads[expert]
        ours.zero_grad()
        stock.zero_grad()
    expected = factors_by_expert(stock.state_dict())
    for name, value in factors_by_expert(ours.state_dict()).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["hf_moe", "qwen3_moe"])
def test_a_masked_lora_run_resumes(name, tmp_path):
    selection = selection_of(BUILD[name]())
    one, two = (mask_expert_lora(lora_of(BUILD[name]()), selection) for _ in range(2))
    trainer_of(one, tmp_path / "one").train()
    trainer = trainer_of(two, tmp_path / "two")
    trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    for path, value in factors_by_expert(one.state_dict()).items():
        torch.testing.assert_close(factors_by_expert(two.state_dict())[path], value, rtol=1e-5, atol=1e-6)


def test_adapters_elsewhere_train_as_before():
    tuned = with_expert_lora(hf_moe_model(), target_modules=["q_proj"])
    mask_expert_lora(tuned, selection_of(hf_moe_model()))
    before = copy_of(tuned.state_dict())
    train_adamw(tuned)
    moved = [name for name, value in tuned.state_dict().items() if not torch.equal(value, before[name])]
    assert sum("q_proj" in name for name in moved) == 6


def test_masks_that_make_no_sense_are_refused():
    selection = selection_of(hf_moe_model())
    with pytest.raises(ValueError, match="have no LoRA adapter 'default'"):
        mask_expert_lora(hf_moe_model(), selection)
    tuned = with_expert_lora(hf_moe_model())
    with pytest.raises(ValueError, match="have no LoRA adapter 'law'"):
        mask_expert_lora(tuned, selection, "law")
    with pytest.raises(ValueError, match="no expert to train"):
        mask_expert_lora(tuned, ExpertSelection.from_experts(hf_moe_model(), {}))
    with pytest.raises(ValueError, match="was made for other MoE layers"):
        mask_expert_lora(with_expert_lora(hf_moe_model(num_hidden_layers=2)), selection)
    mask_expert_lora(tuned, selection)
    with pytest.raises(ValueError, match="is masked already"):
        mask_expert_lora(tuned, selection)
