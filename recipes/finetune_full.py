"""Full fine-tuning: train every weight of a Mixture-of-Experts but its routers.

    hf-moe finetune full quickstart/full.yaml                  # after hf-moe quickstart
    hf-moe finetune full quickstart/full.yaml --data my_texts.jsonl --max_steps 100
    torchrun --nproc_per_node 2 recipes/finetune_full.py --config quickstart/full.yaml

It works on every Mixture-of-Experts of transformers and on hf_moe models. `--train_router` trains the routers as well;
the balancing losses of the model's config are then on. For real models use `--dtype float32 --bf16`: weights in
bfloat16 round small steps away, of which the recipe warns.

The output folder holds `model/` (an ordinary checkpoint), `report.json`, `README.md` (the model card), `plots/`,
`metrics.jsonl` and checkpoints. `--resume_from_checkpoint auto` continues an interrupted run; `--smoke` takes four
steps.
"""

from dataclasses import dataclass, field
from typing import Any

from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.finetuning.arguments import WEIGHT_RECIPE
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
class FullArguments:
    """What is trained."""

    train_router: bool = field(default=False, metadata={"help": "Train the routers as well."})


@frees_folders
def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what `report.json` holds."""
    # 1. model and data: whatever cannot be used is refused here
    full, base, texts, training = parse_recipe((FullArguments, *WEIGHT_RECIPE), arguments, __file__)
    job = prepare("Full fine-tuning", command_line(__file__, arguments), full, base, texts, training)
    # 2. measure every domain before
    before = measure(job, job.model)
    # 3. everything is trained but the router
    if not full.train_router:
        freeze_router(job.model)
    # 4. train with the ordinary Trainer, and measure again
    trained = train(job, job.model, [] if full.train_router else [RouterFreezeCallback()])
    after = measure(job, job.model)
    # 5. save, report, and write the model card
    if trained.is_main_process:
        save_model(job.model, job.tokenizer, job.folder / "model")
    result = report(job, before, trained, after, saved="model")
    if trained.is_main_process:
        write_results(job.folder, result, saved="model")
        print_domains(result["domains"], job.folder)
    return result


if __name__ == "__main__":
    with recipe_errors():
        main()
