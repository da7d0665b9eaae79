"""A few small new experts beside the experts of a Mixture-of-Experts, all of the base frozen.

    python recipes/finetune_adapter_experts.py --model quickstart-output/model --datasets law.jsonl stories.txt
    python recipes/finetune_adapter_experts.py --config recipes/configs/adapter_experts.yaml --learning_rate 3e-4
    torchrun --nproc_per_node 2 recipes/finetune_adapter_experts.py --config recipes/configs/adapter_experts.yaml

Works on any Mixture-of-Experts of transformers and on hf_moe models. Every MoE layer gains small routed experts
with a gate of their own, which start as zero: before training the output is the base's, bit for bit. The base's router
and experts stay as they are, and several such adapters (a domain each) share one base.

The output folder: `adapter/` (loads after `import hf_moe`), `report.json`, `README.md` (model card), `plots/`,
`metrics.jsonl` and checkpoints. `--resume_from_checkpoint auto` goes on after an interruption. `--help` lists every
option, those of `TrainingArguments` among them; `--smoke` takes four steps.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from peft import get_peft_model

from hf_moe.adapters.adapter_experts import AdapterExpertsConfig
from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.adapters.readable import refuse_unreadable
from hf_moe.finetuning.arguments import RECIPE, parse_recipe
from hf_moe.finetuning.card import write_results
from hf_moe.finetuning.prepare import recipe_errors, save_adapter
from hf_moe.finetuning.report import FineTuning, print_domains
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
    # 1. model, data, figures before: whatever cannot be used is refused here
    adapter, *others = parse_recipe((AdapterExpertsArguments, *RECIPE), arguments, __file__)
    job = FineTuning("Adapter experts", command_line(__file__, arguments), adapter, *others)
    # 2. new experts in every MoE layer; everything else is frozen
    model = get_peft_model(job.model, AdapterExpertsConfig(task_type="CAUSAL_LM", **asdict(adapter)))
    refuse_unreadable(model)
    freeze_router(model)
    # 3. train with the ordinary Trainer, and measure again
    job.train(model, [RouterFreezeCallback()])
    # 4. save, and say what happened
    if job.is_main_process:
        save_adapter(model, job.folder / "adapter")
    report = job.report("adapter")
    if job.is_main_process:
        write_results(job.folder, report, saved="adapter")
        print_domains(report["domains"], job.folder)
    return report


if __name__ == "__main__":
    with recipe_errors():
        main()
