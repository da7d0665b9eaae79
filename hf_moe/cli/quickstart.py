"""hf-moe quickstart: a small model, trained, adapted and evaluated"""

from pathlib import Path
from typing import Annotated

import typer

from hf_moe.cli.common import app, fail, require


@app.command(rich_help_panel="Start")
def quickstart(
    output: Annotated[
        Path, typer.Option(help="Folder for the results: new, empty, or left by an interrupted run.")
    ] = Path("quickstart-output"),
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Your own .txt, .md or .jsonl file (field 'text'), or a folder of them. Repeatable."),
    ] = None,
    domain: Annotated[
        str | None, typer.Option(help="The new domain that the adapter learns: one of yours, or an embedded one.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Approximate time on 2 cores; it sets the number of steps.")] = 5.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same results on the same machine.")] = 0,
) -> None:
    """Train a small MoE on real text, adapt it to a new domain with its router frozen, evaluate, save, load back."""
    require("recipes", "accelerate", "peft", "tokenizers", "matplotlib", "jinja2")
    from hf_moe.data.bad_rows import DataError
    from hf_moe.io.stages import RunRefusedError
    from hf_moe.recipes import quickstart as recipe

    chosen = recipe.Quickstart(output=output, data=data or [], domain=domain, minutes=minutes, seed=seed)
    try:
        recipe.main(chosen)
    except (RunRefusedError, DataError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted. Give the same command again to continue.", code=130)
