"""The command line: one short function per command; each imports what it needs when it is called."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from peftkit import __version__

if TYPE_CHECKING:
    from peftkit.launch import Launch
    from peftkit.recipe import LoadedRecipe

# Looking for pydantic plugins means reading the metadata of every installed package; a recipe needs none.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

app = typer.Typer(
    name="peftkit",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="One YAML recipe becomes a trained, certified adapter.",
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the recipe; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, and nothing else there.")]
Base = Annotated[str | None, typer.Option("--base", help="Base model, where the one that the adapter names cannot be found.")]
Adapter = Annotated[Path, typer.Option("--adapter", help="Run directory, or any PEFT adapter folder.")]

Locked = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="Refuse other packages, models or rows than this run (or its environment.json) has."),
]
Force = Annotated[bool, typer.Option("--force", help="With --resume: go on although recipe, rows, model or host have changed.")]
HangTimeout = Annotated[
    float, typer.Option(min=0, metavar="SECONDS", help="End processes that make no progress for so long; 0: never.")
]
NumMachines = Annotated[int | None, typer.Option(min=1, help="Train on so many machines; default: the scheduler's.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peftkit {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """One YAML recipe becomes a trained, certified adapter."""


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("recipe.yaml"),
    task: Annotated[str, typer.Option(help="Task type.")] = "CAUSAL_LM",
    method: Annotated[str, typer.Option(help="Adapter method.")] = "lora",
    model: Annotated[str | None, typer.Option(help="Hub id or local folder of the base model.")] = None,
    force: Annotated[bool, typer.Option(help="Replace a file that exists.")] = False,
) -> None:
    """Write a commented starter recipe."""
    from peftkit.commands import init as command

    command.init(path, task, method, model, force)


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe in half a second: keys, values, rules, files."""
    from peftkit.commands import validate as command

    command.validate(recipe, overrides or [], as_json)


@app.command()
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


@app.command()
def params(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipes; one line (or JSON object) each.")],
    by_module: Annotated[bool, typer.Option("--by-module", help="A table by module too.")] = False,
    compare: Annotated[str | None, typer.Option(help="Other methods to compare with, separated by commas.")] = None,
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


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or any PEFT adapter folder.")],
    data: Annotated[Path | None, typer.Option(help="Rows to evaluate on; default: the run's test or validation rows.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Write one line per row here too.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 16,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Compute metrics and write predictions."""
    from peftkit import console
    from peftkit.commands import evaluate as command

    result = command.evaluate(run, data, base, predictions, batch_size)
    console.print_json(result) if as_json else command.print_evaluation(result)


@app.command()
def infer(  # noqa: PLR0913, PLR0917 - one parameter per option
    adapter: Adapter,
    prompt: Annotated[
        str | None, typer.Option(help='One prompt; for QUESTION_ANS a JSON object: {"question": "...", "context": "..."}.')
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--input", help="Rows to answer (jsonl, json, csv, tsv, parquet, txt).")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the answers go, as JSON lines.")] = None,
    task_id: Annotated[
        str | None,
        typer.Option("--task-id", help="Task of the prompt, and of rows that name none, for adapters of several tasks."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 32,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sample at this temperature; 0: the likeliest token.")
    ] = None,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt, a file, or chat when neither is given."""
    from peftkit.commands import infer as command

    settings = command.settings_from(max_new_tokens, temperature)
    question = command.Question(prompt, source, output, task_id)
    command.infer(adapter, base, question, settings=settings, batch_size=batch_size, as_json=as_json)


@app.command()
def merge(
    adapter: Adapter,
    output: Annotated[Path, typer.Option(help="Folder of the merged model.")],
    dtype: Annotated[str, typer.Option(help="auto | float32 | bfloat16 | float16")] = "auto",
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Fold an adapter into its base, checked against the adapter."""
    from peftkit import console
    from peftkit.commands import merge as command

    result = command.merge(adapter, base, output, dtype)
    console.print_json(result) if as_json else command.print_merge(result)


@app.command()
def convert(
    adapter: Adapter,
    output: Annotated[Path, typer.Option(help="Folder of the LoRA adapter.")],
    rank: Annotated[float, typer.Option(help="Rank, or below 1 the share of the update's energy to keep.")] = 0.99,
    base: Base = None,
    as_json: AsJson = False,
) -> None:
    """Turn an adapter of another method into a LoRA, with the error of that."""
    from peftkit import console
    from peftkit.commands import convert as command

    result = command.convert(adapter, base, output, rank)
    console.print_json(result) if as_json else command.print_conversion(result)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="One method.")] = None, as_json: AsJson = False) -> None:
    """List the adapter methods, or the fields of one."""
    from peftkit.commands import reference

    reference.list_methods(name, as_json)


@app.command()
def explain(key: Annotated[str, typer.Argument(help="A key, such as training.batch_size.")], as_json: AsJson = False) -> None:
    """Explain one key of the recipe."""
    from peftkit.commands import reference

    reference.explain(key, as_json)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the recipe, for editors."""
    from peftkit import console
    from peftkit.recipe.explain import json_schema

    console.print_json(json_schema())


def main() -> None:
    """Run the command line; the one place where errors become messages and exit codes."""
    from peftkit.errors import PeftkitError

    try:
        app(prog_name="peftkit")
    except SystemExit as error:
        _leave(error.code if isinstance(error.code, int) else int(error.code is not None))
    except PeftkitError as error:
        _fail(f"peftkit: error (exit {error.exit_code})", str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("peftkit", "interrupted", 130)
    except Exception as error:
        _fail_of_bug(error)


def _fail_of_bug(error: Exception) -> None:
    from peftkit.worker import is_lost_peer

    if is_lost_peer(error):
        text = f"another process of this job has ended or cannot be reached: {error}"
        _fail("peftkit: error (exit 1)", text, 1, lost_peer=True)
    _fail("peftkit: a bug of ours (exit 1)", _bug_report(error), 1)


def _fail(title: str, text: str, code: int, *, lost_peer: bool = False) -> None:
    from peftkit import console

    console.print_error(title, text)
    _leave(code, text, lost_peer=lost_peer)


def _leave(code: int, message: str = "", *, lost_peer: bool = False) -> None:
    """End this process; a launched worker tells its launcher, and frees nothing, see `peftkit.engine.sharding`."""
    if "peftkit.launch" in sys.modules:
        from peftkit import console
        from peftkit.launch import is_worker, report_exit

        report_exit(code, message, lost_peer=lost_peer)
        if is_worker() and "torch" in sys.modules:
            console.flush()
            os._exit(code)
    sys.exit(code)


def _bug_report(error: Exception) -> str:
    """Write the traceback to a file and say where."""
    import tempfile

    with tempfile.NamedTemporaryFile("w", prefix="peftkit-", suffix=".log", delete=False, encoding="utf-8") as handle:
        handle.write("".join(traceback.format_exception(error)))
    return f"{type(error).__name__}: {error}\nThe traceback is in {handle.name}; please report it with the recipe."
