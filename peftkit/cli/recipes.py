"""Commands about a recipe, before a weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli import completion
from peftkit.cli.options import AsJson, Overrides, RecipePath


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("recipe.yaml"),
    task: Annotated[
        str | None,
        typer.Option(help="Task type; default: what the rows suit, or CAUSAL_LM.", autocompletion=completion.task_names),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Adapter method; default: lora.", autocompletion=completion.method_names)
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or local folder of the base model.")] = None,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Rows to train on: a file, glob or folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Write a commented starter recipe; at a terminal, what is not given is asked."""
    from peftkit.commands import init as command

    command.init(path, command.Given(task, method, model, data), force)


def validate(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe in half a second: keys, values, rules, files."""
    from peftkit.commands import validate as command

    command.validate(recipe, overrides or [], as_json)


def plan(
    recipe: RecipePath,
    fit: Annotated[
        float | None, typer.Option(min=0.1, metavar="GPU_GIB", help="Propose settings that fit into a GPU of so many GiB.")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Plan for so many processes.")] = None,
    launch: Annotated[Path | None, typer.Option(help="Plan for the processes of this accelerate launch file.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run will do: targets, parameters, steps, tokens, memory. Loads no weights."""
    from peftkit import console
    from peftkit.launch_file import read_sharding
    from peftkit.recipe import load_recipe

    with console.problems_as_json(as_json):
        loaded = load_recipe(recipe, overrides or [])
        from peftkit.commands import plan as command

        stated = processes is not None or launch is not None
        sharding = read_sharding(processes, launch) if stated else None
        with loaded.located():
            result = command.plan(loaded, sharding=sharding, fit_gib=fit)
    console.print_json(result) if as_json else command.print_plan(result)


def params(
    recipes: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECIPE...", help="Recipes; one line (or JSON object) each.", autocompletion=completion.recipe_files
        ),
    ],
    by_module: Annotated[bool, typer.Option("--by-module", help="A table by module too.")] = False,
    compare: Annotated[
        str | None,
        typer.Option(help="Other methods to compare with, separated by commas.", autocompletion=completion.method_names),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Count trainable and all parameters, from the model's config alone."""
    from peftkit.recipe import load_recipe

    loaded = [load_recipe(path, overrides or [], needs_data=False) for path in recipes]
    from peftkit.commands import params as command

    for recipe in loaded:
        with recipe.located():
            command.params(recipe, compare.lower().split(",") if compare else [], by_module, as_json)


def data(
    recipe: RecipePath,
    rows: Annotated[int, typer.Option(min=0, help="Training examples to show.")] = 3,
    row: Annotated[int | None, typer.Option(help="Show this training example instead, counted from 1.")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the lengths into NAME-lengths.png (needs matplotlib).")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show rows as the model will see them, what is learned of them, and what is wrong with them."""
    from peftkit import console
    from peftkit.recipe import load_recipe

    with console.problems_as_json(as_json):
        loaded = load_recipe(recipe, overrides or [])
        from peftkit.commands import data as command

        with loaded.located():
            result = command.data(loaded, rows, row, plot)
    console.print_json(result) if as_json else command.print_data(result)


def migrate(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="Their YAML or JSON; for TRL a shell script with the command too.")
    ],
    tool: Annotated[
        str | None, typer.Option("--from", metavar="TOOL", help="llamafactory | axolotl | trl; default: by its keys.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="RECIPE", help="File to write; default: CONFIG's name + .recipe.yaml.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace a file that exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a recipe from a configuration of LLaMA-Factory, axolotl or TRL, and say what became of each key."""
    from peftkit import console
    from peftkit.commands import migrate as command
    from peftkit.errors import RecipeError

    with console.problems_as_json(as_json):
        done = command.migrate(config, tool, output, force)
    console.print_json(done.result) if as_json else command.print_migration(done.result)
    if done.problems:
        raise RecipeError(done.problems)
