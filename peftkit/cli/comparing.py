"""Commands that train a recipe many times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from peftkit.cli import completion
from peftkit.cli.options import AsJson, Overrides

if TYPE_CHECKING:
    from peftkit.comparison.record import Record

Budget = Annotated[
    tuple[str, float] | None,
    typer.Option(metavar="UNIT N", help="What a trial may spend: steps, tokens or seconds, and how many."),
]
Seeds = Annotated[str | None, typer.Option(metavar="N", help="How many seeds, from the recipe's own on; or which: 0,5.")]
Metric = Annotated[str | None, typer.Option(help="The metric to compare; default: the task's own.")]
Output = Annotated[Path | None, typer.Option(help="The directory; default: a new one in output.dir.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on in --output; what is done is kept.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="With --resume: run failed trials again.")]
SkipRefused = Annotated[bool, typer.Option("--skip-refused", help="Leave out what cannot work on this model.")]
Jobs = Annotated[int, typer.Option(min=1, help="Trials at once; each has a GPU of its own.")]

Variants = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe, a file with `compare:` or `sweep:`, or the directory of what was begun.",
        autocompletion=completion.recipe_files,
    ),
]


def compare(  # noqa: PLR0913, PLR0917 - one parameter per option
    recipe: Variants,
    methods: Annotated[
        str | None, typer.Option(help="Methods to compare, separated by commas.", autocompletion=completion.method_names)
    ] = None,
    seeds: Seeds = None,
    budget: Budget = None,
    match_params: Annotated[
        str | None, typer.Option(metavar="METHOD|N", help="Choose sizes so that all train as many parameters.")
    ] = None,
    metric: Metric = None,
    forgetting: Annotated[
        str | None, typer.Option(metavar="FILE", help="Other text: how much the loss on it has grown (language models).")
    ] = None,
    output: Output = None,
    resume: Resume = False,
    retry_failed: RetryFailed = False,
    skip_refused: SkipRefused = False,
    jobs: Jobs = 1,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train methods on the same rows under the same budget, with several seeds; a table of what each gives and costs."""
    from peftkit import console
    from peftkit.commands import compare as command
    from peftkit.commands.experiment import Options, print_comparison
    from peftkit.comparison.file import budget_of, seeds_of

    with console.problems_as_json(as_json):
        stated = {
            "methods": methods.split(",") if methods else [],
            "seeds": seeds_of(seeds),
            "budget": budget_of(budget),
            "match_params": int(match_params) if match_params and match_params.isdigit() else match_params,
            "metric": metric,
            "forgetting": forgetting,
            "set": overrides or [],
        }
        options = Options(output, resume, retry_failed, skip_refused, jobs)
        _finish(command.compare(recipe, stated, options), print_comparison, as_json=as_json)


def sweep(  # noqa: PLR0913, PLR0917 - one parameter per option
    recipe: Variants,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V,V", help="Values of a key; repeatable: all combinations.")
    ] = None,
    search: Annotated[
        list[str] | None, typer.Option(metavar="KEY=RANGE", help="int:4:64:log, float:1e-5:1e-2:log or choice:a|b; repeatable.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="With --search: settings to try; default 20.")] = None,
    seeds: Seeds = None,
    budget: Budget = None,
    metric: Metric = None,
    output: Output = None,
    resume: Resume = False,
    retry_failed: RetryFailed = False,
    skip_refused: SkipRefused = False,
    jobs: Jobs = 1,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Try values of recipe keys, all combinations (--grid) or a search (--search); the best recipe by the validation rows."""
    from peftkit import console
    from peftkit.commands import sweep as command
    from peftkit.commands.experiment import Options
    from peftkit.comparison.file import budget_of, by_key, seeds_of, values_of

    with console.problems_as_json(as_json):
        stated = {
            "grid": {key: values_of(text) for key, text in by_key("--grid", grid or []).items()},
            "search": by_key("--search", search or []),
            "trials": trials,
            "seeds": seeds_of(seeds),
            "budget": budget_of(budget),
            "metric": metric,
            "set": overrides or [],
        }
        record = command.sweep(recipe, stated, Options(output, resume, retry_failed, skip_refused, jobs))
        _finish(record, command.print_sweep, as_json=as_json)


def _finish(record: Record, show: Callable[[Record], None], *, as_json: bool) -> NoReturn:
    """Print the table, write the report, and end with 0 where all trials are done."""
    from peftkit import console
    from peftkit.commands.experiment import write_report

    write_report(record)
    console.print_json(record.result) if as_json else show(record)
    raise typer.Exit(record.exit_code)
