"""hf-moe evaluate: benchmark scores and bits per byte"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_moe.cli.common import OnBadRow, app, describe_error, fail, require

Model = Annotated[str | None, typer.Argument(help="A model folder, or a name on the Hub.")]
Tasks = Annotated[
    str, typer.Option(help="Tasks of lm-eval, separated by commas: names, groups, patterns, YAML files.")
]
Domains = Annotated[
    list[str] | None,
    typer.Option(help="Text or conversations for bits per byte: what the recipes read, or 'embedded'. Repeatable."),
]
Adapter = Annotated[str | None, typer.Option(help="A PEFT adapter's folder or name.")]
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
ChatTemplate = Annotated[bool, typer.Option("--chat-template", help="Write prompts as a chat.")]
Backend = Annotated[str | None, typer.Option(help="Experts backend, such as hf_moe.")]
BatchSize = Annotated[str, typer.Option(help="A number, or auto: the largest that fits.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Of few-shot draws and of sampling.")]
MaskExperts = Annotated[
    int, typer.Option(help="Mask so many of each task's most used experts, one at a time; 0 for none.")
]
MaskLimit = Annotated[int, typer.Option(help="Documents of each masked run.")]
UnsafeCode = Annotated[
    bool, typer.Option("--run-unsafe-code", help="Allow tasks that run code which the model writes.")
]
Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option(help="Compare the scores of two runs (results.json), second minus first; runs no model."),
]


@app.command()
def evaluate(
    model: Model = None,
    tasks: Tasks = "",
    domains: Domains = None,
    on_bad_row: OnBadRow = "error",
    adapter: Adapter = None,
    data_root: DataRoot = None,
    limit: Limit = None,
    output: Output = Path("evaluation-output"),
    num_fewshot: Fewshot = None,
    generation: Generation = "",
    chat_template: ChatTemplate = False,
    experts_implementation: Backend = None,
    batch_size: BatchSize = "auto",
    device: Device = None,
    dtype: Dtype = "auto",
    seed: Seed = 1234,
    mask_experts: MaskExperts = 2,
    mask_limit: MaskLimit = 50,
    run_unsafe_code: UnsafeCode = False,
    compare: Compare = None,
) -> None:
    """Score a model on standard benchmarks and on text by domain; find the experts that matter.

    --compare A B compares the scores of two such runs, document by document. For the routing and the weights of two
    models: `hf-moe compare`.
    """
    require("eval", "lm_eval")
    require("recipes", "peft", "datasets")
    if compare is not None:
        return _compare(*compare)
    if model is None:
        fail("name a model: hf-moe evaluate MODEL --tasks arc_easy. Or compare two results: --compare A.json B.json.")
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    options = {"experts_implementation": experts_implementation, "device": device, "dtype": dtype}
    sampling = {"limit": limit, "num_fewshot": num_fewshot, "seed": seed, "generation": _options(generation)}
    masking = {"mask_experts": mask_experts, "mask_limit": mask_limit}
    how = {"chat_template": chat_template, "batch_size": batch_size, "run_unsafe_code": run_unsafe_code}
    what = {
        "model": model,
        "adapter": adapter,
        "tasks": names,
        "domains": tuple(domains or ()),
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


def _compare(first: Path, second: Path) -> None:
    from hf_moe.evaluation.errors import EvaluationError
    from hf_moe.evaluation.paired import compare_results
    from hf_moe.evaluation.tables import print_comparison

    try:
        print_comparison(compare_results(first, second))
    except EvaluationError as error:
        fail(str(error))


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
