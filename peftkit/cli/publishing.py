"""Commands about the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli.options import AsJson


def push(  # noqa: PLR0913, PLR0917 - one parameter per option
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, adapter folder, or a model that `merge` wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name on the hub; made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is for its owner alone.")] = False,
    dry_run: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write what would be uploaded there; needs no network.")
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="ID", help="Hub id of the base, where it was a folder here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Publish without a passed certificate; the card says so.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter or a merged model with its model card."""
    from peftkit import console
    from peftkit.commands import push as command

    with console.problems_as_json(as_json):
        result = command.push(command.Request(run, repo_id, private, dry_run, base, force))
    console.print_json(result) if as_json else command.print_push(result)
