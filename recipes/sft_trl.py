"""Supervised fine-tuning with TRL's SFTTrainer: LoRA on the experts, the router frozen and proved frozen.

    pip install "hf-moe[recipes,trl]"
    python recipes/sft_trl.py --model quickstart-output/model --datasets law.jsonl
    python recipes/sft_trl.py --config recipes/configs/sft_trl.yaml --learning_rate 3e-4

For who has TRL's tools around it already: data are read as in the other recipes (recipes/README.md), cut and packed by
TRL, and every field of SFTConfig is an option (`assistant_only_loss`, `completion_only_loss`, `packing`). What TRL
does to the loss of a Mixture-of-Experts, and what it drops where the router is trained, is written in
`hf_moe/finetuning/trl.py`; here the router is frozen, and nothing is dropped. `finetune_expert_lora.py` does the same
with the plain Trainer and measures more: bits per byte and routing agreement of every domain.

The output folder: `adapter/` (plain PEFT, loads without hf_moe), `report.json`, `metrics.jsonl` and checkpoints with
TRL's model card. `--resume_from_checkpoint auto` goes on after an interruption; `--smoke` takes four steps.
"""

from dataclasses import asdict
from typing import Any

from hf_moe.adapters.expert_lora import accelerate_adapters, expert_lora_config
from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.adapters.readable import refuse_unreadable
from hf_moe.finetuning.arguments import ExpertLoraArguments, ModelArguments, parse_recipe
from hf_moe.finetuning.packing_check import check_packing
from hf_moe.finetuning.prepare import (
    MetricsFile,
    known_config,
    load_model,
    load_tokenizer,
    recipe_errors,
    refuse_used_folder,
)
from hf_moe.io.names import command_line
from hf_moe.io.run_lock import frees_folders
from hf_moe.training.callbacks import RouterFreezeCallback


@frees_folders
def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what `report.json` holds."""
    from hf_moe.finetuning.trl import (  # first: it names the extra if TRL is missing
        SafeSFTTrainer,
        SftArguments,
        refuse_broken_trackio,
        train_and_save,
    )
    from hf_moe.finetuning.trl_data import TrlDataArguments, read_for_sft

    # 1. choices, model, data: whatever cannot be used is refused here
    kinds = (ExpertLoraArguments, ModelArguments, TrlDataArguments, SftArguments)
    adapter, base, texts, training = parse_recipe(kinds, arguments, __file__)
    refuse_broken_trackio()
    refuse_used_folder(training)
    known_config(base)
    tokenizer = load_tokenizer(base)
    train_data, held_out = read_for_sft(texts, training, tokenizer, base.chat_options)
    model = load_model(base, training.device)  # TRL cannot build a model type that another package registers
    if training.packing:
        # TRL flattens a batch of packed rows into one
        check_packing(model, (training.max_length or 0) * training.per_device_train_batch_size)
    # 2. the router is frozen, and with it the auxiliary losses are off; every expert gets low-rank factors
    freeze_router(model)
    trainer = SafeSFTTrainer(
        model,
        args=training,
        train_dataset=train_data,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=expert_lora_config(model, **asdict(adapter)),
        callbacks=[MetricsFile(), RouterFreezeCallback()],
    )
    refuse_unreadable(trainer.model)
    accelerate_adapters(trainer.model)
    # 3. measure, train, measure again, save
    return train_and_save(trainer, "SFT with TRL", command_line(__file__, arguments), base, adapter)


if __name__ == "__main__":
    with recipe_errors():
        main()
