"""The command that takes an adapter to other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli import completion
from peftkit.cli.options import Adapter, AsJson, Base, names_of


def export(  # noqa: PLR0913, PLR0917 - one parameter per option
    adapter: Adapter,
    target: Annotated[
        str,
        typer.Option(
            metavar="TARGETS",
            help="Engines, with commas: docs/exporting.md lists them.",
            autocompletion=completion.target_names,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder to write, of several targets one in it for each; default: exports/ of the run.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="OPTION=VALUE", help="An option of the targets; repeatable; TARGET.OPTION for one."),
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="A merged model where the adapter would be exported.")] = False,
    lint: Annotated[
        bool, typer.Option("--lint", help="Only say whether the targets would take it (exit 2: they would not).")
    ] = False,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter for another engine, and have that read it back."""
    from peftkit import console
    from peftkit.commands import export as command

    chosen = [*(settings or []), *(["form=merged"] if merged else [])]
    request = command.Request(adapter, names_of(target), chosen, output, base)
    if lint:
        command.lint(request, as_json=as_json)
        return
    with console.problems_as_json(as_json):
        result = command.export(request)
    console.print_json(result) if as_json else command.print_exports(result)
