"""Supervised fine-tuning with TRL's SFTTrainer: LoRA on the experts, the router frozen and checked by hash.

    pip install -e ".[recipes,trl]"
    hf-moe finetune sft quickstart/sft.yaml                  # after hf-moe quickstart

If you already use TRL: data are read as in the other recipes (recipes/README.md), cut and packed by TRL, and every
field of SFTConfig is an option (`assistant_only_loss`, `completion_only_loss`, `packing`). What TRL does to the loss
of a Mixture-of-Experts, and what it drops where the router is trained, is written in `hf_moe/finetuning/trl.py`; here
the router is frozen, and nothing is dropped. `finetune_expert_lora.py` does the same with the plain Trainer.

The output folder: `adapter/` (plain PEFT, loads without hf_moe), `report.json`, `README.md` (model card), `plots/`,
`metrics.jsonl` and checkpoints. `--resume_from_checkpoint auto` continues after an interruption; `--smoke` takes four
steps.
"""

from typing import Any

from hf_moe.adapters.expert_lora import accelerate_adapters
from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.adapters.readable import refuse_unreadable
from hf_moe.finetuning.arguments import ExpertLoraArguments, ModelArguments
from hf_moe.finetuning.command_line.parse import parse_recipe
from hf_moe.finetuning.packing_check import check_packing
from hf_moe.finetuning.surroundings import recipe_errors
from hf_moe.finetuning.train import run_trainer
from hf_moe.io.names import command_line
from hf_moe.io.run_lock import frees_folders
from hf_moe.training.callbacks import RouterFreezeCallback


@frees_folders
def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what `report.json` holds."""
    # it names the extra if TRL is missing
    from hf_moe.finetuning import trl
    from hf_moe.finetuning.trl_data import TrlDataArguments, read_for_sft

    # 1. model and data: whatever cannot be used is refused here
    kinds = (ExpertLoraArguments, ModelArguments, TrlDataArguments, trl.SftArguments)
    adapter, base, texts, training = parse_recipe(kinds, arguments, __file__)
    command = command_line(__file__, arguments)
    job = trl.prepare_for_trl("SFT with TRL", command, adapter, base, texts, training, read_for_sft)
    if training.packing:
        # TRL flattens a batch of packed rows into one
        check_packing(job.model, (training.max_length or 0) * training.per_device_train_batch_size)
    # 2. the router is frozen, and with it the auxiliary losses are off; low-rank factors on every expert
    freeze_router(job.model)
    trainer = trl.expert_lora_trainer(trl.SafeSFTTrainer, job, adapter, [RouterFreezeCallback()])
    refuse_unreadable(trainer.model)
    accelerate_adapters(trainer.model)
    # 3. measure the held-out records, train, measure again
    before = trl.evaluate(job, trainer)
    trained = run_trainer(trainer)
    after = trl.evaluate(job, trainer)
    # 4. save and report
    return trl.save_and_report(job, before, trained, after)


if __name__ == "__main__":
    with recipe_errors():
        main()
