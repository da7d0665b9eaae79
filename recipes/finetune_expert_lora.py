"""LoRA on the experts of a Mixture-of-Experts, through PEFT, with the router frozen and proved frozen.

    python recipes/finetune_expert_lora.py --model quickstart-output/model --data recipes/data/law.jsonl
    python recipes/finetune_expert_lora.py --config recipes/configs/quickstart/expert_lora.yaml --learning_rate 3e-4
    torchrun --nproc_per_node 2 recipes/finetune_expert_lora.py --config recipes/configs/quickstart/expert_lora.yaml

Works on any Mixture-of-Experts of transformers and on hf_moe models. Rows go through the low-rank factors; `W + BA` is
never built. To keep what the model knows, mix in data that it knows: a data set of its own with a weight (half of all
rows is a good start).

The output folder: `adapter/` (plain PEFT, loads without hf_moe), `report.json`, `README.md` (model card), `plots/`,
`metrics.jsonl` and checkpoints. `--resume_from_checkpoint auto` continues after an interruption. `--help` lists every
option, those of `TrainingArguments` among them; `--smoke` takes four steps.
"""

from dataclasses import asdict
from typing import Any

from peft import get_peft_model

from hf_moe.adapters.expert_lora import accelerate_adapters, expert_lora_config
from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.adapters.readable import refuse_unreadable
from hf_moe.finetuning.arguments import RECIPE, ExpertLoraArguments
from hf_moe.finetuning.card import write_results
from hf_moe.finetuning.command_line.parse import parse_recipe
from hf_moe.finetuning.measure import measure
from hf_moe.finetuning.prepare import prepare
from hf_moe.finetuning.report import print_domains, report
from hf_moe.finetuning.save import save_adapter
from hf_moe.finetuning.surroundings import recipe_errors
from hf_moe.finetuning.train import train
from hf_moe.io.names import command_line
from hf_moe.io.run_lock import frees_folders
from hf_moe.training.callbacks import RouterFreezeCallback


@frees_folders
def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what `report.json` holds."""
    # 1. model and data: whatever cannot be used is refused here
    adapter, base, texts, training = parse_recipe((ExpertLoraArguments, *RECIPE), arguments, __file__)
    job = prepare("Expert LoRA", command_line(__file__, arguments), adapter, base, texts, training)
    # 2. measure every domain before
    before = measure(job, job.model)
    # 3. the router is frozen; low-rank factors on every expert
    freeze_router(job.model)
    model = get_peft_model(job.model, expert_lora_config(job.model, **asdict(adapter)))
    refuse_unreadable(model)
    accelerate_adapters(model)
    # 4. train with the ordinary Trainer, and measure again
    trained = train(job, model, [RouterFreezeCallback()])
    after = measure(job, model)
    # 5. save, report, and write the model card
    if trained.is_main_process:
        save_adapter(model, job.folder / "adapter")
    result = report(job, before, trained, after, saved="adapter")
    if trained.is_main_process:
        write_results(job.folder, result, saved="adapter")
        print_domains(result["domains"], job.folder)
    return result


if __name__ == "__main__":
    with recipe_errors():
        main()
