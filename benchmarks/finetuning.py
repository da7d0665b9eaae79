"""How much each way of fine-tuning learns and forgets: the recipes at equal steps on one base.

    python benchmarks/finetuning.py --base quickstart-output/model --new french=candide.txt

The base is the quickstart's, the old domains are those that it was trained on (the text that every Python carries),
the new one is a text that it has not seen. One run and one seed for each method; seconds are the process's CPU time.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from hf_moe.adapters.adapter_experts import AdapterExpertsConfig
from hf_moe.adapters.esft import fold_selected_experts, train_selected_experts
from hf_moe.adapters.expert_lora import accelerate_adapters, expert_lora_config
from hf_moe.adapters.expert_selection import select_experts
from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.evaluation.fine_tuned import FineTuning
from hf_moe.training.arguments import DataArguments, ModelArguments, RecipeTrainingArguments
from hf_moe.training.callbacks import RouterFreezeCallback
from hf_moe.training.corpus import embedded_corpus
from hf_moe.training.finetuning import save_adapter, save_model

RESULT = Path(__file__).with_name("results") / "finetuning.json"
OLD = ("code", "docs", "readme", "arithmetic")
SIZES = {"row_length": 256, "held_out_records": 40}


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning: what it makes of the base, its learning rate, and the share of rows from old domains."""

    attach: Callable[[FineTuning], Any]
    learning_rate: float
    replay: float = 0.0


def attention_lora(job: FineTuning) -> Any:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(job.model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))


def expert_lora(job: FineTuning) -> Any:
    model = get_peft_model(job.model, expert_lora_config(job.model, r=8))
    accelerate_adapters(model)
    return model


def esft(job: FineTuning) -> Any:
    examples = next(iter(job.data.encodings.values())).examples
    selection = select_experts(job.model, [{"input_ids": e.input_ids} for e in examples], budget=0.6)
    return train_selected_experts(job.model, selection)


METHODS = {
    "attention LoRA": Method(attention_lora, 3e-3),
    "expert LoRA": Method(expert_lora, 3e-3),
    "expert LoRA, replay": Method(expert_lora, 3e-3, replay=0.5),
    "adapter experts": Method(lambda job: get_peft_model(job.model, AdapterExpertsConfig()), 3e-3),
    "adapter experts, replay": Method(lambda job: get_peft_model(job.model, AdapterExpertsConfig()), 3e-3, replay=0.5),
    "ESFT": Method(esft, 1e-3),
    "full": Method(lambda job: job.model, 1e-3),
    "full, replay": Method(lambda job: job.model, 1e-3, replay=0.5),
}


class CpuSeconds(TrainerCallback):
    """CPU seconds of the training itself: they do not grow with what else the machine does."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin = time.process_time()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = time.process_time() - self.begin


def run(name: str, method: Method, base: str, sources: list[dict[str, Any]], folder: Path, steps: int) -> dict:
    shares = {True: 1 - method.replay, False: method.replay / len(OLD)}
    weighted = [{**source, "weight": shares[i == 0]} for i, source in enumerate(sources)]
    training = RecipeTrainingArguments(
        output_dir=str(folder / name.replace(" ", "-")), max_steps=steps, per_device_train_batch_size=10,
        learning_rate=method.learning_rate, warmup_steps=steps // 20, logging_steps=20, save_steps=steps, use_cpu=True,
        dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    job = FineTuning(name, "", method, ModelArguments(base), DataArguments(weighted, **SIZES), training)
    model = method.attach(job)
    freeze_router(job.model)
    clock = CpuSeconds()
    job.train(model, [RouterFreezeCallback(), clock])
    if hasattr(model, "peft_config"):
        save_adapter(model, job.folder / "saved")
    else:
        save_model(fold_selected_experts(model) if name == "ESFT" else model, job.tokenizer, job.folder / "saved")
    report = job.report("saved")
    figures = {
        domain: {key: each[key]["bits_per_byte"] for key in ("before", "after")}
        | {"routing_agreement": min(each["routing_agreement"])}
        for domain, each in report["domains"].items()
    }
    return {
        "learning_rate": method.learning_rate, "replay": method.replay, "trained": report["parameters"]["trained"],
        "saved_bytes": report["saved_bytes"], "cpu_seconds_per_step": clock.seconds / steps, "domains": figures,
        "router_unchanged": report["router_sha256"]["before"] == report["router_sha256"]["after"],
    }  # fmt: skip


def write_sources(folder: Path, name: str, path: Path) -> list[dict[str, Any]]:
    """The new domain first, then the old ones, as data sets."""
    sources = [{"path": str(path), "domain": name}]
    for domain in embedded_corpus(train_bytes=400_000, held_out_bytes=50_000, without=("legal",)).values():
        file = folder / f"{domain.name}.jsonl"
        # the base has not trained on the held-out documents: they come first, where every n-th is held out again
        texts = domain.held_out + domain.train
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources.append({"path": str(file), "domain": domain.name})
    return sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--new", required=True, help="NAME=FILE, UTF-8 text")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", choices=METHODS, help="measure one method again, and keep the others' figures")
    given = parser.parse_args()
    name, path = given.new.split("=", 1)
    result: dict[str, Any] = {
        "date": date.today().isoformat(), "device": f"cpu, {platform.machine()}, 1 thread", "new": name,
        "steps": given.steps, "rows_per_step": 10, **SIZES, "methods": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        sources = write_sources(Path(folder), name, Path(path))
        if given.only:
            result = json.loads(RESULT.read_text())
        for title, method in METHODS.items():
            if given.only not in (None, title):
                continue
            result["methods"][title] = run(title, method, given.base, sources, Path(folder), given.steps)
            RESULT.write_text(json.dumps(result, indent=2) + "\n")
            print(title, json.dumps(result["methods"][title]["domains"]), flush=True)


if __name__ == "__main__":
    main()
