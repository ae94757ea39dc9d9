"""Commands that show what runs came to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli import completion
from peftkit.cli.options import AsJson

RunOrRecipe = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run directory, or a recipe.", autocompletion=completion.recipe_files)
]


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, or folders of `compare` and `sweep`.")],
    output: Annotated[
        Path | None, typer.Option(help="The HTML file; default: report.html in the run, or here for several.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write the curves here too, a PNG file each.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML file that tells what runs came to."""
    from peftkit import console
    from peftkit.commands import report as command

    with console.problems_as_json(as_json):
        result = command.report(runs, output, png)
    console.print_json(result) if as_json else command.print_report(result)


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that runs are in.")] = Path("runs"), as_json: AsJson = False
) -> None:
    """List runs: how each stands, its metric, and how those go on that have not ended."""
    from peftkit import console
    from peftkit.commands import runs as command

    with console.problems_as_json(as_json):
        console.print_json(command.runs(folder)) if as_json else command.print_runs(folder)


def diff(
    left: RunOrRecipe,
    right: Annotated[Path, typer.Argument(metavar="RUN", help="Another one.", autocompletion=completion.recipe_files)],
    as_json: AsJson = False,
) -> None:
    """Show in what two runs or recipes differ, and what came out."""
    from peftkit import console
    from peftkit.commands import diff as command

    with console.problems_as_json(as_json):
        result = command.diff(left, right)
    console.print_json(result) if as_json else command.print_diff(result)
