"""What does each way of balancing do to the load of every layer, and what does it cost in bits per byte?

    python benchmarks/balancing.py             # 20 minutes of one CPU core
    python benchmarks/balancing.py --report    # the plot and the table, from what was measured

Part 1, from scratch: the quickstart's base architecture, text, seed and optimizer, 250 steps of 5 micro-batches of 2
rows, without balancing, with transformers' loss, and with `BalancingConfig`. Transformers' loss
(`load_balancing_loss_func`) pools the layers and its balanced value is the number of experts per token: it is divided
by that, and by the micro-batches, which its own path through the Trainer does not do. All losses have the same weight.

Part 2, collapse: 4 layers of 8 experts, of which layer l sends every token to experts 2l and 2l + 1: a constant in the
embedding, and router rows that answer to it. 150 steps.

Loads and bits per byte are those of held-out text of the four domains trained on. One run and one seed each. Every
training is written when it ends, and the same command continues after an interruption.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from hf_moe.recipes.quickstart import (
    Quickstart,
    held_out_rows,
    load_tokenizer,
    make_tokenizer,
    model_config,
    training_rows,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, ProgressCallback, TrainingArguments, set_seed
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_moe.data.corpus import embedded_corpus
from hf_moe.data.packing import PackedRows, mix
from hf_moe.evaluation.bits_per_byte import bits_per_byte
from hf_moe.finetuning.surroundings import one_thread, quiet
from hf_moe.io.whole_files import write_json
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.layers.watch_routing import watch_routing
from hf_moe.models.losses import load_balancing_loss
from hf_moe.models.routing import RoutingDecision
from hf_moe.observability.layer_statistics import LayerStatistics, empty_statistics
from hf_moe.training.balancing.mixin import BalancingConfig
from hf_moe.training.trainer import MoeTrainer

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "balancing.json"
PLOT = ROOT / "benchmarks" / "results" / "plots" / "balancing.png"
MICRO_BATCHES = 5
COEFFICIENT = 0.01
POOLED = "transformers' loss, layers pooled"
NONE = "no balancing"


@dataclass(frozen=True)
class Part:
    """Trainings from one initial model."""

    recipe: Quickstart
    steps: int
    collapsed: bool
    ways: dict[str, BalancingConfig | None]


def ways(bias_update_rate: float) -> dict[str, BalancingConfig | None]:
    return {
        NONE: None,
        POOLED: None,
        "loss per layer": BalancingConfig(aux_loss_coef=COEFFICIENT, aux_loss_scope="layer"),
        "loss over the global batch": BalancingConfig(aux_loss_coef=COEFFICIENT, aux_loss_scope="global_batch"),
        "bias update, no loss": BalancingConfig(bias_update_rate=bias_update_rate),
    }


PARTS = {
    "from_scratch": Part(Quickstart(held_out_bytes=25_000), 250, False, ways(0.001)),
    # the collapsed experts' probabilities are about 0.4 above the others': a larger rate for so few steps
    "collapse": Part(Quickstart(held_out_bytes=25_000, experts=8), 150, True, ways(0.01)),
}


class PooledTrainer(MoeTrainer):
    """With transformers' loss over the layers' pooled logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(
            model, {**inputs, "output_router_logits": True}, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if self.model.training:
            pooled = pooled_loss(outputs.router_logits, self.model.config)
            loss = loss + COEFFICIENT * pooled / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


def pooled_loss(router_logits: Sequence[Tensor], config: Any) -> Tensor:
    """Transformers' loss, divided by its balanced value."""
    top_k = config.num_experts_per_tok
    return load_balancing_loss_func(tuple(router_logits), config.num_experts, top_k) / top_k


def new_model(part: Part, tokenizer: Any) -> PreTrainedModel:
    set_seed(part.recipe.seed)
    config = model_config(part.recipe, tokenizer)
    config.router_aux_loss_coef = config.router_z_loss_coef = 0.0
    config.router_bias = True  # zeros, until a bias update moves them
    model = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm")
    if part.collapsed:
        collapse(model)
    return model


@torch.no_grad()
def collapse(model: PreTrainedModel) -> None:
    """Every hidden state gets a common direction, and each router answers to it with two experts of its own."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randint(0, 2, (model.config.hidden_size,), generator=generator).float() * 2 - 1
    model.get_input_embeddings().weight += 0.02 * direction
    for number, layer in enumerate(moe_layers(model)):
        layer.router.weight[2 * number : 2 * number + 2] += 0.04 * direction


def train(part: Part, way: str, model: PreTrainedModel, rows: Tensor, output: Path) -> list[dict[str, float]]:
    """The quickstart's training, cut into micro-batches; returns the log."""
    recipe = part.recipe
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=part.steps,
        per_device_train_batch_size=recipe.rows_per_step // MICRO_BATCHES,
        gradient_accumulation_steps=MICRO_BATCHES,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=1 + part.steps // 20,
        weight_decay=0.05,
        adam_beta2=0.95,
        logging_steps=5,
        save_strategy="no",
        train_sampling_strategy="sequential",
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=recipe.seed,
        report_to="none",
    )
    trainer_class = PooledTrainer if way == POOLED else MoeTrainer
    trainer = trainer_class(model=model, args=arguments, train_dataset=PackedRows(rows), balancing=part.ways[way])
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    names = ("step", "loss", "moe/max_violation", "moe/aux_loss", "moe/bias_range")
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return [{name: round(log[name], 5) for name in names if name in log} for log in logs]


@torch.no_grad()
def measure_load(model: PreTrainedModel, rows: Tensor) -> dict[str, Any]:
    """Load of each layer, and what the two losses read."""
    model.eval()
    events = []
    with watch_routing(model, events.append):
        model(input_ids=rows.long(), use_cache=False)
    statistics = [load_of(event) for event in events]
    decisions = [RoutingDecision(event.logits, event.logits.softmax(-1), event.index) for event in events]
    return {
        "load": [[round(share, 5) for share in layer.load.tolist()] for layer in statistics],
        "load_cv": [round(layer.load_cv, 4) for layer in statistics],
        "max_violation": [round(layer.max_violation, 4) for layer in statistics],
        "dead_experts": [len(layer.dead_experts) for layer in statistics],
        "pooled_loss": round(float(pooled_loss([event.logits for event in events], model.config)), 4),
        "loss_per_layer": round(fmean(float(load_balancing_loss(d, d.scores.shape[-1])) for d in decisions), 4),
    }


def load_of(event: Any) -> LayerStatistics:
    layer = event.layer
    counts = torch.bincount(event.index.flatten(), minlength=layer.num_experts)[: layer.num_experts]
    empty = empty_statistics(layer.plain_name, layer.num_experts, layer.top_k)
    return replace(empty, tokens=len(event.index), counts=counts)


def measure_part(name: str, part: Part, results: dict[str, Any], chosen: Sequence[str]) -> None:
    recipe = part.recipe
    with tempfile.TemporaryDirectory() as folder:
        recipe = replace(recipe, output=Path(folder))
        domains = embedded_corpus(train_bytes=recipe.train_bytes, held_out_bytes=recipe.held_out_bytes)
        make_tokenizer(recipe, domains, recipe.default_domain)
        tokenizer = load_tokenizer(recipe)
        rows = {n: r for n, r in training_rows(recipe, tokenizer, domains).items() if n != recipe.default_domain}
        count = part.steps * recipe.rows_per_step
        mixture = mix(rows, {n: 1 / len(rows) for n in rows}, count=count, seed=recipe.seed)
        held_out = torch.cat([held_out_rows(recipe, tokenizer, domains[n]) for n in rows])
        found = results.setdefault(name, {"steps": part.steps, "before": {}, "ways": {}})
        found["before"] = measure_load(new_model(part, tokenizer), held_out)
        for way in chosen:
            if way in found["ways"]:
                continue
            model, start = new_model(part, tokenizer), time.process_time()
            log = train(part, way, model, mixture, Path(folder, "work"))
            seconds = time.process_time() - start
            window = recipe.row_length
            bits = {
                n: round(
                    bits_per_byte(model, tokenizer, domains[n].held_out, window=window, stride=window // 2).value, 4
                )
                for n in rows
            }
            after = measure_load(model, held_out)
            config = part.ways[way]
            found["ways"][way] = {
                "balancing": None if config is None else asdict(config),
                "bits_per_byte": bits,
                "after": after,
                "seconds": round(seconds, 1),
                "log": log,
            }
            write_json(RESULT, results)
            print(f"{name}, {way}: {fmean(bits.values()):.3f} bits per byte, max violation {after['max_violation']}")


def description() -> dict[str, Any]:
    libraries = ("hf-moe", "torch", "transformers", "tokenizers")
    return {
        "date": date.today().isoformat(),
        "seed": Quickstart().seed,
        "coefficient": COEFFICIENT,
        "rows_per_step": Quickstart().rows_per_step,
        "micro_batches": MICRO_BATCHES,
        "machine": {"architecture": platform.machine(), "torch_threads": 1, "device": "cpu"},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in libraries},
    }


def table(results: dict[str, Any]) -> str:
    """Markdown, for the README."""
    lines = [
        "| | load CV by layer | max violation by layer | bits per byte | s per step |",
        "|---|---|---|---|---|",
    ]
    part = results["from_scratch"]
    for way, found in part["ways"].items():
        after, bits = found["after"], fmean(found["bits_per_byte"].values())
        lines.append(
            f"| {way} | {joined(after['load_cv'])} | {joined(after['max_violation'])} | {bits:.3f} | "
            f"{found['seconds'] / part['steps']:.2f} |"
        )
    part = results["collapse"]
    lines += [
        "",
        "| collapse | transformers' reading | per-layer reading | max violation by layer | bits per byte |",
        "|---|---|---|---|---|",
    ]
    rows = {"before": (part["before"], None)}
    rows |= {way: (found["after"], fmean(found["bits_per_byte"].values())) for way, found in part["ways"].items()}
    for way, (load, value) in rows.items():
        lines.append(
            f"| {way} | {load['pooled_loss']:.2f} | {load['loss_per_layer']:.2f} | {joined(load['max_violation'])} | "
            f"{'' if value is None else f'{value:.3f}'} |"
        )
    return "\n".join(lines)


def joined(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


COLOURS = {
    NONE: "#9a9a9a",
    POOLED: "#e07b28",
    "loss per layer": "#2f6db5",
    "loss over the global batch": "#5a9e6f",
    "bias update, no loss": "#8a5aa8",
}


def plot(results: dict[str, Any], path: Path) -> None:
    """Above: the worst layer's load while training, in both parts. Below: the collapsed loads before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(1.35, 1))
    titles = {
        "from_scratch": "Training from scratch (16 experts)",
        "collapse": "Layers that begin collapsed (8 experts)",
    }
    axes = above.subplots(1, 2)
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for way, found in results[name]["ways"].items():
            steps = [log["step"] for log in found["log"]]
            axis.plot(
                steps, [1 + log["moe/max_violation"] for log in found["log"]], color=COLOURS[way], label=way, lw=1.6
            )
        axis.set_title(title, fontsize=10, fontweight="bold")
        axis.set(xlabel="optimizer step", ylabel="busiest expert / mean load, worst layer", ylim=(1, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    lines, labels = axes[0].get_legend_handles_labels()
    above.legend(lines, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    loads = {"before": results["collapse"]["before"]}
    loads |= {way: found["after"] for way, found in results["collapse"]["ways"].items()}
    below.suptitle(
        f"Share of the load on held-out text, before and after {results['collapse']['steps']} steps",
        fontsize=10,
        fontweight="bold",
    )
    grids = below.subplots(1, len(loads), sharey=True)
    for axis, (way, load) in zip(grids, loads.items(), strict=True):
        relative = [[share * len(layer) for share in layer] for layer in load["load"]]
        image = axis.imshow(relative, cmap="Blues", vmin=0, vmax=4, aspect="auto")
        axis.set_title(way, fontsize=9)
        reading = f"transformers' loss reads {load['pooled_loss']:.2f}\nper layer {load['loss_per_layer']:.2f}"
        axis.set_xlabel(f"expert\n{reading}", fontsize=8)
        axis.set_xticks(range(8), range(8), fontsize=7)
        axis.set_yticks(range(4), range(4), fontsize=7)
    grids[0].set_ylabel("layer", fontsize=8)
    bar = below.colorbar(image, ax=grids, shrink=0.9)
    bar.set_label("load / mean load", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="write the plot and print the tables, measure nothing")
    options = parser.parse_args()
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if not options.report:
        results |= description()
        with one_thread(), quiet():
            for name, part in PARTS.items():
                measure_part(name, part, results, list(part.ways))
    plot(results, PLOT)
    print(table(results))


if __name__ == "__main__":
    main()
