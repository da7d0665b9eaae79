"""LoRA on the experts of a Mixture-of-Experts, through PEFT, with the router frozen and proved frozen.

    python recipes/finetune_expert_lora.py --model quickstart-output/model --datasets law.jsonl stories.txt
    python recipes/finetune_expert_lora.py --config recipes/configs/expert_lora.yaml --learning_rate 3e-4
    torchrun --nproc_per_node 2 recipes/finetune_expert_lora.py --config recipes/configs/expert_lora.yaml

Works on any Mixture-of-Experts of transformers and on hf_moe models. `--help` lists every option, those of
`TrainingArguments` among them; `--smoke` takes four steps. To keep what the model knows, mix in data it knows: a data
set of its own with a weight (0.5 is a good start).

The output folder: `adapter/` (plain PEFT, loads with `PeftModel.from_pretrained` without hf_moe), `report.json`,
`README.md` (model card), `metrics.jsonl`, checkpoints. `--resume_from_checkpoint auto` goes on after an interruption.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import get_peft_model

from hf_moe.adapters.expert_lora import accelerate_adapters, expert_lora_config
from hf_moe.adapters.frozen_router import freeze_router, router_hash, verify_adapter_without_router
from hf_moe.evaluation.fine_tuned import fine_tuning_report, measure, print_domains
from hf_moe.hub.finetune_card import write_results
from hf_moe.training.arguments import DataArguments, ModelArguments, RecipeTrainingArguments, parse_recipe
from hf_moe.training.callbacks import RouterFreezeCallback
from hf_moe.training.finetuning import (
    banner,
    check_packing,
    command_line,
    load,
    prepare_data,
    recipe_errors,
    refuse_used_folder,
    run,
    shown,
)


@dataclass
class ExpertLoraArguments:
    """The adapter."""

    r: int = field(default=16, metadata={"help": "Rank for each expert."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Twice the rank if not given."})
    attention: bool = field(default=False, metadata={"help": "Adapt the attention projections as well."})
    shared_experts: bool = field(default=False, metadata={"help": "Adapt the shared experts as well."})


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what `report.json` holds."""
    adapter, base, texts, training = parse_recipe(
        (ExpertLoraArguments, ModelArguments, DataArguments, RecipeTrainingArguments), arguments
    )
    refuse_used_folder(training)
    # 1. model and data; whatever cannot be used is refused here
    model, tokenizer = load(base)
    data = prepare_data(tokenizer, texts)
    if texts.packing:
        check_packing(model)
    sizes = {"row_length": texts.row_length, "batch_size": training.per_device_eval_batch_size}
    before = measure(model, tokenizer, data, **sizes)
    hash_before = router_hash(model)
    # 2. low-rank factors on every expert; rows go through them, `W + BA` is never built
    tuned = get_peft_model(model, expert_lora_config(model, **asdict(adapter)))
    accelerate_adapters(tuned)
    freeze_router(tuned)
    banner(tuned, data, training, "Expert LoRA")
    # 3. train, and measure again
    trainer = run(tuned, data, training, [RouterFreezeCallback()])
    after = measure(tuned, tokenizer, data, **sizes)
    # 4. save, and say what happened
    report = fine_tuning_report(
        "Expert LoRA", command_line(__file__, arguments), data, before, after, (hash_before, router_hash(tuned)),
        trainer, {**asdict(adapter), "model": shown(base.model), "row_length": texts.row_length},
    )  # fmt: skip
    if trainer.is_world_process_zero():
        folder = Path(training.output_dir)
        tuned.save_pretrained(folder / "adapter", save_embedding_layers=False)
        verify_adapter_without_router(folder / "adapter", tuned)
        write_results(folder, report, saved="adapter")
        print_domains(report["domains"])
    return report


if __name__ == "__main__":
    with recipe_errors():
        main()
