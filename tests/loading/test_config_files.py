"""A config from elsewhere, of any family, costs neither memory nor time, and is refused in one sentence."""

import json

import pytest
from transformers import PreTrainedConfig
from typer.testing import CliRunner

from hf_moe import cli
from hf_moe.loading.config_files import ConfigError, check_config, load_config
from hf_moe.models.configuration_hf_moe import ALLOW_HUGE
from hf_moe.observability.explain import explain_config
from tiny_hf_moe import tiny_config

NATIVE = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "intermediate_size": 16,
}
# what they used to cost: 5.8 GB and more after 13 s, no end after 25 s, 10 s, 7 s, no end
BOMBS = {
    "labels": ({"num_labels": 10**12}, "num_labels must be at most 131,072"),
    "infinite labels": ({"num_labels": float("inf")}, "num_labels must be at most 131,072, got inf"),
    "layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers must be at most 1,024"),
    "dense layers": ({"mlp_only_layers": [0] * 10**4}, "mlp_only_layers must have at most 1,024 entries, got 10000"),
    "label map": ({"id2label": dict.fromkeys(map(str, range(140_000)), "x")}, "id2label must have at most 131,072"),
    "a part": ({"text_config": {"num_labels": 10**12}}, "num_labels must be at most 131,072"),
}
DAMAGED = {
    "type of a size": {"hidden_size": [1]},
    "negative size": {"vocab_size": -3},
    "padding": {"pad_token_id": 10**9},
    "dtype": {"dtype": 10**30},
    "quantization": {"quantization_config": 3},
    "code": {"auto_map": 3},
    "family": {"model_type": [3]},
}


def write(folder, *, ours, **changes):
    config = tiny_config().to_dict() if ours else dict(NATIVE)
    if "num_labels" in changes:
        config.pop("id2label", None)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("ours", [True, False], ids=["hf_moe", "native"])
@pytest.mark.parametrize("case", BOMBS)
def test_a_small_file_costs_no_memory_and_no_time(case, ours, tmp_path):
    changes, words = BOMBS[case]
    write(tmp_path, ours=ours, **changes)
    with pytest.raises(ConfigError, match=f"{words}.*{ALLOW_HUGE}=1"):
        load_config(tmp_path)


@pytest.mark.parametrize("ours", [True, False], ids=["hf_moe", "native"])
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_config_is_one_line_of_the_command(case, ours, tmp_path):
    """Each used to end `hf-moe info` and `hf-moe card` in a traceback of its own."""
    write(tmp_path, ours=ours, **DAMAGED[case])
    with pytest.raises(ConfigError):
        explain_config(str(tmp_path))
    for command in ("info", "card"):
        result = CliRunner().invoke(cli.app, [command, str(tmp_path)])
        assert result.exit_code == 2, result.output
        assert len(result.output.strip().splitlines()) == 1
        assert "cannot be used: " in result.output


@pytest.mark.parametrize("command", ["trace", "compare", "evaluate"])
def test_a_damaged_config_is_reported_before_the_tokenizer_reads_it(command, tmp_path):
    """Conversations need the tokenizer first, and transformers reads the config for it: a traceback."""
    if command == "evaluate":
        pytest.importorskip("lm_eval", reason="needs lm-eval: pip install hf-moe[eval]")
    model, data = write(tmp_path, ours=False, hidden_size=[1]), tmp_path / "chat.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    more = {
        "trace": ["--data", str(data), "--output", str(tmp_path / "out")],
        "compare": ["--data", str(data), "--dtype-new", "float32"],
        "evaluate": ["--data", str(data), "--output", str(tmp_path / "out")],
    }
    result = CliRunner().invoke(cli.app, [command, str(model), *more[command]])
    assert result.exit_code == 2, result.output
    assert "the config of" in result.output
    assert "Field 'hidden_size' expected int" in result.output


@pytest.mark.parametrize("text", ["[1]", '{"a":' + "[" * 10**5, "{", "\0"])
def test_what_is_no_config(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="cannot be used"):
        check_config(tmp_path)
    with pytest.raises(ConfigError, match=r"is a file\. Name the folder"):
        check_config(tmp_path / "config.json")


def test_a_good_config_passes_and_an_unknown_family_is_no_damage(tmp_path):
    assert load_config(write(tmp_path, ours=False)).num_experts == 4
    (tmp_path / "config.json").write_text('{"model_type": "of_next_year"}')
    with pytest.raises(ValueError, match="of_next_year") as error:
        load_config(tmp_path)
    assert not isinstance(error.value, ConfigError)
    (tmp_path / "config.json").unlink()
    assert check_config(tmp_path) == {}


def test_the_file_that_is_checked_is_the_one_that_is_loaded(monkeypatch):
    """`local_files_only` asks no Hub for the check either, and a revision is checked, not the main branch."""
    asked = []

    def config_dict(source, **options):
        asked.append((options.get("revision"), options.get("local_files_only")))
        return dict(NATIVE), {}

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", config_dict)
    assert load_config("owner/name", revision="v1", local_files_only=True).num_experts == 4
    assert set(asked) == {("v1", True)}
    assert len(asked) > 1
