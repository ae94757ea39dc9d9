"""The command line: one short function per command; each imports what it needs when it is called."""

from __future__ import annotations

import copy
import functools
import os
import signal
import sys
import traceback
from typing import Annotated, Any

import typer

from peftkit import __version__
from peftkit.cli import adapters, combining, comparing, exporting, publishing, recipes, reference, reports, serving, training

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

COMMANDS = (
    recipes.init,
    recipes.validate,
    recipes.plan,
    recipes.params,
    recipes.data,
    recipes.migrate,
    training.train,
    training.replay,
    comparing.compare,
    comparing.sweep,
    adapters.evaluate,
    adapters.infer,
    adapters.merge,
    adapters.convert,
    combining.combine,
    exporting.export,
    serving.serve,
    publishing.push,
    reports.report,
    reports.runs,
    reports.diff,
    reference.methods,
    reference.explain,
    reference.schema,
    reference.doctor,
)
for _command in COMMANDS:
    app.command()(_command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peftkit {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """One YAML recipe becomes a trained, certified adapter."""


@functools.cache
def _built(name: str) -> Any:
    """The program with the command of this name, or with all: reading all their signatures takes as long as a recipe."""
    part = copy.copy(app)
    part.registered_commands = [
        command for command in app.registered_commands if getattr(command.callback, "__name__", "") == name
    ]
    return typer.main.get_command(part if part.registered_commands else app)


def main() -> None:
    """Run the command line; the one place where errors become messages and exit codes."""
    from peftkit.errors import PeftkitError
    from peftkit.stop import stops_at_once

    try:
        with stops_at_once("before it was done", [signal.SIGTERM]):
            _built(*sys.argv[1:2] or [""])(prog_name="peftkit")
    except SystemExit as error:
        _leave(error.code if isinstance(error.code, int) else int(error.code is not None))
    except PeftkitError as error:
        _fail(f"peftkit: error (exit {error.exit_code})", error.told, error.exit_code)
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
