"""hf-moe generate: see what a model writes"""

import sys
from typing import Annotated, Any

import typer

from hf_moe.cli.common import (
    Adapter,
    ChatTemplate,
    Device,
    Dtype,
    app,
    describe_error,
    fail,
    model_and_adapter,
    require,
    tokenizer_of,
)
from hf_moe.io.console import print_to_stderr


@app.command(rich_help_panel="Fine-tune")
def generate(
    model: Annotated[str, typer.Argument(help="A model folder, an adapter's folder, or a name on the Hub.")],
    adapter: Adapter = None,
    prompt: Annotated[
        str | None, typer.Option(help="The text; if left out standard input, or a conversation in the terminal.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of the conversation.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the prompt as it is.")] = False,
    chat_template: ChatTemplate = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="The base's answer first, then the adapter's.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[
        float | None, typer.Option(help="Share of the likeliest tokens to draw from; if left out as the model says.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answer on the same machine.")] = 0,
    experts_implementation: Annotated[str, typer.Option(help="Experts backend.")] = "hf_moe",
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Write text with a model, or with an adapter on it, to see the outcome of a fine-tuning.

    A prompt goes through the tokenizer's chat template if it has one. An adapter's folder alone will do: its base is
    loaded as well. No code of a checkpoint is run.
    """
    require("recipes", "jinja2", "peft")
    from transformers.utils.logging import disable_progress_bar

    from hf_moe.comparison.run import ModelChoice, load_model
    from hf_moe.generation.generator import Sampling
    from hf_moe.generation.prompts import PromptWriter
    from hf_moe.loading.pretrained import read_config

    base, adapter = model_and_adapter(model, adapter)
    if compare_base and adapter is None:
        fail("--compare-base needs an adapter: give one with --adapter, or name its folder.")
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        prompt = _prompt(prompt)
        read_config(base)  # before the tokenizer: what is no model is named as such
        tokenizer = tokenizer_of(base, chat_template, adapter)()
        writer = PromptWriter(tokenizer, raw=raw, system=system)
        loaded = load_model(ModelChoice(base, adapter, dtype, experts_implementation, device))
        reply = _Reply(loaded, tokenizer, writer, sampling, compare_base)
        if prompt is None:
            _converse(reply)
        else:
            reply([{"role": "user", "content": prompt}])
    except (OSError, RuntimeError, ValueError) as error:
        fail(describe_error(error, base, adapter))
    except KeyboardInterrupt:
        typer.echo()
        fail("interrupted.", code=130)


def _prompt(given: str | None) -> str | None:
    """The prompt of the command line, or else of standard input; None if that is a terminal."""
    if given is None and sys.stdin.isatty():
        return None
    try:
        text = sys.stdin.read().strip() if given is None else given
        text.encode("utf-8")
    except UnicodeError:  # Python reads bytes that are no text as lone surrogates, which no tokenizer takes
        fail("the prompt is no UTF-8 text. Convert it, for example with: iconv -f ISO-8859-1 -t UTF-8")
    if given is None and not text:
        fail("no prompt: give one with --prompt, or on standard input.")
    return text


class _Reply:
    """Prints the answer to a conversation as it is written, before it the base's where both are asked for."""

    def __init__(self, model: Any, tokenizer: Any, writer: Any, sampling: Any, compare_base: bool):
        self.model, self.tokenizer, self.writer = model, tokenizer, writer
        self.sampling, self.compare_base = sampling, compare_base

    def __call__(self, turns: list[dict[str, str]]) -> str:
        token_ids = self.writer.token_ids(turns)
        if not self.compare_base:
            return self._print(token_ids)
        typer.secho("base model:", bold=True)
        self._print(token_ids, adapter_off=True)
        typer.secho("\nwith the adapter:", bold=True)
        return self._print(token_ids)

    def _print(self, token_ids: list[int], adapter_off: bool = False) -> str:
        from hf_moe.generation.generator import answer

        text = answer(self.model, self.tokenizer, token_ids, self.sampling, _write, adapter_off=adapter_off)
        typer.echo()
        return text


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _converse(reply: _Reply) -> None:
    """Answer line after line until the input ends; with a chat template the model sees all of the conversation."""
    kind = "It sees the whole conversation." if reply.writer.chats else "It continues each text by itself."
    print_to_stderr(f"Write to the model; an empty line or Ctrl-D ends. {kind}")
    turns: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ")
        except EOFError:
            typer.echo()
            return
        if not text.strip():
            return
        turns.append({"role": "user", "content": text})
        turns.append({"role": "assistant", "content": reply(turns)})
