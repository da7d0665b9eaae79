"""`hf-moe generate`: what a model writes, with an adapter and without, through a chat template and raw."""

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from chat_cases import TEMPLATES, chat_tokenizer
from hf_moe import cli
from hf_moe.cli.common import tokenizer_of
from hf_moe.finetuning.save import save_adapter
from tiny_moe import qwen_model, with_expert_lora

SHORT = ("--max-new-tokens", "6", "--temperature", "0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A native model with a chat template, and an adapter on it that changes what it writes."""
    model, adapter = (tmp_path_factory.mktemp("generate") / name for name in ("model", "adapter"))
    tokenizer = chat_tokenizer(TEMPLATES["qwen3"])
    base = qwen_model()
    base.resize_token_embeddings(len(tokenizer))
    base.save_pretrained(model)
    tokenizer.save_pretrained(model)
    base.name_or_path = str(model)
    tuned = with_expert_lora(base, init_lora_weights=False, lora_alpha=64)
    tuned.save_pretrained(adapter)
    return model, adapter


def run(*arguments, stdin=None):
    return CliRunner().invoke(cli.app, ["generate", *map(str, arguments)], input=stdin)


def test_an_adapter_is_shown_beside_its_base(folders):
    model, adapter = folders
    both = run(adapter, "--prompt", "abc", "--compare-base", *SHORT)
    assert both.exit_code == 0, both.output
    base, tuned = (
        run(*which, "--prompt", "abc", *SHORT).stdout for which in ((model,), (model, "--adapter", adapter))
    )
    assert both.stdout == f"base model:\n{base}\nwith the adapter:\n{tuned}"
    assert base != tuned
    assert f"{adapter} is a PEFT adapter: it is loaded onto {model}" in both.stderr


def test_the_template_that_an_adapter_learned_with_is_used(folders, tmp_path):
    model, _ = folders
    base = AutoModelForCausalLM.from_pretrained(model)
    learned = chat_tokenizer("learned{{ messages[0].content }}")
    save_adapter(with_expert_lora(base), learned, tmp_path / "adapter")
    assert tokenizer_of(str(model), adapter=str(tmp_path / "adapter"))().chat_template == learned.chat_template
    assert tokenizer_of(str(model))().chat_template == TEMPLATES["qwen3"]


def test_a_chat_template_writes_the_prompt_and_raw_leaves_it_out(folders, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hf_moe.generation.generator.answer",
        lambda model, tokenizer, token_ids, *_, **__: seen.append(tokenizer.decode(token_ids)) or "yes",
    )
    run(folders[0], "--prompt", "abc", "--system", "def")
    run(folders[0], "--raw", stdin="abc\n")
    monkeypatch.setattr("hf_moe.cli.generate._prompt", lambda given: None)
    talk = run(folders[0], stdin="abc\nfed\n\n")
    assert talk.exit_code == 0
    start, end = "<|im_start|>", "<|im_end|>\n"
    user = f"{start}user\nabc{end}{start}assistant\n"
    assert seen == [
        f"{start}system\ndef{end}{user}",
        "abc",
        user,
        f"{user}yes{end}{start}user\nfed{end}{start}assistant\n",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compare-base", "--prompt", "a"), "--compare-base needs an adapter"),
        (("--raw", "--system", "a", "--prompt", "a"), "a system message needs a chat template"),
        (("--temperature", "-1", "--prompt", "a"), "temperature must be 0 or above, got -1.0."),
        (("--top-p", "0", "--prompt", "a"), "top_p must be a share above 0, up to 1, got 0.0."),
        (("--max-new-tokens", "0", "--prompt", "a"), "max_new_tokens must be at least 1, got 0."),
        (("--prompt", "abc " * 99), "tokens, and the model reads 64 in all"),
        ((), "no prompt: give one with --prompt, or on standard input."),
    ],
)
def test_what_cannot_be_answered_is_one_line(folders, arguments, message):
    result = run(folders[0], *arguments, stdin="")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_interruption_ends_the_line(folders, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_moe.generation.generator.answer", interrupt)
    result = run(folders[0], "--prompt", "abc")
    assert (result.exit_code, result.stdout) == (130, "\n")
    assert result.stderr == "error: interrupted.\n"
