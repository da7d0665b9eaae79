"""Bad input for cards: text from data becomes no markup, YAML, template or leak; other models' facts stay out."""

import copy
import getpass
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_moe.hub import model_card, write_card
from hf_moe.hub.cards import benchmarks
from hf_moe.hub.cards.card import card_from_facts
from hf_moe.hub.cards.checkpoint_facts import CheckpointFacts, checkpoint_facts
from hf_moe.hub.cards.facts import CardError
from hf_moe.hub.cards.markdown import NOT_MEASURED, cell, fenced, table
from hf_moe.hub.cards.metadata import CardChoices
from hf_moe.hub.cards.routing_facts import RoutingFacts
from hf_moe.hub.cards.same_model import refuse_other_training
from hf_moe.hub.cards.training_facts import TrainingFacts, training_facts

from .card_facts import FINETUNE, QUICKSTART, RESULTS

TOKEN = "hf_" + "aB3dE6gH9j" * 3 + "xyz"
HOSTILE = {
    "<script>": r"\<script\>",
    "a|b": r"a\|b",
    "a\nb\n# c": r"a b \# c",
    "`x`": r"\`x\`",
    "[x](http://y)": r"\[x\](http://y)",
    "&lt;": r"\&lt;",
    "snake_case": "snake_case",
    "_emphasis_": r"\_emphasis\_",
    "back\\slash": r"back\\slash",
    "hidden\u202etxt\x00\x1b[0m": r"hidden txt \[0m",
    True: "True",
    float("nan"): NOT_MEASURED,
}


@pytest.mark.parametrize("text", HOSTILE)
def test_cells_hold_no_markup(text):
    assert cell(text) == HOSTILE[text]


EVIL = "x\n---\nlicense: evil\n---\n# <img src=x onerror=alert(1)> {{ 7 * 7 }} {% for x in ().__class__.__mro__ %}|`"


def evil_copy(value):
    """The same structure with every text, and every name that is data, replaced."""
    if isinstance(value, dict):
        return {key: evil_copy(item) for key, item in value.items()} | {EVIL: {"metrics": {EVIL: {"value": 1.0}}}}
    return (
        [evil_copy(item) for item in value] if isinstance(value, list) else EVIL if isinstance(value, str) else value
    )


@pytest.mark.parametrize("report", [QUICKSTART, FINETUNE], ids=["quickstart", "finetune"])
def test_hostile_facts_stay_text(report):
    config = {"router": {EVIL: EVIL}, "adapter": {"peft_type": EVIL}, "layers": (EVIL,), "model_class": EVIL}
    card = card_from_facts(
        CheckpointFacts(EVIL, is_adapter=True, model_type=EVIL, base_model=EVIL, dtype=EVIL, **config),
        training_facts(evil_copy(report)),
        evil_copy(RESULTS),
        RoutingFacts({f"load_entropy/{EVIL}": 1.0}, {}, EVIL),
        CardChoices(repo_id=EVIL),
        title=EVIL,
        plots=[EVIL],
    )
    text = str(card)
    head = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert ModelCard(text).data.to_dict().keys() == head.keys()
    assert not {"license", "language", "base_model", "datasets"} & head.keys(), "no valid value, so no value"
    assert "{{ 7 * 7 }}" in text.replace("\\", ""), "kept as text, not computed"
    outside = re.split(r"^```+\w*$", text.split("\n---\n", 1)[1], flags=re.MULTILINE)[::2]
    assert not any("<img" in part.replace("\\<", "") for part in outside)
    assert not any(line.startswith(("# <", "license:", "---")) for part in outside for line in part.splitlines())


def test_a_hostile_config_stays_text_and_runs_no_code(saved, tmp_path, monkeypatch):
    """Code that a checkpoint brings is neither run nor asked about."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the checkpoint's code"))
    config = json.loads((saved / "config.json").read_text())
    config |= {"router_scoring": EVIL, "model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = str(model_card(tmp_path))
    assert "<img" not in text.replace("\\<", "")
    assert not (tmp_path / "ran").exists()


WRONG_CHOICES = {
    "repo_id": ("model", "a/b/c", EVIL),
    "base_model": ("/home/jane/base", "..", EVIL),
    "license": ("Apache 2", "Apache-2.0", EVIL),
    "language": ("English", EVIL),
    "datasets": (["squad v2"], [EVIL]),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG_CHOICES for value in WRONG_CHOICES[name]])
def test_what_the_hub_would_not_take_is_refused(name, value, saved):
    with pytest.raises(CardError, match=f"{name.removesuffix('s')} must be"):
        model_card(saved, **{name: value})


def test_a_folder_without_a_model_is_refused_before_anything_is_written(saved, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(CardError, match=r"neither config\.json nor adapter_config\.json\. Name its model folder"):
        write_card(tmp_path / "run")
    with pytest.raises(CardError, match="license must be"):
        write_card(saved, output=tmp_path / "run", license="Apache 2", training=FINETUNE)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]


@pytest.mark.parametrize("damage", [{"hidden_size": "x"}, {"hidden_size": -8}, {"num_experts": 10**30}], ids=str)
def test_a_damaged_config_is_refused(damage, saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | damage))
    with pytest.raises(CardError, match=r"the config of .* cannot be used: "):
        model_card(tmp_path)


def test_a_model_that_transformers_does_not_know_has_open_sizes(saved, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "nope", "architectures": ["Nope"]}))
    card = model_card(tmp_path)
    assert "| parameters | not measured |" in str(card)
    assert card.data.pipeline_tag is None, "nothing says that it continues text"


OTHERS = {
    "results, type": {"results": RESULTS | {"model": {"name": "other", "model_type": "olmoe"}}},
    "results, size": {"results": RESULTS | {"model": {"name": "other", "parameters": 7}}},
    "report, type": {"training": FINETUNE},
    "report, size": {"training": FINETUNE | {"model_type": "hf_moe"}},
    "lm-eval's own results": {"results": {"results": {"gsm8k": {}}}},
    "results as report": {"training": RESULTS},
    "report as results": {"results": FINETUNE},
}


@pytest.mark.parametrize("given", OTHERS.values(), ids=OTHERS)
def test_facts_of_another_model_or_kind_are_refused(given, saved):
    with pytest.raises(CardError, match=r"of different models|is no results\.json|is neither the report\.json"):
        model_card(saved, **given)


def test_results_without_the_adapter_are_not_the_adapters(adapter, saved):
    total, added = (checkpoint_facts(folder) for folder in (saved, adapter))
    model = {"name": "model", "model_type": "hf_moe", "parameters": total.total}
    with pytest.raises(CardError, match="of the base without this adapter"):
        model_card(adapter, results=RESULTS | {"model": model})
    with_adapter = model | {"parameters": total.total + added.trained}
    assert "gsm8k" in str(model_card(adapter, results=RESULTS | {"model": with_adapter}))
    with pytest.raises(CardError, match="of different models"):
        model_card(saved, results=RESULTS | {"model": with_adapter})
    with pytest.raises(CardError, match="are of the model with an adapter"):
        model_card(saved, results=RESULTS | {"model": with_adapter | {"adapter": "adapter"}})


def test_routers_of_another_checkpoint_are_refused(saved, tmp_path):
    checkpoint = CheckpointFacts("x", router_sha256="ab" * 32)
    refuse_other_training(checkpoint, TrainingFacts(router_after="ab" * 32))
    with pytest.raises(CardError, match="routers with the SHA-256"):
        refuse_other_training(checkpoint, TrainingFacts(router_after="cd" * 32))


def test_a_trace_of_another_model_is_refused(saved, tmp_path):
    file = tmp_path / "metrics.json"
    for trace, message in (
        ({"metrics": {"all": {"load_entropy/a": 1.0}}, "model_facts": {"model_type": "olmoe"}}, "the type: olmoe"),
        ({"metrics": {"all": {"load_entropy/a": 1.0}}}, "MoE layers: 1 and 3"),
        ({"metrics": {"load_entropy/a": 1.0}}, "is no metrics.json of hf-moe trace"),
        ({}, "is no metrics.json of hf-moe trace"),
    ):
        file.write_text(json.dumps(trace))
        with pytest.raises(CardError, match=message):
            model_card(saved, trace=file)
    with pytest.raises(CardError, match="is no trace"):
        model_card(saved, trace=tmp_path)


@pytest.mark.parametrize("junk", [None, [], "x", 7, True, {}, {"a": []}, [None], {"tasks": 3}, float("nan")], ids=str)
def test_facts_of_any_shape_are_taken_or_left(junk, saved):
    fields = ("choices", "text", "base", "adapter", "evaluation", "domains", "log", "router_sha256", "parameters")
    fields += ("seconds", "machine", "interrupted", "load_back", "versions", "log_history", "recipe", "date")
    for field in fields:
        for report in (QUICKSTART, FINETUNE):
            facts = training_facts(report | {field: junk})
            assert isinstance(facts, TrainingFacts)
            assert str(card_from_facts(CheckpointFacts(name="x"), facts))
    for field in RESULTS:
        assert str(card_from_facts(CheckpointFacts(name="x"), TrainingFacts(), results=RESULTS | {field: junk}))
        assert isinstance(benchmarks.eval_files(RESULTS | {field: junk}), dict)


def test_nothing_of_this_machine_is_in_it(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "jane")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/jane doe"))
    report = copy.deepcopy(FINETUNE)
    report["command"] = f"python recipes/x.py --data=/home/jane doe/secret/a.txt --out {tmp_path}/out --key {TOKEN}"
    report["choices"]["model"] = str(tmp_path / "jane" / "base")
    report["recipe"] = r"C:\Users\jane\run and ~/notes/x.md by jane@box.local and file:///srv/jane/y.md"
    results = {"command": f"hf-moe evaluate {saved}", "domains": RESULTS["domains"]}
    text = str(card_from_facts(checkpoint_facts(saved), training_facts(report), results))
    for secret in (TOKEN, "jane", "/home", str(tmp_path), str(saved.parent), "Users", "box.local", "srv"):
        assert secret not in text, secret
    for kept in ("a.txt", "x.md", "[token removed]", "recipes/x.py"):
        assert kept in text.replace("\\", ""), kept


def test_a_missing_value_reads_not_measured_and_numbers_align():
    text = table(["name", "value"], [("a", 1_234), ("b", None), ("c", 0.5)])
    assert text.split("\n") == [
        "| name | value |",
        "| --- | ---: |",
        "| a | 1,234 |",
        f"| b | {NOT_MEASURED} |",
        "| c | 0.500 |",
    ]


@pytest.mark.parametrize("text", ["plain", "```", "a````b", "`"])
def test_a_fence_is_longer_than_any_in_the_text(text):
    opening, *_, closing = fenced(text).split("\n")
    assert closing not in text
    assert opening == closing + "text"
