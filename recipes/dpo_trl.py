"""Learn from preferences with TRL's DPOTrainer: LoRA on the experts, the router frozen and proved frozen.

    pip install "hf-moe[recipes,trl]"
    python recipes/dpo_trl.py --model quickstart-output/model --datasets preferences.jsonl
    python recipes/dpo_trl.py --config recipes/configs/dpo_trl.yaml --beta 0.3

Records have `prompt`, `chosen` and `rejected`, as strings or as lists of messages, these with `tools` if they need
them. The reference is the base itself, with the adapter switched off: no second model in memory. With a frozen router,
policy and reference choose experts by the same rule, and the preference loss is all that is trained; a router that is
trained would get Mixtral's balancing loss from TRL, whatever its own is (`hf_moe/finetuning/trl.py` says more).

The output folder: `adapter/` (plain PEFT, loads without hf_moe), `report.json`, `metrics.jsonl` and checkpoints with
TRL's model card. `--resume_from_checkpoint auto` goes on after an interruption; `--smoke` takes four steps.
"""

from dataclasses import asdict
from typing import Any

from hf_moe.adapters.expert_lora import accelerate_adapters, expert_lora_config
from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.adapters.readable import refuse_unreadable
from hf_moe.finetuning.arguments import ExpertLoraArguments, ModelArguments, parse_recipe
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
        DpoArguments,
        SafeDPOTrainer,
        refuse_broken_trackio,
        train_and_save,
    )
    from hf_moe.finetuning.trl_data import TrlDataArguments, read_for_dpo

    # 1. choices, model, data: whatever cannot be used is refused here
    kinds = (ExpertLoraArguments, ModelArguments, TrlDataArguments, DpoArguments)
    adapter, base, texts, training = parse_recipe(kinds, arguments, __file__)
    refuse_broken_trackio()
    refuse_used_folder(training)
    known_config(base)
    tokenizer = load_tokenizer(base)
    train_data, held_out = read_for_dpo(texts, training, tokenizer, base.chat_options)
    model = load_model(base, training.device)  # TRL cannot build a model type that another package registers
    # 2. the router is frozen, and with it the auxiliary losses are off; every expert gets low-rank factors
    freeze_router(model)
    trainer = SafeDPOTrainer(
        model,
        args=training,
        train_dataset=train_data,
        eval_dataset=held_out,
        processing_class=tokenizer,
        # not a PeftModel: TRL would copy its adapter for the reference
        peft_config=expert_lora_config(model, **asdict(adapter)),
        callbacks=[MetricsFile(), RouterFreezeCallback()],
    )
    refuse_unreadable(trainer.model)
    accelerate_adapters(trainer.model)
    # 3. measure, train, measure again, save
    return train_and_save(trainer, "DPO with TRL", command_line(__file__, arguments), base, adapter)


if __name__ == "__main__":
    with recipe_errors():
        main()
