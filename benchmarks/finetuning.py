"""How much each way of fine-tuning learns and forgets: the recipes at equal steps on one base, domain by domain.

    python benchmarks/finetuning.py --base quickstart-output/model --texts FOLDER
    python benchmarks/finetuning.py --base quickstart-output/model --texts FOLDER --domain french --method ESFT
    python benchmarks/finetuning.py --report

The base is the quickstart's; the old domains are those that it was trained on (text that every Python carries), the
new ones public texts that it has not seen: `finetuning_texts.py` says which files FOLDER holds. One run and one seed
for each domain and method. Seconds are the process's CPU time on one thread: about 50 for a run, 50 minutes for all.
Every run is written when it ends, and the same command continues after an interruption. `--learning-rates` tries other
rates than those of `METHODS`, which are the recipes' own. `--report` writes the plot and the page of tables.
"""

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from finetuning_report import write_report
from finetuning_texts import NEW, old_domains, split_new, write_data_set
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from hf_moe.adapters.adapter_experts import AdapterExpertsConfig
from hf_moe.adapters.esft import fold_selected_experts, train_selected_experts
from hf_moe.adapters.expert_lora import accelerate_adapters, expert_lora_config
from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.adapters.select_experts import select_experts
from hf_moe.data.corpus import byte_count
from hf_moe.finetuning.arguments import DataArguments, ModelArguments, RecipeTrainingArguments
from hf_moe.finetuning.card import write_results
from hf_moe.finetuning.domains import Data
from hf_moe.finetuning.measure import measure
from hf_moe.finetuning.prepare import Job, prepare
from hf_moe.finetuning.report import report
from hf_moe.finetuning.save import save_adapter, save_model
from hf_moe.finetuning.surroundings import versions
from hf_moe.finetuning.train import train
from hf_moe.io.whole_files import write_json
from hf_moe.training.callbacks import RouterFreezeCallback

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "finetuning.json"
PLOT = RESULT.parent / "plots" / "finetuning.png"
PAGE = ROOT / "model_cards" / "finetuning" / "README.md"
KEPT_CARDS = (("french", "adapter experts, replay"), ("law", "expert LoRA, replay"), ("maths", "ESFT"))
SIZES = {"row_length": 256, "held_out": 0.5, "held_out_records": 24}
SEED = 0


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning: what it makes of the base, its learning rate, and the share of rows from old domains."""

    attach: Callable[[Job[Data]], Any]
    learning_rate: float
    replay: float = 0.0


@dataclass(frozen=True)
class Chosen:
    """What a card says of a run."""

    learning_rate: float
    replay: float


def attention_lora(job: Job[Data]) -> Any:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(job.model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))


def expert_lora(job: Job[Data]) -> Any:
    model = get_peft_model(job.model, expert_lora_config(job.model, r=8))
    accelerate_adapters(model)
    return model


def adapter_experts(job: Job[Data]) -> Any:
    return get_peft_model(job.model, AdapterExpertsConfig())


def esft(job: Job[Data]) -> Any:
    examples = next(iter(job.data.domains.values())).train.examples
    selection = select_experts(job.model, [{"input_ids": e.input_ids} for e in examples], budget=0.6)
    return train_selected_experts(job.model, selection)


def full(job: Job[Data]) -> Any:
    return job.model


METHODS = {
    "attention LoRA": Method(attention_lora, 3e-3),
    "expert LoRA": Method(expert_lora, 3e-3),
    "expert LoRA, replay": Method(expert_lora, 3e-3, replay=0.5),
    "adapter experts": Method(adapter_experts, 3e-3),
    "adapter experts, replay": Method(adapter_experts, 3e-3, replay=0.5),
    "ESFT": Method(esft, 1e-3),
    "full": Method(full, 1e-3),
    "full, replay": Method(full, 1e-3, replay=0.5),
}


class CpuSeconds(TrainerCallback):
    """CPU seconds of the training itself: they do not grow with what else the machine does."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin = time.process_time()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = time.process_time() - self.begin


def training_arguments(folder: Path, learning_rate: float, steps: int) -> RecipeTrainingArguments:
    return RecipeTrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=10, learning_rate=learning_rate,
        warmup_steps=steps // 20, logging_steps=max(1, steps // 20), save_strategy="no", save_steps=steps,
        seed=SEED, use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip


def run(
    options: argparse.Namespace, domain: str, name: str, learning_rate: float, sources: dict[str, str], folder: Path
) -> dict[str, Any]:
    """Train and measure once. `sources`: files by domain, the new one first."""
    method = METHODS[name]
    shares = {source: method.replay / (len(sources) - 1) for source in sources} | {domain: 1 - method.replay}
    weighted = [{"path": path, "domain": source, "weight": shares[source]} for source, path in sources.items()]
    training = training_arguments(folder, learning_rate, options.steps)
    command = f"python benchmarks/finetuning.py --base {Path(options.base).name} --domain {domain} --method '{name}'"
    chosen = Chosen(learning_rate, method.replay)
    job = prepare(name, command, chosen, ModelArguments(options.base), DataArguments(weighted, **SIZES), training)
    before = measure(job, job.model)
    freeze_router(job.model)
    model = method.attach(job)
    clock = CpuSeconds()
    trained = train(job, model, [RouterFreezeCallback(), clock])
    after = measure(job, model)
    saved = "adapter" if isinstance(model, PeftModel) else "model"
    if isinstance(model, PeftModel):
        save_adapter(model, folder / saved)
    else:
        save_model(fold_selected_experts(model) if method.attach is esft else model, job.tokenizer, folder / saved)
    result = report(job, before, trained, after, saved=saved)
    if (domain, name) in KEPT_CARDS and options.cards:
        write_results(folder, result, saved=saved)
        keep_card(folder, Path(options.cards) / f"{domain}-{name.replace(', ', '-').replace(' ', '-').lower()}")
    return metrics(result, chosen, clock.seconds / options.steps)


def metrics(report: dict[str, Any], chosen: Chosen, seconds: float) -> dict[str, Any]:
    domains = {
        domain: {key: each[key]["bits_per_byte"] for key in ("before", "after")}
        | {"routing_agreement": min(each["routing_agreement"])}
        for domain, each in report["domains"].items()
    }
    return {
        "date": report["date"], **asdict(chosen), "trained": report["parameters"]["trained"],
        "saved_bytes": report["saved_bytes"], "cpu_seconds_per_step": seconds, "domains": domains,
        "router_unchanged": report["router_sha256"]["before"] == report["router_sha256"]["after"],
    }  # fmt: skip


def keep_card(folder: Path, to: Path) -> None:
    """The card, its plots, and the report that it can be written from again; without weights."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder / "plots", to / "plots")
    for name in ("README.md", "report.json"):
        shutil.copy(folder / name, to)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all runs of one result share."""
    return {
        "steps": options.steps, "rows_per_step": 10, **SIZES, "seed": SEED,
        "device": f"cpu, {platform.machine()}, {torch.get_num_threads()} thread", "versions": versions(),
    }  # fmt: skip


def read_result(options: argparse.Namespace) -> dict[str, Any]:
    """The result so far.

    Raises:
        SystemExit: If its runs were made with other settings.
    """
    ours = settings(options)
    if not options.output.exists():
        return {"settings": ours, "texts": {}, "runs": {}}
    result = json.loads(options.output.read_text())
    differing = [key for key in ours if result["settings"].get(key) != ours[key]]
    if differing:
        raise SystemExit(
            f"{options.output.name} holds runs with another {', '.join(differing)}. Choose another --output, or "
            "remove the file to measure everything again."
        )
    return result


def texts(options: argparse.Namespace, result: dict[str, Any], folder: Path) -> dict[str, dict[str, str]]:
    """The data sets of each run's domain, as files in `folder`: the new one first, then the old ones."""
    old = {}
    for name, (kept, held_out) in old_domains().items():
        old[name] = write(folder / f"{name}.jsonl", kept, held_out, result)
    new = {name: folder / f"{name}.jsonl" for name in options.domain}
    return {name: {name: write(path, *split_new(options.texts, name), result)} | old for name, path in new.items()}


def write(path: Path, train: list[str], held_out: list[str], result: dict[str, Any]) -> str:
    write_data_set(path, train, held_out)
    result["texts"][path.stem] = {
        "train_bytes": sum(map(byte_count, train)),
        "held_out_bytes": sum(map(byte_count, held_out)),
    }
    return str(path)


def measure_all(options: argparse.Namespace) -> None:
    """Every run that is asked for and not there yet."""
    result = read_result(options)
    with tempfile.TemporaryDirectory() as temporary:
        sources = texts(options, result, Path(temporary))
        for domain in options.domain:
            runs = result["runs"].setdefault(domain, {})
            for name, rate in [(name, rate) for name in options.method for rate in options.learning_rates or [None]]:
                key = f"{name} at {rate or METHODS[name].learning_rate:g}"
                if key in runs:
                    continue
                folder = Path(temporary, f"{domain}-{key}")
                runs[key] = run(options, domain, name, rate or METHODS[name].learning_rate, sources[domain], folder)
                write_json(options.output, result)
                print(domain, key, json.dumps(runs[key]), flush=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="the quickstart's model folder")
    parser.add_argument("--texts", type=Path, help="the folder of public texts")
    parser.add_argument("--domain", nargs="+", choices=NEW, default=list(NEW))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rates", type=float, nargs="+", help="to try, instead of the method's own")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--cards", type=Path, help="keep the cards of a few runs in this folder")
    parser.add_argument("--report", action="store_true", help="tables and plot of what is there, no run")
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.report:
        rates = {name: method.learning_rate for name, method in METHODS.items()}
        write_report(json.loads(options.output.read_text()), rates, PLOT, PAGE)
    elif options.base is None or options.texts is None:
        raise SystemExit("--base and --texts are needed to run; --report shows what is there.")
    else:
        measure_all(options)


if __name__ == "__main__":
    main()
