"""ESFT (expert-specialised fine-tuning): train only the experts that your texts use; all else stays bit for bit.

    hf-moe finetune esft quickstart/esft.yaml                  # after hf-moe quickstart
    hf-moe finetune esft quickstart/esft.yaml --data my_texts.jsonl --max_steps 100
    torchrun --nproc_per_node 2 recipes/finetune_esft.py --config quickstart/esft.yaml

It works on every Mixture-of-Experts of transformers and on hf_moe models. The first data set chooses the experts: in
each layer the smallest set that takes `budget` of its routing. Gradients and optimizer state exist for these alone.
Source: Wang et al. 2024 (arXiv:2407.01906).

The output folder holds `model/` (an ordinary checkpoint), `selection.json`, `report.json`, `README.md` (the model
card), `plots/`, `metrics.jsonl` and checkpoints. `--resume_from_checkpoint auto` continues an interrupted run;
`--smoke` takes four steps.
"""

from dataclasses import dataclass, field
from typing import Any

from hf_moe.adapters.esft import fold_selected_experts, train_selected_experts
from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.adapters.select_experts import select_experts
from hf_moe.finetuning.arguments import WEIGHT_RECIPE, RecipeError
from hf_moe.finetuning.card import write_results
from hf_moe.finetuning.command_line.parse import parse_recipe
from hf_moe.finetuning.measure import measure
from hf_moe.finetuning.prepare import prepare
from hf_moe.finetuning.report import print_domains, report
from hf_moe.finetuning.save import save_model
from hf_moe.finetuning.surroundings import recipe_errors
from hf_moe.finetuning.train import train
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
    # 1. model and data: whatever cannot be used is refused here
    esft, base, texts, training = parse_recipe((EsftArguments, *WEIGHT_RECIPE), arguments, __file__)
    job = prepare("ESFT", command_line(__file__, arguments), esft, base, texts, training)
    # 2. measure every domain before
    before = measure(job, job.model)
    # 3. the router is frozen; of the experts those are trained that the first data set uses
    freeze_router(job.model)
    domain = next(iter(job.data.domains.values()))
    examples = [{"input_ids": example.input_ids} for example in domain.train.examples]
    selection = select_experts(job.model, examples, method=esft.method, budget=esft.budget)
    model = train_selected_experts(job.model, selection)
    # 4. train with the ordinary Trainer, and measure again
    trained = train(job, model, [RouterFreezeCallback()])
    after = measure(job, model)
    # 5. save, report, and write the model card
    if trained.is_main_process:
        selection.save(job.folder / "selection.json")
        save_model(fold_selected_experts(model), job.tokenizer, job.folder / "model")
    result = report(job, before, trained, after, saved="model")
    if trained.is_main_process:
        write_results(job.folder, result, saved="model")
        print_domains(result["domains"], job.folder)
    return result


if __name__ == "__main__":
    with recipe_errors():
        main()
