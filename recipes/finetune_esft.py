"""Train only the experts that a domain uses (ESFT), at full rank; router and all other experts stay bit for bit.

    python recipes/finetune_esft.py --model quickstart-output/model --datasets law.jsonl stories.txt
    python recipes/finetune_esft.py --config recipes/configs/esft.yaml --learning_rate 3e-4
    torchrun --nproc_per_node 2 recipes/finetune_esft.py --config recipes/configs/esft.yaml

Works on any Mixture-of-Experts of transformers and on hf_moe models. The first data set is the domain: its
tokens decide which experts are trained, per layer the smallest set that takes `budget` of the routing. Gradients and
optimizer state exist for these experts alone. Source: arXiv:2407.01906.

The output folder: `model/` (an ordinary checkpoint), `selection.json`, `report.json`, `README.md` (model card),
`plots/`, `metrics.jsonl` and checkpoints. `--resume_from_checkpoint auto` goes on after an interruption. `--help`
lists every option, those of `TrainingArguments` among them; `--smoke` takes four steps.
"""

from dataclasses import dataclass, field
from typing import Any

from hf_moe.adapters.esft import fold_selected_experts, train_selected_experts
from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.adapters.select_experts import select_experts
from hf_moe.finetuning.arguments import RECIPE, RecipeError, parse_recipe
from hf_moe.finetuning.card import write_results
from hf_moe.finetuning.prepare import recipe_errors, save_model
from hf_moe.finetuning.report import FineTuning, print_domains
from hf_moe.io.names import command_line
from hf_moe.io.run_lock import frees_folders
from hf_moe.training.callbacks import RouterFreezeCallback


@dataclass
class EsftArguments:
    """Which experts are trained."""

    method: str = field(default="gate", metadata={"help": "gate (mean routing weight) or frequency."})
    budget: float = field(default=0.2, metadata={"help": "Share of a layer's routing that its chosen experts take."})

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise RecipeError(f"budget must be a share above 0, up to 1, got {self.budget}.")


@frees_folders
def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what `report.json` holds."""
    # 1. model, data, figures before: whatever cannot be used is refused here
    esft, *others = parse_recipe((EsftArguments, *RECIPE), arguments, __file__)
    job = FineTuning("ESFT", command_line(__file__, arguments), esft, *others)
    # 2. the experts that the first data set uses
    domain = next(iter(job.data.rows))
    examples = [{"input_ids": example.input_ids} for example in job.data.encodings[domain].examples]
    selection = select_experts(job.model, examples, method=esft.method, budget=esft.budget)
    freeze_router(job.model)
    model = train_selected_experts(job.model, selection)
    # 3. train with the ordinary Trainer, and measure again
    job.train(model, [RouterFreezeCallback()])
    # 4. save, and say what happened
    if job.is_main_process:
        selection.save(job.folder / "selection.json")
        save_model(fold_selected_experts(model), job.tokenizer, job.folder / "model")
    report = job.report("model")
    if job.is_main_process:
        write_results(job.folder, report, saved="model")
        print_domains(report["domains"], job.folder)
    return report


if __name__ == "__main__":
    with recipe_errors():
        main()
