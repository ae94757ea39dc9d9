"""The command that makes one adapter of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli.options import AsJson, Base

_METHODS = "cat | svd | linear | ties | dare_linear | dare_ties | magnitude_prune, and ties_svd etc.; IA3: linear"


def combine(  # noqa: PLR0913, PLR0917 - one parameter per option
    adapters: Annotated[list[str], typer.Argument(metavar="DIR", help="Runs or PEFT adapter folders, as DIR or NAME=DIR.")],
    output: Annotated[Path, typer.Option(help="Folder of the combined adapter.")],
    method: Annotated[str, typer.Option(help=_METHODS)] = "cat",
    weights: Annotated[str | None, typer.Option(help="One per adapter: 0.7,0.3; default: the mean of the adapters.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of the numbers that ties, dare and prune methods keep.")] = None,
    majority_sign_method: Annotated[str | None, typer.Option(help="For ties and dare_ties: total | frequency.")] = None,
    svd_rank: Annotated[int | None, typer.Option(min=1, help="Rank of svd methods; default: the adapters' largest.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Rows of each adapter's task, in order, or NAME=FILE; repeatable.")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Try a grid of weights (and densities) on these rows.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of what the dare methods drop; default: 0.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 16,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Use only the first rows of each file.")] = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Make one adapter of several, measured on the rows of each."""
    from peftkit import console
    from peftkit.combination import Request
    from peftkit.commands import combine as command

    request = Request(
        tuple(adapters),
        output,
        method,
        numbers_of(weights),
        density,
        majority_sign_method,
        svd_rank,
        tuple(data or ()),
        search,
        seed,
        batch_size,
        max_rows,
        base,
    )
    result = command.combine(request)
    console.print_json(result) if as_json else command.print_combination(result)


def numbers_of(text: str | None) -> tuple[float, ...] | None:
    """The numbers in a list with commas; None where there is none.

    Raises:
        RecipeError: a part is no number.
    """
    from peftkit.errors import RecipeError

    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise RecipeError(f"--weights: `{text}` is no list of numbers, such as 0.7,0.3") from error
