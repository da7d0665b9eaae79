"""hf-moe card: a model card from facts"""

from pathlib import Path
from typing import Annotated

import typer

from hf_moe.cli.common import app, describe_error, fail, require


@app.command(rich_help_panel="Publish")
def card(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model or adapter.")],
    results: Annotated[Path | None, typer.Option(help="results.json of hf-moe evaluate.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="The folder that hf-moe trace wrote, or the metrics.json in it.")
    ] = None,
    training: Annotated[
        Path | None,
        typer.Option(
            help="report.json of a recipe, or trainer_state.json of a Trainer. codecarbon's emissions.csv beside it "
            "is read as well."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for README.md and plots; default: the model's.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Name on the Hub, for the code that loads it.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Name on the Hub of the model it was made from.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the model, such as apache-2.0.")] = None,
    language: Annotated[str | None, typer.Option(help="Language of the model, such as en.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Training data on the Hub: owner/name. Repeatable.")
    ] = None,
) -> None:
    """Write a model card from facts: configs, training report, evaluation results, routing trace.

    report.json and results.json in the model's folder, or in the one above, are used unless you name others.

    What is missing reads "not measured". Facts of another model are refused.

    Full, unmodified benchmark runs go to .eval_results as well, where the Hub's leaderboards look.

    A card that is there already and says more than the new one is kept as README.old.md.
    """
    from hf_moe.hub.cards.beside import report_beside, results_beside
    from hf_moe.hub.cards.card import write_card
    from hf_moe.hub.cards.facts import CardError

    try:
        training = training or _found("training report", report_beside(model))
        results = results or _found("evaluation results", results_beside(model))
        require("recipes", "jinja2", *(["matplotlib"] if training or trace else []))
        written = write_card(
            model,
            output=output,
            results=results,
            trace=trace,
            training=training,
            repo_id=repo_id,
            base_model=base_model,
            license=license,
            language=language,
            datasets=dataset or (),
        )
    except (CardError, OSError) as error:
        fail(describe_error(error))
    for path in written:
        typer.echo(str(path))


def _found(what: str, path: Path | None) -> Path | None:
    """Say that a file is used which nobody named."""
    if path is not None:
        typer.echo(f"{what}: {path}")
    return path
