"""Cards hold the facts, each where it belongs, and nothing made up."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from typer.testing import CliRunner

import hf_moe.cli.card  # noqa: F401 (adds the command)
from hf_moe import HfMoeForCausalLM
from hf_moe.cli.common import app
from hf_moe.cli.trace import _write
from hf_moe.finetuning.card import finetune_card, write_results
from hf_moe.hub import model_card, write_card
from hf_moe.hub.cards.card import card_from_facts
from hf_moe.hub.cards.checkpoint_facts import CheckpointFacts, checkpoint_facts
from hf_moe.hub.cards.quickstart import quickstart_card
from hf_moe.hub.cards.training_facts import Stage, TrainingFacts, training_facts
from hf_moe.io.installation import install_command
from hf_moe.observability.recording import record_routing

from .card_facts import FINETUNE, QUICKSTART, RESULTS, SHA


def test_a_card_of_a_bare_model_says_what_was_not_measured(saved):
    card = str(model_card(saved))
    for words in (
        "| parameters trained | not measured |",
        "| SHA-256 of the routers | not measured |",
        "| base model | not stated |",
        "Standard benchmarks: not measured",
        "Health: not measured",
        "Routing agreement with the base model: not measured",
        "Energy: not measured",
        "8 experts, top-2, width 16",
        'AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)',
        'AutoTokenizer.from_pretrained("model")',
    ):
        assert words in card, words
    assert "model-index" not in card


def test_the_numbers_of_a_model_are_its_own(saved):
    model = HfMoeForCausalLM.from_pretrained(saved)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"| parameters | {total:,} |" in str(model_card(saved))
    size = (saved / "model.safetensors").stat().st_size
    assert f"| bytes of weights | {size:,} |" in str(model_card(saved))


def test_the_quickstarts_card_holds_its_numbers():
    card = quickstart_card(QUICKSTART)
    for words in (
        "3.9 million parameters, 1.1 million of them active",
        "Held-out text of legal takes 3.000 bits per byte, 3.500 before",
        "The largest rise on other texts is +0.125, on code.",
        "| code | 2.500 | 2.625 | 2.500 | +0.125 | 678 |",
        "| legal (new) | 3.500 | 3.000 | 3.500 | -0.500 | 678 |",
        "writing text like legal (mixed in: code)",
        "**A model of 3.9 million parameters writes little that makes sense.**",
        "| layer | code | legal |",
        "| 1 | 75.0% | 50.0% |",
        "| 1 | 0.800 | 2.500 |",
        "SHA-256 of the routers | abababababab, the same before and after |",
        "after: `" + "ab" * 32 + "`\n\n</details>",
        "| base model | 11 | 2,816 | 0.004 | 150 | 3.625 |",
        "| adapter | 11 | 2,816 | 0.003 | not measured | 3.625 |",
        "| base model | model, trained from scratch in the same run |",
        "| legal | licence texts of Python packages | 50% | 9 | 4,321 |",
        "hf-moe quickstart --domain legal --minutes 5 --seed 0",
        "| logits after loading back | equal |",
        "````text\na ```x``` b\n````",
        "{{ 7 * 7 }}",
    ):
        assert words in card, words
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["library_name"], head["language"]) == ("peft", "en")
    own = quickstart_card(QUICKSTART | {"choices": QUICKSTART["choices"] | {"data": ["notes.txt"]}})
    assert "language" not in yaml.safe_load(own.split("---\n")[1]), "a user's text may be in any language"
    assert "model-index" not in head, "metrics on private text are no benchmark results"


def report_of(saved: Path, adapter: Path | None = None) -> dict:
    """The recipe's report, as if it were of this checkpoint."""
    checkpoint = checkpoint_facts(adapter or saved)
    parameters = {"total": checkpoint.total, "active": checkpoint.active, "trained": checkpoint.trained or 99}
    return FINETUNE | {"model_type": "hf_moe", "parameters": parameters}


def test_a_recipes_card_holds_its_numbers(adapter):
    card = finetune_card(adapter.parent, FINETUNE, saved="adapter")
    for words in (
        "Held-out text of law takes 1.250 bits per byte, 1.500 before (lower is better)",
        "# OLMoE-1B-7B-0924 with expert LoRA, fine-tuned on law\n",
        "writing text like law |",
        "SHA-256 of the routers | abababababab before, cdcdcdcdcdcd after: CHANGED |",
        "| law | 1.500 | 1.250 | -0.250 | 70 |",
        "| loss of TRL's trainer, in nats | 2.000 | 1.500 |",
        "**Prompt 1** (law)\n\n```text\nThe court\n```\n\nBefore training:\n\n```text\nis\nred.\n```",
        "| Expert LoRA | 10 | 2,560 | 0.0003 | 25 | 3.625 |",
        'from_pretrained("allenai/OLMoE-1B-7B-0924", trust_remote_code=True)',
        "| law | 50% | 3 | 99 |",
        "| 0 | 50.0% |",
        "8 experts, top-2, width 16",
        "Health after training: Routing is healthy",
        "| adapter | expert LoRA, r 2, lora_alpha 4 |",
        "Hardware: NVIDIA H100, x86_64, 4 threads, 8 processes.",
        "| r | 8 |\n| learning_rate | 0.0003 |",
    ):
        assert words in card, words
    assert ModelCard(card).data.base_model == "allenai/OLMoE-1B-7B-0924"


def test_an_adapter_of_our_own_kind_says_that_it_needs_hf_moe():
    checkpoint = CheckpointFacts("x", is_adapter=True, adapter={"peft_type": "ADAPTER_EXPERTS"})
    card = str(card_from_facts(checkpoint, TrainingFacts()))
    assert "Adapters of this kind need hf_moe" in card
    assert "trust_remote_code" not in card


def test_an_adapters_card_tells_of_its_base(adapter, saved):
    """From the base's config, which lies beside it; a local folder is no name on the Hub."""
    card = model_card(adapter)
    total = sum(parameter.numel() for parameter in HfMoeForCausalLM.from_pretrained(saved).parameters())
    assert f"| parameters of the base | {total:,} |" in str(card)
    assert "| base model | model (a folder, not on the Hub) |" in str(card)
    assert 'Replace "model" and "adapter" by the paths of your copies.' in str(card)
    assert card.data.base_model is None
    named = model_card(adapter, base_model="me/base", repo_id="me/adapter")
    assert (named.data.base_model, named.data.base_model_relation) == ("me/base", "adapter")
    assert "by the paths" not in str(named)
    assert "url = {https://huggingface.co/me/adapter}" in str(named)


def test_a_base_named_from_the_adapters_folder_is_at_hand(adapter, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copied = tmp_path / "run" / "adapter"
    shutil.copytree(adapter, copied)
    shutil.copytree(saved, tmp_path / "run" / "model")
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "../model"}))
    assert checkpoint_facts(copied).total == checkpoint_facts(saved).total
    # reads as owner/name, and is a folder
    shutil.copytree(saved, tmp_path / "out" / "model")
    (copied / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "out/model"}))
    assert model_card(copied).data.base_model is None


def test_a_base_in_the_hubs_cache_is_at_hand(adapter, saved, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--me--base" / "snapshots" / SHA
    shutil.copytree(saved, snapshot)
    (tmp_path / "models--me--base" / "refs").mkdir()
    (tmp_path / "models--me--base" / "refs" / "main").write_text(SHA)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    copied = tmp_path / "adapter"
    shutil.copytree(adapter, copied)
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "me/base"}))
    found = checkpoint_facts(copied)
    assert (found.total, found.base_is_local) == (checkpoint_facts(saved).total, False)
    assert model_card(copied).data.base_model == "me/base"


def test_the_quickstarts_base_has_a_card_without_the_adapters_numbers(saved):
    total = checkpoint_facts(saved).total
    report = QUICKSTART | {"base": QUICKSTART["base"] | {"parameters": {"total": total}, "router_sha256": "ef" * 32}}
    card = str(model_card(saved, training=report))
    for words in (
        "| base model | trained from scratch |",
        f"| parameters trained | {total:,} |",
        "| SHA-256 of the routers | efefefefefef |",
        "| legal (new) | 3.500 | 678 |",
        "| legal | licence texts of Python packages | 0% | 9 | 4,321 |",
        "| code | source of Python's standard library | 100% | 9 | 4,321 |",
    ):
        assert words in card, words
    for foreign in ("327,680", "ab" * 32, "After training:", "2.625", "| adapter | 11 |"):
        assert foreign not in card, foreign


def test_a_results_folder_is_written_whole(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    write_results(tmp_path, FINETUNE, saved="adapter")
    card = (tmp_path / "README.md").read_text()
    plots = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert plots == ["bits_per_byte.png", "loss.png"]
    assert all(f"(plots/{name})" in card for name in plots)


def test_results_become_a_table_and_metadata_that_the_hub_reads_back(saved, tmp_path):
    card = model_card(saved, results=RESULTS, repo_id="me/model", license="apache-2.0", language="en")
    text = str(card)
    assert "| gsm8k | 3 | 5 | exact_match,strict-match | 0.1250 ± 0.0100 | 1,319 |" in text
    assert "first 6 of 2,376" in text
    assert "| private | 3 | 5 | acc | 0.5000 ± 0.0100 | 1,319 |" in text
    assert "| mmlu (all its tasks) | - | - | acc | 0.2500 ± 0.0200 | 2 tasks |" in text
    assert "| private | layer 1, expert 3 | 25.0% | acc | -0.1250 (-0.2500 to +0.0100) | 50 |" in text
    assert "lost their beginning: private 7." in text
    assert "| notes | 1,000 | 2.250 |" in text
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.to_dict() == card.data.to_dict()
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    found = {(result.dataset_type, result.metric_type, result.metric_value) for result in data.eval_results}
    assert found == {("openai/gsm8k", "exact_match", 0.125), ("allenai/ai2_arc", "acc", 0.25)}
    assert {result.dataset_revision for result in data.eval_results} == {SHA}
    assert all(result.source_name == "lm-evaluation-harness 0.4.13" for result in data.eval_results)


def test_full_runs_go_where_the_leaderboards_look(saved, tmp_path):
    written = write_card(saved, output=tmp_path, results=RESULTS)
    assert {path.relative_to(tmp_path).as_posix() for path in written} == {"README.md", ".eval_results/gsm8k.yaml"}
    (entry,) = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results" / "gsm8k.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 12.5)
    assert (entry.dataset_revision, entry.date) == (SHA, "2026-11-22")


def test_a_trainers_state_is_a_training_report():
    state = {"global_step": 84, "best_model_checkpoint": "/home/jane/out", "num_input_tokens_seen": 0}
    log = [{"loss": 2.0, "step": 1, "learning_rate": 0.1}, {"loss": float("nan")}, {"train_runtime": 9}]
    (stage,) = training_facts({**state, "log_history": log}).stages
    assert stage == Stage("training", 84, tokens=None, learning_rate=0.1, seconds=9.0, last_loss=2.0)


def test_a_recorded_trace_is_judged_and_drawn(saved, tmp_path):
    model = HfMoeForCausalLM.from_pretrained(saved)
    with record_routing(model) as trace, torch.no_grad():
        model(torch.randint(1, 64, (8, 100)))
    trace.save(tmp_path / "trace")
    write_card(saved, output=tmp_path / "card", trace=tmp_path / "trace", training=report_of(saved))
    card = (tmp_path / "card" / "README.md").read_text()
    plots = sorted(path.name for path in (tmp_path / "card" / "plots").iterdir())
    assert plots == ["bits_per_byte.png", "expert_load.png", "loss.png"]
    assert all(f"(plots/{name})" in card for name in plots)
    entropy = trace.metrics()["load_entropy/model.layers.0.mlp"]
    assert f"| model.layers.0.mlp | {entropy:.3f} |" in card
    assert "Health: not measured" not in card


def test_what_hf_moe_trace_writes_is_read(saved, tmp_path):
    """Its folder, and the metrics.json in it."""
    model = HfMoeForCausalLM.from_pretrained(saved)
    with record_routing(model) as trace, torch.no_grad():
        model(torch.randint(1, 64, (8, 100)))
    _write(tmp_path / "out", trace, "model")
    folder, file = (model_card(saved, trace=path) for path in (tmp_path / "out", tmp_path / "out" / "metrics.json"))
    assert str(folder) == str(file)
    assert "Health: not measured" not in str(file)
    assert f"| model.layers.0.mlp | {trace.metrics()['load_entropy/model.layers.0.mlp']:.3f} |" in str(file)


def test_the_command(saved, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    arguments = ["card", str(saved), "--results", str(tmp_path / "results.json"), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--repo-id", "me/model", "--dataset", "me/data"])
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "out" / "README.md") in done.output
    assert ModelCard.load(tmp_path / "out" / "README.md").data.datasets == ["me/data"]
    for wrong in (tmp_path / "nothing.json", saved / "model.safetensors"):
        refused = CliRunner().invoke(app, ["card", str(saved), "--results", str(wrong)])
        assert refused.exit_code == 2
    assert CliRunner().invoke(app, ["card", str(tmp_path / "nothing")]).exit_code == 2


def test_the_command_takes_the_runs_report_from_the_folder_above(adapter, tmp_path):
    """Another run's report is refused, and a card that says more is kept."""

    def call(*more):
        done = CliRunner().invoke(app, ["card", str(run / "adapter"), *map(str, more)])
        return done.exit_code, " ".join(done.output.split())

    run = tmp_path / "run"
    shutil.copytree(adapter, run / "adapter")
    report = report_of(adapter, adapter)
    (run / "report.json").write_text(json.dumps(report))
    (run / "results.json").write_text(json.dumps(RESULTS | {"model": {"model_type": "olmoe"}}))
    code, said = call()
    assert code == 0, said
    assert f"training report: {run / 'report.json'}" in said
    card = run / "adapter" / "README.md"
    assert "| law | 1.500 | 1.250 | -0.250 | 70 |" in card.read_text()
    assert "gsm8k" not in card.read_text(), "results of another model"
    rich = card.read_text()
    (run / "report.json").unlink()
    assert call()[0] == 0
    assert "Bits per byte: not measured" in card.read_text()
    assert card.with_name("README.old.md").read_text() == rich
    call()
    assert not card.with_name("README.old2.md").exists(), "an equal card is not kept"
    (run / "report.json").write_text(json.dumps(report | {"parameters": report["parameters"] | {"trained": 7}}))
    code, said = call()
    assert (code, "parameters that were trained: 7 and" in said) == (2, True), said
    (run / "right.json").write_text(json.dumps(report))
    assert call("--training", run / "right.json")[0] == 0


def test_without_jinja_the_extra_is_named(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=re.escape(install_command("recipes"))):
        model_card(saved)
