"""hf-moe compare-results: the scores of two runs of hf-moe evaluate"""

from pathlib import Path
from typing import Annotated

import typer

from hf_moe.cli.common import app, fail, require


@app.command("compare-results", rich_help_panel="Evaluate")
def compare_results(
    first: Annotated[Path, typer.Argument(help="results.json of a run of hf-moe evaluate, or its folder.")],
    second: Annotated[Path, typer.Argument(help="Of another: differences are second minus first.")],
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Also the settings that an adapter or another model always changes.")
    ] = False,
) -> None:
    """Compare the scores of two runs of `hf-moe evaluate` document by document; no model runs.

    For the routing and the weights of two models: `hf-moe compare`.
    """
    require("eval", "lm_eval")
    from hf_moe.evaluation import paired
    from hf_moe.evaluation.errors import EvaluationError
    from hf_moe.evaluation.tables import print_comparison

    try:
        print_comparison(paired.compare_results(first, second), verbose=verbose)
    except EvaluationError as error:
        fail(str(error))
