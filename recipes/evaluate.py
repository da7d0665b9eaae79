"""Is a fine-tuned model better than its base? Both on the same benchmarks, compared document by document.

    python recipes/evaluate.py --model quickstart-output/model --adapter quickstart-output/adapter \\
        --tasks arc_easy boolq --data embedded --data_root benchmarks-on-disk --limit 200

Needs `pip install -e ".[eval,recipes]"`. Without `--data_root` the benchmarks come from the Hub; with it from local
copies in the Hub's layout (`hf download --repo-type dataset allenai/ai2_arc --local-dir DIR/allenai/ai2_arc`).

The output folder: `base/` and `adapted/`, each with `results.json` and the samples behind it, and `comparison.json`:
for every metric the paired difference with its 95 % interval. Interrupted, the same command continues with the task
that was running. Scores are those of lm-evaluation-harness to the digit.

A model of a few million parameters answers multiple-choice questions at chance level: look at its bits per byte.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hf_moe.adapters.load_adapter import AdapterError
from hf_moe.evaluation.errors import EvaluationError
from hf_moe.evaluation.paired import compare_results
from hf_moe.evaluation.plan import Evaluation
from hf_moe.evaluation.runner import evaluate
from hf_moe.evaluation.tables import print_comparison, print_results
from hf_moe.finetuning.arguments import RecipeError
from hf_moe.finetuning.command_line.names import refusal
from hf_moe.finetuning.surroundings import recipe_errors
from hf_moe.io.names import command_line
from hf_moe.io.stages import RunRefusedError
from hf_moe.io.whole_files import write_json


@dataclass
class EvaluateArguments:
    """Which two, and on what."""

    model: str = field(metadata={"help": "The base: a folder, or a name on the Hub."})
    adapter: str | None = field(default=None, metadata={"help": "A PEFT adapter on it."})
    tuned: str | None = field(default=None, metadata={"help": "Or a whole other model, in place of an adapter."})
    tasks: list[str] = field(default_factory=list, metadata={"help": "Tasks of lm-eval."})
    data: list[str] = field(
        default_factory=list, metadata={"help": "Text or conversations: files, folders, names on the Hub, 'embedded'."}
    )
    data_root: Path | None = field(default=None, metadata={"help": "Local copies of the tasks' data."})
    limit: int | None = field(default=None, metadata={"help": "Documents of each task."})
    max_gen_toks: int | None = field(default=None, metadata={"help": "New tokens of generation tasks."})
    output: Path = field(default=Path("evaluation-output"), metadata={"help": "Folder for the results."})


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns what `comparison.json` holds."""
    parser = HfArgumentParser(EvaluateArguments, allow_abbrev=False)
    chosen, surplus = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if surplus:
        raise EvaluationError(refusal(surplus[0]) or f"unknown option {surplus[0]!r}. --help lists the options.")
    if (chosen.adapter is None) == (chosen.tuned is None):
        raise EvaluationError("give one of --adapter and --tuned: what the base is compared with.")
    command = command_line(__file__, arguments)
    settings = {
        "tasks": tuple(chosen.tasks),
        "data": tuple(chosen.data),
        "data_root": chosen.data_root,
        "limit": chosen.limit,
        "generation": {} if chosen.max_gen_toks is None else {"max_gen_toks": chosen.max_gen_toks},
    }
    base = Evaluation(chosen.model, **settings)
    adapted = Evaluation(chosen.tuned or chosen.model, adapter=chosen.adapter, **settings)
    # 1. the base
    print_results(evaluate(base, chosen.output / "base", command=command))
    # 2. the same tasks and documents after fine-tuning
    print_results(evaluate(adapted, chosen.output / "adapted", command=command))
    # 3. is the difference real?
    comparison = compare_results(chosen.output / "base", chosen.output / "adapted")
    write_json(chosen.output / "comparison.json", comparison)
    print_comparison(comparison)
    return comparison


if __name__ == "__main__":
    with recipe_errors():
        try:
            main()
        except (AdapterError, EvaluationError, RunRefusedError) as error:
            raise RecipeError(str(error)) from error
