"""hf-moe push: a model or an adapter to the Hub"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_moe.cli.common import app, fail

if TYPE_CHECKING:
    from hf_moe.hub.push import Pushed, PushPlan

_STYLES = {"new": "green", "changed": "yellow", "unchanged": "dim", "deleted": "red"}


@app.command(rich_help_panel="Publish")
def push(
    folder: Annotated[Path, typer.Argument(help="Folder that save_pretrained wrote, or a recipe's results folder.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub: owner/name.")],
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as private; refused if it is public.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would change on the Hub; send nothing.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; created if it does not exist.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing to the branch.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="For an adapter on a local base: name of the base on the Hub.")
    ] = None,
    add: Annotated[list[Path] | None, typer.Option(help="One more file or folder to send. Repeatable.")] = None,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Download the commit afterwards, compare it and load it.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the folder, or of the base, to load it.")
    ] = False,
) -> None:
    """Push a model or an adapter with its card, results and code in one commit, after loading it back.

    After an interruption, the same command sends only what is missing. The token is that of
    `hf auth login`, or HF_TOKEN.
    """
    from hf_moe.hub import push as hub
    from hf_moe.hub.cards.facts import CardError
    from hf_moe.hub.errors import HubError, LoadsBackError, PushRefusedError

    try:
        plan = hub.plan_push(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            base=base,
            add=add or [],
            trust_remote_code=trust_remote_code,
        )
        _print_plan(plan)
        if dry_run:
            return typer.echo("dry run: nothing was sent")
        pushed = hub.send(plan, message=message)
        typer.echo(_result(plan, pushed))
        typer.echo(f'load it with revision="{pushed.commit}" to pin it')
        if verify:
            typer.echo(f"downloaded and compared: {hub.verify(plan, pushed, trust_remote_code=trust_remote_code)}")
    except (PushRefusedError, HubError) as error:
        fail(str(error), code=1 if isinstance(error, LoadsBackError) else 2)
    except (CardError, ImportError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted. Give the same command again: what has arrived is not sent twice.", code=130)


def _result(plan: "PushPlan", pushed: "Pushed") -> str:
    if not plan.is_empty:
        return f"pushed: {pushed.url}"
    return "everything was there already" + (", and no pull request was opened" if plan.create_pr else "")


def _print_plan(plan: "PushPlan") -> None:
    console = Console(soft_wrap=True)
    table = Table("file", "bytes", "", title=_title(plan), title_justify="left")
    table.columns[1].justify = "right"
    for change in plan.changes:
        table.add_row(Text(change.path), f"{change.size:,}", Text(change.state, _STYLES[change.state]))
    console.print(table)
    for left in plan.left_out:
        console.print(Text(f"left out: {left.path} ({left.reason})"))
    console.print(Text(f"checked: {plan.loads}"))


def _title(plan: "PushPlan") -> Text:
    to = plan.repo_id + (f", branch {plan.revision}" if plan.revision else "")
    how = "pull request" if plan.create_pr else "one commit"
    if plan.head is None:
        how = f"new {'private' if plan.private else 'public'} repository, {how}"
    elif plan.new_branch:
        how = f"new branch, {how}"
    return Text(f"{to}: {how}")
