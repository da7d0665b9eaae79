"""A whole evaluation: what results.json holds, what an interruption leaves, what is refused."""

import json
from pathlib import Path

import pytest
import torch

from chat_cases import TEMPLATES, assistant, user

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install hf-moe[eval]")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from hf_moe.data.bad_rows import DataError  # noqa: E402
from hf_moe.evaluation import measure, tasks  # noqa: E402
from hf_moe.evaluation.errors import EvaluationError  # noqa: E402
from hf_moe.evaluation.masking import MaskError  # noqa: E402
from hf_moe.evaluation.paired import compare_results  # noqa: E402
from hf_moe.evaluation.plan import Evaluation  # noqa: E402
from hf_moe.evaluation.results import HARNESS, read_results, read_samples  # noqa: E402
from hf_moe.evaluation.runner import evaluate  # noqa: E402
from hf_moe.io.stages import RunRefusedError  # noqa: E402
from tiny_benchmarks import write_mirror  # noqa: E402
from tiny_moe import tiny_tokenizer, words  # noqa: E402

TASKS = Path(lm_eval.__file__).parent / "tasks"
ARC, BOOLQ = str(TASKS / "arc/arc_easy.yaml"), str(TASKS / "super_glue/boolq/default.yaml")
SETTINGS = {"tasks": (ARC, BOOLQ), "batch_size": 4, "mask_experts": 1, "mask_limit": 5, "bootstrap_iters": 10}


@pytest.fixture(scope="module")
def domain(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "novel.jsonl"
    path.write_text("".join(json.dumps({"text": words(60, seed)}) + "\n" for seed in range(6)))
    return str(path)


@pytest.fixture(scope="module")
def finished(model_folder, mirror, domain, tmp_path_factory):
    """An evaluation that was not interrupted: its folder and results."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    evaluation = Evaluation(str(model_folder()), data=(domain,), data_root=mirror, **SETTINGS)
    return output, evaluate(evaluation, output, command="hf-moe evaluate model")


def test_conversations_are_a_domain_in_the_models_chat_template(model_folder, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES["olmoe"]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [user("two?"), assistant("four")]}) + "\n{}\n")
    options = {"tokenizer": str(tmp_path / "tokenizer")}
    given = {"data": (str(tmp_path / "chat.jsonl"),), "options": options, "batch_size": 1}
    with pytest.raises(DataError, match=r"1 of 2 rows"):
        evaluate(Evaluation(str(model_folder()), **given), tmp_path / "out")
    results = evaluate(Evaluation(str(model_folder()), on_bad_row="skip", **given), tmp_path / "out")
    text = tokenizer.apply_chat_template([user("two?"), assistant("four")], tokenize=False)
    assert results["domains"]["chat"]["bytes"] == len(text.removeprefix(tokenizer.bos_token))


def without_times(value):
    """The same, without what a clock gave."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "second" not in k or k in ("second", "second_ahead")}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def test_results_hold_what_is_needed_to_repeat_them(finished, mirror, model_folder):
    output, results = finished
    assert read_results(output) == results
    arc = results["tasks"]["arc_easy"]
    assert (arc["version"], arc["num_fewshot"], arc["num_samples"], arc["num_available"]) == (1.0, 0, 12, 12)
    assert arc["metrics"].keys() == {"acc,none", "acc_norm,none"}
    assert arc["definition"] == HARNESS
    assert list(arc["data"]["sha256"]) == ["ARC-Easy/test.jsonl"]
    assert results["harness"]["version"] == lm_eval.__version__
    assert results["seeds"] == {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
    assert results["model"]["experts_implementation"]
    assert results["command"] == "hf-moe evaluate model"
    text = (output / "results.json").read_text()
    for path in (mirror, model_folder().parent, output.parent):
        assert str(path) not in text


def test_values_and_samples_agree(finished):
    output, results = finished
    for name in ("arc_easy", "boolq"):
        entry = results["tasks"][name]
        samples = read_samples(output / entry["samples"])
        assert len(samples) == entry["num_samples"]
        mean = sum(sample["values"]["acc"] for sample in samples) / len(samples)
        assert mean == pytest.approx(entry["metrics"]["acc,none"]["value"], rel=1e-12)


def test_experts_are_counted_over_real_tokens(finished, model_folder, mirror):
    """Against every row alone, without padding."""
    _, results = finished
    model = AutoModelForCausalLM.from_pretrained(model_folder())
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(model_folder()), batch_size=1)
    task = tasks.Tasks([ARC], data_root=mirror).tasks["arc_easy"]
    requests = [(doc, choice) for doc in task.eval_docs for choice in task.doc_to_choice(doc)]
    rows = set()
    for doc, choice in requests:
        context, answer = lm._encode_pair(task.doc_to_text(doc), f" {choice}")
        rows.add(tuple((context + answer)[:-1]))
    counts: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(
                lambda m, a, out, n=name: counts.__setitem__(
                    n, counts.get(n, 0) + torch.bincount(out[2].flatten(), minlength=8)
                )
            )
    for row in rows:
        model(input_ids=torch.tensor([row]))
    layers = results["tasks"]["arc_easy"]["experts"]["layers"]
    for layer in layers:
        expected = counts[f"{layer['layer']}.gate"]
        assert layer["share"] == pytest.approx((expected.double() / expected.sum()).tolist(), abs=1e-3)
        assert layer["unused"] == int((expected == 0).sum())
    assert len(layers) == 3


def test_the_most_used_expert_was_masked(finished):
    _, results = finished
    for entry in (results["tasks"]["arc_easy"], results["domains"]["novel"]):
        layers = {layer["layer"]: layer["share"] for layer in entry["experts"]["layers"]}
        (masked,) = entry["experts"]["masked"]
        assert masked["share"] == max(max(share) for share in layers.values())
        assert layers[masked["layer"]][masked["expert"]] == masked["share"]
        assert masked["documents"] == min(5, entry.get("num_samples", entry.get("documents")))
    bits = results["domains"]["novel"]["experts"]["masked"][0]["metrics"]["bits_per_byte,none"]
    assert bits["difference"] != 0


def test_an_interrupted_evaluation_goes_on_where_it_was(finished, model_folder, mirror, domain, tmp_path, monkeypatch):
    evaluation = Evaluation(str(model_folder()), data=(domain,), data_root=mirror, **SETTINGS)
    scored = []
    score = measure.score

    def interrupted(lm, name, *args):
        if name == "boolq":
            raise KeyboardInterrupt
        scored.append(name)
        return score(lm, name, *args)

    monkeypatch.setattr(measure, "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(evaluation, tmp_path / "run")
    assert not (tmp_path / "run/results.json").exists()
    monkeypatch.setattr(measure, "score", lambda lm, name, *args: scored.append(name) or score(lm, name, *args))
    results = evaluate(evaluation, tmp_path / "run", command="hf-moe evaluate model")
    # once in full and once with an expert masked, each
    assert scored == ["arc_easy", "arc_easy", "boolq", "boolq"]
    assert without_times(results) == without_times(finished[1])


def test_another_model_data_or_setting_is_refused(model_folder, mirror, tmp_path):
    task = tmp_path / "mine.yaml"
    task.write_bytes(Path(ARC).read_bytes())
    settings = {**SETTINGS, "tasks": (str(task),), "mask_experts": 0, "limit": 2}
    copy = write_mirror(tmp_path / "mirror")
    model = str(model_folder())
    evaluate(Evaluation(model, data_root=copy, **settings), tmp_path / "run")
    results = (tmp_path / "run/results.json").read_bytes()
    with pytest.raises(RunRefusedError, match="limit was 2, is 3"):
        evaluate(Evaluation(model, data_root=copy, **{**settings, "limit": 3}), tmp_path / "run")
    with pytest.raises(RunRefusedError, match="model fingerprint was"):
        evaluate(Evaluation(str(model_folder(seed=1)), data_root=copy, **settings), tmp_path / "run")
    task.write_text(task.read_text().replace("Question: ", "Q: "))
    with pytest.raises(RunRefusedError, match="definition of arc_easy was"):
        evaluate(Evaluation(model, data_root=copy, **settings), tmp_path / "run")
    task.write_bytes(Path(ARC).read_bytes())
    with open(copy / "allenai/ai2_arc/ARC-Easy/test.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(RunRefusedError, match="data was"):
        evaluate(Evaluation(model, data_root=copy, **settings), tmp_path / "run")
    assert (tmp_path / "run/results.json").read_bytes() == results


def test_a_group_is_aggregated_as_lm_eval_does(model_folder, mirror, tmp_path, monkeypatch):
    (tmp_path / "exams.yaml").write_text(
        "group: exams\ntask: [arc_easy, boolq]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\nmetadata: {version: 1.0}\n"
    )
    manager = tasks.TaskManager
    folders = [TASKS / "arc", TASKS / "super_glue/boolq"]
    monkeypatch.setattr(
        tasks, "TaskManager", lambda include_defaults: manager(include_defaults=False, include_path=folders)
    )
    group = str(tmp_path / "exams.yaml")
    settings = {**SETTINGS, "tasks": (group,), "mask_experts": 0, "batch_size": 1}
    results = evaluate(Evaluation(str(model_folder()), data_root=mirror, **settings), tmp_path / "run")
    found = tasks.Tasks([group], data_root=mirror)
    lm = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(model_folder()),
        tokenizer=AutoTokenizer.from_pretrained(model_folder()),
        batch_size=1,
    )
    plain = lm_eval.simple_evaluate(lm, tasks=[found.groups["exams"]], task_manager=found.manager)
    exams = results["groups"]["exams"]
    assert exams["metrics"]["acc,none"]["value"] == plain["groups"]["exams"]["acc,none"]
    assert exams["metrics"]["acc,none"]["stderr"] == plain["groups"]["exams"]["acc_stderr,none"]
    assert (exams["tasks"], exams["num_samples"]) == (["arc_easy", "boolq"], 19)


def test_two_evaluations_are_compared(finished, model_folder, mirror, domain, tmp_path):
    other = Evaluation(str(model_folder(seed=1)), data=(domain,), data_root=mirror, **SETTINGS)
    evaluate(other, tmp_path / "other")
    found = compare_results(finished[0], tmp_path / "other" / "results.json")
    assert found["tasks"].keys() == {"arc_easy", "boolq"}
    assert found["domains"]["novel"]["bits_per_byte,none"]["documents"] > 1
    values = [
        read_results(path)["domains"]["novel"]["metrics"]["bits_per_byte"]["value"]
        for path in (finished[0], tmp_path / "other")
    ]
    assert found["domains"]["novel"]["bits_per_byte,none"]["difference"] == pytest.approx(values[1] - values[0])
    assert found["set_otherwise"].keys() == {"model.name", "model.fingerprint"}
    assert found["not_compared"] == []
    path = tmp_path / "other/results.json"
    whole = path.read_text()
    results = json.loads(whole)
    del results["tasks"]["boolq"]
    path.write_text(json.dumps(results))
    assert compare_results(finished[0], tmp_path / "other")["not_compared"] == ["boolq"]
    results["tasks"]["arc_easy"] |= {"definition": "mine.yaml", "definition_sha256": "0" * 64}
    path.write_text(json.dumps(results))
    with pytest.raises(EvaluationError, match=r"'arc_easy' is defined otherwise .*mine.yaml"):
        compare_results(finished[0], tmp_path / "other")
    path.write_text(whole)
    samples = tmp_path / "other/samples/arc_easy.jsonl"
    samples.write_text(samples.read_text().replace('"acc": 1.0', '"acc": 0.0', 1))
    with pytest.raises(EvaluationError, match=r"is not the file that its results.json was written with"):
        compare_results(finished[0], tmp_path / "other")
    samples.unlink()
    with pytest.raises(EvaluationError, match="cannot be read"):
        compare_results(finished[0], tmp_path / "other")


def test_a_router_that_cannot_be_masked_costs_no_metrics(model_folder, mirror, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise MaskError("it chooses by a table")

    monkeypatch.setattr(measure, "masked_metrics", refuse)
    settings = {**SETTINGS, "tasks": (ARC,), "limit": 2}
    results = evaluate(Evaluation(str(model_folder()), data_root=mirror, **settings), tmp_path / "run")
    experts = results["tasks"]["arc_easy"]["experts"]
    assert (experts["masked"], experts["masked_refused"]) == ([], "it chooses by a table")


def test_a_dense_model_has_no_expert_metrics(mirror, tmp_path):
    tokenizer = tiny_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    settings = {**SETTINGS, "tasks": (ARC,), "limit": 3, "options": {"tokenizer": tokenizer}}
    results = evaluate(Evaluation(Qwen3ForCausalLM(config), data_root=mirror, **settings), tmp_path / "run")
    assert results["tasks"]["arc_easy"]["experts"] is None
    assert results["model"]["experts_implementation"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ()}, "nothing to evaluate"),
        ({"limit": 0}, "--limit must be a whole number of documents or a share between 0 and 1, got 0"),
        ({"limit": 2.5}, "got 2.5"),
        ({"limit": float("nan")}, "got nan"),
        ({"batch_size": 0}, "--batch-size must be a number above 0, or auto, got 0"),
        ({"batch_size": "large"}, "got 'large'"),
        ({"num_fewshot": -1}, "--num-fewshot must be 0 or more"),
        ({"mask_limit": 1}, "--mask-limit must be 2 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(change, message):
    with pytest.raises(EvaluationError, match=message):
        Evaluation("model", **{**SETTINGS, **change})


def test_a_missing_model_is_refused_before_anything_is_written(tmp_path):
    for field in ({"model": str(tmp_path / "absent")}, {"model": "m", "adapter": "./absent"}):
        with pytest.raises(EvaluationError, match=r"folder .*absent' does not exist"):
            evaluate(Evaluation(**field, tasks=(ARC,)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_state_on_disk_is_plain_json(finished):
    output, _ = finished
    state = json.loads((output / "evaluation.json").read_text())
    assert list(state["stages"]) == ["arc_easy", "boolq", "domain-novel"]
