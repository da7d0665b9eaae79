"""Scores equal plain lm-eval's to the digit: on a tiny copy of the data, and on the real data where it is."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install hf-moe[eval]")

from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from hf_moe.evaluation.errors import EvaluationError  # noqa: E402
from hf_moe.evaluation.harness import HfMoeLM, cpu_batch_size, without_right_padding  # noqa: E402
from hf_moe.evaluation.plan import Evaluation  # noqa: E402
from hf_moe.evaluation.scoring import prepare, score  # noqa: E402
from hf_moe.evaluation.tasks import Tasks  # noqa: E402
from hf_moe.loading.pretrained import ModelError  # noqa: E402
from tiny_moe import hf_moe_model, tiny_tokenizer, with_expert_lora  # noqa: E402
from tiny_multimodal import build_multimodal  # noqa: E402

TASKS = Path(lm_eval.__file__).parent / "tasks"
YAML = {
    "arc_easy": "arc/arc_easy.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}
REAL = {**YAML, "winogrande": "winogrande/default.yaml", "mmlu_anatomy": "mmlu/default/mmlu_anatomy.yaml"}
REAL_DATA = os.environ.get("HF_MOE_TEST_DATA", "")


def plain_task(name, root):
    """The task as lm-eval itself reads it, with nothing but its data's place and absent splits changed."""
    config = load_yaml(TASKS / REAL[name])
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    folder = Path(root) / config["dataset_path"]
    have = {path.stem for path in (folder / config["dataset_name"]).glob("*.jsonl")}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) not in have:
            config[key] = None
    config["dataset_path"] = str(folder)
    return ConfigurableTask(config=config)


def plain_results(model, tokenizer, name, root, **options):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, backend="causal")
    generation = {"max_gen_toks": 8} if "gsm8k" in name else None
    # a task manager, so that lm-eval does not list its 14,000 tasks
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(
        lm, tasks=[plain_task(name, root)], gen_kwargs=generation, bootstrap_iters=20, task_manager=manager, **options
    )
    return found["results"][name], found["samples"][name]


def our_results(lm, name, root, limit=None):
    evaluation = Evaluation("unused", tasks=(name,), generation={"max_gen_toks": 8}, bootstrap_iters=20)
    tasks = Tasks([str(TASKS / REAL[name])], data_root=Path(root))
    prepare(lm, name, tasks.tasks[name], evaluation)
    found = score(lm, name, tasks.tasks[name], evaluation, limit)
    return found["results"][name], found["samples"][name]


def assert_same(ours, plain):
    assert ours[0] == plain[0]
    for one, two in zip(ours[1], plain[1], strict=True):
        assert one["resps"] == two["resps"]
        assert one["arguments"] == two["arguments"]


@pytest.mark.parametrize("family", ["hf_moe", "qwen3_moe"])
@pytest.mark.parametrize("name", YAML)
def test_equals_plain_lm_eval(name, family, mirror, model_folder):
    folder = model_folder(family)
    lm = HfMoeLM(str(folder), batch_size=3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ours, plain = our_results(lm, name, mirror), plain_results(model, tokenizer, name, mirror)
    assert_same(ours, plain)
    # generated text of a model without training is never right: something must be there all the same
    assert any(len(str(sample["resps"])) > 10 for sample in ours[1])


@pytest.mark.skipif(not REAL_DATA, reason="needs HF_MOE_TEST_DATA, a folder of benchmarks in the Hub's layout")
@pytest.mark.parametrize("name", REAL)
def test_equals_plain_lm_eval_on_real_data(name, model_folder):
    folder = model_folder("hf_moe")
    lm = HfMoeLM(str(folder), batch_size=3)
    plain = plain_results(lm.model, lm.tokenizer, name, REAL_DATA, limit=4)
    assert_same(our_results(lm, name, REAL_DATA, limit=4), plain)


def test_lm_eval_knows_the_model_by_name(mirror, model_folder):
    folder = str(model_folder())
    found = lm_eval.simple_evaluate(
        model="hf-moe",
        model_args={"pretrained": folder, "experts_implementation": "hf_moe_grouped"},
        batch_size=3,
        tasks=[plain_task("arc_easy", mirror)],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
    )
    lm = HfMoeLM(folder, experts_implementation="hf_moe_grouped", batch_size=3)
    assert lm.model.config._experts_implementation == "hf_moe_grouped"
    assert found["results"]["arc_easy"] == our_results(lm, "arc_easy", mirror)[0]


def test_an_adapter_equals_plain_lm_eval_on_the_adapted_model(mirror, model_folder, tmp_path):
    folder = model_folder()
    adapted = with_expert_lora(AutoModelForCausalLM.from_pretrained(folder))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    adapted.save_pretrained(tmp_path)
    base = HfMoeLM(str(folder), batch_size=3)
    lm = HfMoeLM(str(folder), adapter=str(tmp_path), batch_size=3)
    ours = our_results(lm, "arc_easy", mirror)
    assert_same(ours, plain_results(lm.model, lm.tokenizer, "arc_easy", mirror))
    responses = [[sample["resps"] for sample in side] for side in (ours[1], our_results(base, "arc_easy", mirror)[1])]
    assert responses[0] != responses[1]


def test_work_counts_tokens_without_padding(mirror, model_folder):
    lm = HfMoeLM(str(model_folder()), batch_size=3)
    _, samples = our_results(lm, "arc_easy", mirror)
    prompts = [lm.tok_encode(prompt + answer) for sample in samples for prompt, answer in sample["arguments"]]
    # requests that differ in their last token alone share a row
    rows = {tuple(ids[:-1]) for ids in prompts}
    assert lm.work.scored_tokens == sum(map(len, rows))
    assert lm.work.forwards == -(-len(rows) // 3)
    assert lm.work.scored_seconds > 0
    assert lm.work.truncated == 0
    lm.clear_work()
    our_results(lm, "gsm8k", mirror)
    assert 0 < lm.work.generated_tokens <= 5 * 8
    # five examples do not fit 128 tokens
    assert lm.work.truncated == 5


def test_only_zeros_at_the_end_of_a_row_are_padding():
    rows = torch.tensor([[0, 5, 0, 3, 0, 0], [1, 2, 3, 4, 5, 6], [7, 0, 0, 0, 0, 0]])
    assert without_right_padding(rows).sum(-1).tolist() == [4, 6, 1]
    assert without_right_padding(rows)[0].tolist() == [True] * 4 + [False] * 2


def test_generation_without_room_for_the_prompt_says_what_to_do(mirror, model_folder):
    lm = HfMoeLM(str(model_folder()), batch_size=1)
    tasks = Tasks([str(TASKS / YAML["gsm8k"])], data_root=mirror)
    evaluation = Evaluation("unused", tasks=("gsm8k",))
    with pytest.raises(EvaluationError, match=r"asks for 256 new tokens.*context has 128.*max_gen_toks=32"):
        prepare(lm, "gsm8k", tasks.tasks["gsm8k"], evaluation)
    with pytest.raises(EvaluationError, match="no room is left for the prompt"):
        score(lm, "gsm8k", tasks.tasks["gsm8k"], evaluation, 1)
    with pytest.raises(EvaluationError, match=r"no chat template. Leave out --chat-template"):
        prepare(lm, "gsm8k", tasks.tasks["gsm8k"], Evaluation("unused", tasks=("gsm8k",), chat_template=True))


@pytest.mark.parametrize(
    ("option", "message"),
    [({"device": "cuda:99"}, r"--device must be one of cpu.* got 'cuda:99'"), ({"dtype": "float99"}, "got 'float99'")],
)
def test_another_device_or_dtype_never_stands_in(option, message):
    with pytest.raises(EvaluationError, match=message):
        HfMoeLM("never loaded", **option)


def test_finding_a_batch_size_is_no_work_of_the_evaluation():
    model, tokenizer = hf_moe_model(vocab_size=300), tiny_tokenizer()
    lm = HfMoeLM(model, tokenizer=tokenizer, batch_size=2, max_batch_size=4)
    assert lm._detect_batch_size() == 4
    assert lm.work.scored_tokens == 0
    assert not lm.input_mask.any()


def test_batch_size_on_a_cpu_follows_the_free_memory(monkeypatch):
    import psutil

    model = hf_moe_model(vocab_size=300)
    free = type("Free", (), {"available": 4 * 2 * 4 * 128 * 300 * 5})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert cpu_batch_size(model, 128) == 4
    free.available = 1
    assert cpu_batch_size(model, 128) == 1
    free.available = 1 << 60
    assert cpu_batch_size(model, 128) == 16


def test_a_vision_language_model_is_evaluated_whole(tmp_path):
    """lm-eval asks AutoModelForCausalLM, which reads the text model out of some checkpoints and refuses others."""
    tokenizer = tiny_tokenizer()
    model, _ = build_multimodal("qwen3_vl_moe", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = HfMoeLM(str(tmp_path), device="cpu", batch_size=1)
    assert type(lm.model) is type(model)
    with pytest.raises(ModelError, match="no folder here is called"):
        HfMoeLM(str(tmp_path / "absent"), device="cpu")
