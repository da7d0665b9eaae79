"""Expert LoRA: train low-rank factors on every expert of a Mixture-of-Experts. The base and its router stay frozen.

    hf-moe finetune expert-lora quickstart/expert_lora.yaml                  # after hf-moe quickstart
    hf-moe finetune expert-lora quickstart/expert_lora.yaml --data my_texts.jsonl --max_steps 100
    torchrun --nproc_per_node 2 recipes/finetune_expert_lora.py --config quickstart/expert_lora.yaml

It works on every Mixture-of-Experts of transformers and on hf_moe models. PEFT loads the adapter without hf_moe. The
recipe hashes the router before training, at every checkpoint and after it, and stops if one value has changed.

A model forgets what it no longer sees. Add a data set that it knows already, with half of the weight (replay).

The output folder holds `adapter/`, `report.json`, `README.md` (the model card), `plots/`, `metrics.jsonl` and
checkpoints. `--resume_from_checkpoint auto` continues an interrupted run; `--smoke` takes four steps.
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
        save_adapter(model, job.tokenizer, job.folder / "adapter")
    result = report(job, before, trained, after, saved="adapter")
    if trained.is_main_process:
        write_results(job.folder, result, saved="adapter")
        print_domains(result["domains"], job.folder)
    return result


if __name__ == "__main__":
    with recipe_errors():
        main()
