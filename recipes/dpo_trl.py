"""Learn from preferences with TRL's DPOTrainer: LoRA on the experts, the router frozen and checked by hash.

    pip install -e ".[recipes,trl]"
    hf-moe finetune dpo quickstart/dpo.yaml                  # after hf-moe quickstart

Records have `prompt`, `chosen` and `rejected`, as strings or as lists of messages, these with `tools` if they need
them. The reference is the base itself, with the adapter switched off: no second model in memory. With a frozen router,
policy and reference choose experts by the same rule, and the preference loss is all that is trained; a router that is
trained would get Mixtral's balancing loss from TRL, whatever its own is (`hf_moe/finetuning/trl.py` says more).

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
    from hf_moe.finetuning.trl_data import TrlDataArguments, read_for_dpo

    # 1. model and data: whatever cannot be used is refused here
    kinds = (ExpertLoraArguments, ModelArguments, TrlDataArguments, trl.DpoArguments)
    adapter, base, texts, training = parse_recipe(kinds, arguments, __file__)
    command = command_line(__file__, arguments)
    job = trl.prepare_for_trl("DPO with TRL", command, adapter, base, texts, training, read_for_dpo)
    # 2. the router is frozen, and with it the auxiliary losses are off; low-rank factors on every expert
    freeze_router(job.model)
    trainer = trl.expert_lora_trainer(trl.SafeDPOTrainer, job, adapter, [RouterFreezeCallback()])
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
