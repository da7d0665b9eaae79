"""Adapter experts: train a few small new experts beside the frozen experts of a Mixture-of-Experts.

    hf-moe finetune adapter-experts quickstart/adapter_experts.yaml                  # after hf-moe quickstart
    hf-moe finetune adapter-experts quickstart/adapter_experts.yaml --data my_texts.jsonl --max_steps 100
    torchrun --nproc_per_node 2 recipes/finetune_adapter_experts.py --config quickstart/adapter_experts.yaml

It works on every Mixture-of-Experts of transformers and on hf_moe models. Every MoE layer gets small experts and a
router for them. They start at zero, so that the output before training is the base's, bit for bit. Several such
adapters, one for each domain, can share a base. Loading one needs `import hf_moe`.

The output folder holds `adapter/`, `report.json`, `README.md` (the model card), `plots/`, `metrics.jsonl` and
checkpoints. `--resume_from_checkpoint auto` continues an interrupted run; `--smoke` takes four steps.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from peft import get_peft_model

from hf_moe.adapters.adapter_experts import AdapterExpertsConfig
from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.adapters.readable import refuse_unreadable
from hf_moe.finetuning.arguments import RECIPE
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


@dataclass
class AdapterExpertsArguments:
    """The adapter."""

    num_adapter_experts: int = field(default=2, metadata={"help": "New experts in each MoE layer."})
    adapter_width: int = field(default=64, metadata={"help": "Width of a new expert."})
    top_k: int = field(default=1, metadata={"help": "New experts that a token runs through."})

    def __post_init__(self) -> None:
        AdapterExpertsConfig(**asdict(self))  # raises before a model is loaded


@frees_folders
def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what `report.json` holds."""
    # 1. model and data: whatever cannot be used is refused here
    adapter, base, texts, training = parse_recipe((AdapterExpertsArguments, *RECIPE), arguments, __file__)
    job = prepare("Adapter experts", command_line(__file__, arguments), adapter, base, texts, training)
    # 2. measure every domain before
    before = measure(job, job.model)
    # 3. the router is frozen; new experts in every MoE layer
    freeze_router(job.model)
    model = get_peft_model(job.model, AdapterExpertsConfig(task_type="CAUSAL_LM", **asdict(adapter)))
    refuse_unreadable(model)
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
