"""Commands that train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from peftkit.cli.options import AsJson, Force, HangTimeout, Locked, NumMachines, Overrides, RecipePath

if TYPE_CHECKING:
    from peftkit.launch import Launch
    from peftkit.recipe import LoadedRecipe


def train(  # noqa: PLR0913, PLR0917 - one parameter per option
    recipe: RecipePath,
    output: Annotated[Path | None, typer.Option(help="Run directory; default: a new one in output.dir.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output, or the newest unfinished one.")
    ] = False,
    processes: Annotated[int | None, typer.Option(help="Train with so many processes on each machine.")] = None,
    launch: Annotated[Path | None, typer.Option(help="Train as this accelerate launch file says.")] = None,
    locked: Locked = None,
    force: Force = False,
    hang_timeout: HangTimeout = 1800.0,
    num_machines: NumMachines = None,
    machine_rank: Annotated[int | None, typer.Option(min=0, help="Which of them this is, from 0.")] = None,
    main_process_ip: Annotated[str | None, typer.Option(help="Address of the machine of rank 0.")] = None,
    main_process_port: Annotated[int | None, typer.Option(help="Port of the machine of rank 0.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train, evaluate and certify."""
    from peftkit import launch as launcher
    from peftkit.errors import RecipeError
    from peftkit.machines import Machines
    from peftkit.recipe import load_recipe
    from peftkit.stop import stops_at_once

    loaded = load_recipe(recipe, overrides or [])
    if force and not resume:
        raise RecipeError("--force: has no effect without --resume; a new run needs a new folder")
    machines = Machines(num_machines, machine_rank, main_process_ip, main_process_port)
    asked = launcher.Launch(processes, launch, hang_timeout, machines)
    if asked.is_wanted:
        further = ["--force"] * force + (["--locked", str(locked)] if locked else [])
        _launch(asked, loaded, output, resume=resume, as_json=as_json, further=further)
    launcher.refuse_unshardable(loaded, launcher.worker_sharding(1))
    launcher.begin_worker(output)
    with stops_at_once("before training began: the same command starts again"), loaded.located():
        from peftkit.commands import train as command

        command.train_and_report(loaded, output, as_json=as_json, resume=resume, force=force, locked=locked)


def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps to train once more.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Train the first steps of a run once more and tell where they differ: rows, weights, losses. Exit 6 where they do."""
    from peftkit import console
    from peftkit.commands import replay as command

    with console.problems_as_json(as_json):
        result = command.replay(run, steps)
    console.print_json(result) if as_json else command.print_replay(result)
    raise typer.Exit(0 if result["equal"] else 6)


def _launch(
    asked: Launch, loaded: LoadedRecipe, output: Path | None, *, resume: bool, as_json: bool, further: list[str]
) -> NoReturn:
    """Train in processes of their own, and end as they do."""
    from peftkit import console
    from peftkit import launch as launcher
    from peftkit.launch_file import read_sharding

    with console.problems_as_json(as_json):
        launcher.refuse_unshardable(loaded, read_sharding(asked.processes, asked.config))
        facts = launcher.resolve(asked, loaded.recipe.training.mixed_precision)
        run = launcher.run_of_workers(facts, loaded, output, resume)
        arguments = launcher.worker_arguments(loaded, run.dir, resume, as_json) + further
        if facts["num_machines"] > 1:
            console.print_note(launcher.describe(facts))
        raise typer.Exit(launcher.launch(facts, run, asked, arguments))
