"""hf-moe evaluate"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_moe.cli.common import app, fail, require


@app.command()
def evaluate(
    model: Annotated[str | None, typer.Argument(help="A model folder, or a name on the Hub.")] = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-eval, separated by commas: names, groups, patterns, YAML files.")
    ] = "",
    domains: Annotated[
        list[str] | None,
        typer.Option(help="Text for bits per byte: a .txt, .md or .jsonl file, or 'embedded'. Repeatable."),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter's folder or name.")] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Local copies of the tasks' data, as OWNER/DATASET/CONFIG/SPLIT.jsonl.")
    ] = None,
    limit: Annotated[float | None, typer.Option(help="Documents of each task; below 1 a share of them.")] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for results.json and samples; a new, empty or interrupted one.")
    ] = Path("evaluation-output"),
    num_fewshot: Annotated[int | None, typer.Option(help="Few-shot examples in place of each task's own.")] = None,
    generation: Annotated[
        str, typer.Option(help="Options of generation tasks, such as max_gen_toks=64; separated by commas.")
    ] = "",
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Write prompts as a chat.")] = False,
    experts_implementation: Annotated[str | None, typer.Option(help="Experts backend, such as hf_moe.")] = None,
    batch_size: Annotated[str, typer.Option(help="A number, or auto: the largest that fits.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of few-shot draws and of sampling.")] = 1234,
    mask_experts: Annotated[
        int, typer.Option(help="Mask so many of each task's most used experts, one at a time; 0 for none.")
    ] = 2,
    mask_limit: Annotated[int, typer.Option(help="Documents of each masked run.")] = 50,
    run_unsafe_code: Annotated[
        bool, typer.Option("--run-unsafe-code", help="Allow tasks that run code which the model writes.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Compare two results.json, second minus first; runs nothing.")
    ] = None,
) -> None:
    """Score a model on standard benchmarks and on text by domain; say which experts matter; compare two runs."""
    require("eval", "lm_eval")
    require("recipes", "peft", "datasets")
    if compare is not None:
        _compare(*compare)
        return
    if model is None:
        fail("name a model: hf-moe evaluate MODEL --tasks arc_easy. Or compare two results: --compare A.json B.json.")
    chosen = {
        "model": model,
        "tasks": tuple(name.strip() for name in tasks.split(",") if name.strip()),
        "domains": tuple(domains or ()),
        "adapter": adapter,
        "data_root": data_root,
        "limit": int(limit) if limit is not None and limit >= 1 else limit,
        "num_fewshot": num_fewshot,
        "chat_template": chat_template,
        "batch_size": batch_size,
        "seed": seed,
        "mask_experts": mask_experts,
        "mask_limit": mask_limit,
        "run_unsafe_code": run_unsafe_code,
        "options": {"experts_implementation": experts_implementation, "device": device, "dtype": dtype},
    }
    _run(chosen, generation, output)


def _run(chosen: dict[str, Any], generation: str, output: Path) -> None:
    from hf_moe.evaluation.runner import Evaluation, evaluate
    from hf_moe.evaluation.tables import print_results
    from hf_moe.training.corpus import TextError
    from hf_moe.training.sources import DataError
    from hf_moe.training.stages import RunRefusedError

    try:
        evaluation = Evaluation(**chosen, generation=_options(generation))
        print_results(evaluate(evaluation, output, command=_command()))
    except (DataError, OSError, RunRefusedError, TextError, ValueError) as error:
        fail(str(error))
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
        found[name.strip()] = yaml.safe_load(value)
    return found


def _command() -> str:
    """How the command was called, without folders of this machine."""
    from hf_moe.training.finetuning import shown

    def without_folders(argument: str) -> str:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        return f"{option}{equals}{','.join(map(shown, value.split(',')))}"

    return " ".join(["hf-moe", *map(without_folders, sys.argv[1:])])
