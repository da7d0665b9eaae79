"""Fine-tune every weight of a Mixture-of-Experts but its routers.

    python recipes/finetune_full.py --model quickstart-output/model --datasets law.jsonl stories.txt
    python recipes/finetune_full.py --config recipes/configs/full.yaml --learning_rate 3e-4
    torchrun --nproc_per_node 2 recipes/finetune_full.py --config recipes/configs/full.yaml

Works on any Mixture-of-Experts of transformers and on hf_moe models. The router is frozen and proved frozen unless
`--train_router` asks for the opposite; its balancing losses are then on, as the model's config has them.

The output folder: `model/` (an ordinary checkpoint), `report.json`, `README.md` (model card), `plots/`,
`metrics.jsonl` and checkpoints. `--resume_from_checkpoint auto` goes on after an interruption. `--help` lists every
option, those of `TrainingArguments` among them; `--smoke` takes four steps.
"""

from dataclasses import dataclass, field
from typing import Any

from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.finetuning.arguments import RECIPE, parse_recipe
from hf_moe.finetuning.card import write_results
from hf_moe.finetuning.prepare import recipe_errors, save_model
from hf_moe.finetuning.report import FineTuning, print_domains
from hf_moe.io.names import command_line
from hf_moe.io.run_lock import frees_folders
from hf_moe.training.callbacks import RouterFreezeCallback


@dataclass
class FullArguments:
    """What is trained."""

    train_router: bool = field(default=False, metadata={"help": "Train the routers as well."})


@frees_folders
def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what `report.json` holds."""
    # 1. model, data, figures before: whatever cannot be used is refused here
    full, *others = parse_recipe((FullArguments, *RECIPE), arguments, __file__)
    job = FineTuning("Full fine-tuning", command_line(__file__, arguments), full, *others)
    # 2. everything is trained but the router
    if not full.train_router:
        freeze_router(job.model)
    # 3. train with the ordinary Trainer, and measure again
    job.train(job.model, [] if full.train_router else [RouterFreezeCallback()])
    # 4. save, and say what happened
    if job.is_main_process:
        save_model(job.model, job.tokenizer, job.folder / "model")
    report = job.report("model")
    if job.is_main_process:
        write_results(job.folder, report, saved="model")
        print_domains(report["domains"], job.folder)
    return report


if __name__ == "__main__":
    with recipe_errors():
        main()
