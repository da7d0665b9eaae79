"""The section of a card with code that loads the model and writes a text: with hf_moe, and without."""

import json
import re
from collections.abc import Sequence

from hf_moe.hub.cards.checkpoint_facts import CheckpointFacts
from hf_moe.hub.cards.markdown import cell, details, fenced, plain
from hf_moe.hub.cards.metadata import is_repo
from hf_moe.hub.cards.training_facts import TrainingFacts

_LONGEST = 80  # characters of the prompt
_LARGE = 1_000_000_000  # parameters, from which on a model is spread over the devices that there are


def loading(checkpoint: CheckpointFacts, training: TrainingFacts, name: str, base_model: str | None) -> str:
    """Code that runs as it is pasted, if the names are those of repositories."""
    base = base_model or "the base model"
    ours = (checkpoint.model_type or training.model_type) == "hf_moe"
    source = base if checkpoint.is_adapter else name
    adapter = name if checkpoint.is_adapter else None
    is_lora = checkpoint.adapter.get("peft_type", "LORA") == "LORA"
    total = checkpoint.total or training.total
    where = ', device_map="auto"' if total is not None and total >= _LARGE else ""
    write = _write(checkpoint, training)
    accelerate = ["hf_moe.accelerate_adapters(model)  # without merged weights in memory"] if is_lora else []
    registers = 'the model type "hf_moe", and its experts' if ours else 'experts_implementation="hf_moe"'
    code = [
        f"import hf_moe  # adds {registers}",
        *_load(checkpoint, source, "", f'{where}, experts_implementation="hf_moe"', adapter),
        *(accelerate if adapter else []),
        *write,
    ]
    parts = [fenced("\n".join(code), "python"), _paths([source, *([adapter] if adapter else [])])]
    if adapter and not is_lora:
        parts.append("Adapters of this kind need hf_moe: PEFT alone does not know them.")
    else:
        trust = ", trust_remote_code=True" if ours else ""
        without = [*_load(checkpoint, source, trust, where + trust, adapter), *write]
        parts.append(details("Without hf_moe", fenced("\n".join(without), "python")))
    return "\n\n".join(part for part in parts if part)


def _load(
    checkpoint: CheckpointFacts, source: str, for_tokenizer: str, for_model: str, adapter: str | None
) -> list[str]:
    auto = checkpoint.auto_class
    return [
        *(["from peft import PeftModel"] if adapter else []),
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(source)}{for_tokenizer})",
        f"model = {auto}.from_pretrained({json.dumps(source)}{for_model})",
        *([f"model = PeftModel.from_pretrained(model, {json.dumps(adapter)})"] if adapter else []),
    ]


def _write(checkpoint: CheckpointFacts, training: TrainingFacts) -> list[str]:
    """Lines that continue a prompt, or answer it where the tokenizer has a chat template."""
    if checkpoint.has_chat_template:
        # a sample's prompt is what a template has written already
        inputs = [
            'messages = [{"role": "user", "content": "What can you do?"}]',
            'options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}',
            "inputs = tokenizer.apply_chat_template(messages, **options).to(model.device)",
        ]
    else:
        prompt = json.dumps(_prompt(training), ensure_ascii=False)
        inputs = [f"prompt = {prompt}", 'inputs = tokenizer(prompt, return_tensors="pt").to(model.device)']
    return ["", *inputs, "output = model.generate(**inputs, max_new_tokens=50)", "print(tokenizer.decode(output[0]))"]


def _prompt(training: TrainingFacts) -> str:
    """The beginning of the first sample's prompt, or a word."""
    text = next((sample.prompt for sample in training.samples), "")
    line = next((plain(line) for line in text.splitlines() if plain(line)), "Once upon a time")
    return line if len(line) <= _LONGEST else re.sub(r" \S*$", "", line[:_LONGEST])


def _paths(names: Sequence[str]) -> str:
    local = [f'"{cell(each)}"' for each in names if not is_repo(each)]
    if not local:
        return ""
    of = "the path of your copy" if len(local) == 1 else "the paths of your copies"
    return f"Replace {' and '.join(local)} by {of}."
