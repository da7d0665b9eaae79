"""hf-moe evaluate: benchmark scores and bits per byte"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_moe.cli.common import (
    Adapter,
    Backend,
    ChatTemplate,
    Data,
    Device,
    Dtype,
    Model,
    OnBadRow,
    app,
    describe_error,
    fail,
    model_and_adapter,
    require,
)

Tasks = Annotated[
    str, typer.Option(help="Tasks of lm-eval, separated by commas: names, groups, patterns, YAML files.")
]
DataRoot = Annotated[
    Path | None, typer.Option(help="Local copies of the tasks' data, as OWNER/DATASET/CONFIG/SPLIT.jsonl.")
]
Limit = Annotated[
    float | None, typer.Option(help="Sample size: the first documents of each task; below 1 a share of them.")
]
Output = Annotated[Path, typer.Option(help="Folder for results.json and samples; a new, empty or interrupted one.")]
Fewshot = Annotated[int | None, typer.Option(help="Few-shot examples in place of each task's own.")]
Generation = Annotated[
    str, typer.Option(help="Options of generation tasks, such as max_gen_toks=64; separated by commas.")
]
ApplyChatTemplate = Annotated[bool, typer.Option("--apply-chat-template", help="Write the tasks' prompts as a chat.")]
BatchSize = Annotated[str, typer.Option(help="A number, or auto: the largest that fits.")]
Seed = Annotated[int, typer.Option(help="Of few-shot draws and of sampling.")]
MaskExperts = Annotated[
    int, typer.Option(help="Mask so many of each task's most used experts, one at a time: what is lost without each?")
]
MaskLimit = Annotated[int, typer.Option(help="Documents of each masked run.")]
UnsafeCode = Annotated[
    bool, typer.Option("--run-unsafe-code", help="Allow tasks that run code which the model writes.")
]


@app.command(rich_help_panel="Evaluate")
def evaluate(
    model: Model,
    adapter: Adapter = None,
    tasks: Tasks = "",
    data: Data = None,
    on_bad_row: OnBadRow = "error",
    chat_template: ChatTemplate = None,
    data_root: DataRoot = None,
    limit: Limit = None,
    output: Output = Path("evaluation-output"),
    num_fewshot: Fewshot = None,
    generation: Generation = "",
    apply_chat_template: ApplyChatTemplate = False,
    experts_implementation: Backend = None,
    batch_size: BatchSize = "auto",
    device: Device = None,
    dtype: Dtype = "auto",
    seed: Seed = 1234,
    mask_experts: MaskExperts = 0,
    mask_limit: MaskLimit = 50,
    run_unsafe_code: UnsafeCode = False,
) -> None:
    """Score a model on standard benchmarks (--tasks) and on your text by domain (--data).

    `hf-moe compare-results` compares the scores of two such runs, document by document. For the routing and the
    weights of two models: `hf-moe compare`. The digits of plain lm-eval: --experts-implementation grouped_mm.
    """
    require("eval", "lm_eval")
    require("recipes", "peft", "datasets")
    model, adapter = model_and_adapter(model, adapter)
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    options = {"experts_implementation": experts_implementation, "device": device, "dtype": dtype}
    sampling = {"limit": limit, "num_fewshot": num_fewshot, "seed": seed, "generation": _options(generation)}
    masking = {"mask_experts": mask_experts, "mask_limit": mask_limit}
    how = {
        "chat_template": apply_chat_template,
        "template_file": chat_template,
        "batch_size": batch_size,
        "run_unsafe_code": run_unsafe_code,
    }
    what = {
        "model": model,
        "adapter": adapter,
        "tasks": names,
        "data": tuple(data or ()),
        "on_bad_row": on_bad_row,
    }
    _run({**what, "data_root": data_root, **sampling, **masking, **how, "options": options}, output)


def _run(chosen: dict[str, Any], output: Path) -> None:
    from hf_moe.evaluation.plan import Evaluation
    from hf_moe.evaluation.runner import evaluate
    from hf_moe.evaluation.tables import print_results

    try:
        print_results(evaluate(Evaluation(**chosen), output, command=_command()))
    except (OSError, ValueError) as error:
        fail(describe_error(error, chosen.get("model"), chosen.get("adapter")))
    except KeyboardInterrupt:
        fail("interrupted. Give the same command again to continue.", code=130)
    typer.echo(f"{output / 'results.json'}")


def _options(text: str) -> dict[str, Any]:
    """`a=1,b=x` with YAML's types."""
    import yaml

    found = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            fail(f"--generation must be NAME=VALUE pairs separated by commas, got {part!r}.")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            fail(f"--generation must be NAME=VALUE pairs separated by commas; {value!r} is no value.")
    return found


def _command() -> str:
    """Command line for the record, without folders of this machine."""
    from hf_moe.io.names import without_folders

    def shortened(argument: str) -> str:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        return f"{option}{equals}{','.join(map(without_folders, value.split(',')))}"

    return " ".join(["hf-moe", *map(shortened, sys.argv[1:])])
