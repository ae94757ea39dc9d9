"""What `peftkit init` asks at a terminal. Every question has a default, and a wrong answer is asked for again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.errors import DataError, RecipeError
from peftkit.formats import FORMATS
from peftkit.formats.base import shown
from peftkit.methods import METHODS
from peftkit.reading.guess import Look, Reading, checked_reading, look_at
from peftkit.recipe.fit import methods_for, why_not
from peftkit.recipe.load import did_you_mean
from peftkit.recipe.paths import find_model, is_data_file, looks_local
from peftkit.recipe.rules import model_problem
from peftkit.recipe.starter import MODELS
from peftkit.run import require_place
from peftkit.tasks import TASKS

# Of the methods that fit, those that are shown; `peftkit methods` has all.
_SHOWN_METHODS = ("lora", "ia3", "prefix_tuning", "prompt_tuning", "bottleneck", "bitfit", "full")
_NO_COLUMN = "-"


def ask_place(path: Path) -> Path:
    """A file to write that does not exist yet."""

    def free(answer: str) -> Path:
        if Path(answer).exists():
            raise RecipeError(f"{answer} exists already; name another file (or call again with --force to replace it)")
        require_place(Path(answer), "PATH")
        return Path(answer)

    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(2, 1000))
    console.print_text(f"{path} exists already.")
    return console.ask_until("File to write", str(next(name for name in names if not name.exists())), free)


def ask_data(recipe_dir: Path) -> Look | None:
    """The rows to learn from; None: there are none yet."""
    found = sorted(path.name for path in Path().glob("*") if is_data_file(path.name) and path.is_file())
    likely = next((name for name in found if "train" in name), found[0] if len(found) == 1 else "")
    if len(found) > 1:
        console.print_text(f"Files of rows here: {', '.join(found[:10])}{' ...' if len(found) > 10 else ''}")
    hint = "file, glob or folder" + ("" if likely else "; Enter: none yet")
    return console.ask_until(f"Your rows ({hint})", likely, lambda answer: look_at(answer, recipe_dir) if answer else None)


def look_lines(look: Look) -> list[str]:
    """What has been seen of the rows: how many, the columns, the first one, what cannot be read."""
    count = f"{len(look.rows):,} rows" if look.is_whole else f"the first {len(look.rows):,} rows"
    of_split = f" (split {look.split})" if look.split else ""
    lines = [f"{look.path}{of_split}: {count}, columns {', '.join(look.columns)}"]
    lines += [f"    {name}: {shown(value)}" for name, value in look.rows[0].items()]
    if look.faults:
        lines.append(f"{len(look.faults):,} more cannot be read (`data.on_bad_row: drop` leaves them out): {look.faults[0]}")
    return lines


def reading_text(reading: Reading, look: Look) -> str:
    """A way to learn from rows, in a line."""
    how = [f"format {reading.format.name}", *(f"{ours}: {theirs}" for ours, theirs in reading.columns.items())]
    bad = f"; {reading.num_bad:,} of {len(look.rows):,} rows cannot be read so" if reading.num_bad else ""
    return f"{reading.task.name}: learns of the first row {reading.learned} ({', '.join(how)}){bad}"


def ask_reading(look: Look, found: Sequence[Reading], task: str | None) -> Reading:
    """Which of the ways to learn from the rows, or one by columns that the user names."""
    if not found:
        console.print_text(f"No format that {task or 'a task'} reads is recognised by these columns; say which is which.")
        return _ask_columns(look, task or ask_task())
    console.print_text("What is to be learned:")
    choices = [*(reading_text(reading, look) for reading in found), "something else: name the columns"]
    number = _ask_number(choices)
    return found[number] if number < len(found) else _ask_columns(look, task or ask_task())


def _ask_columns(look: Look, task: str) -> Reading:
    """A format and its columns, asked for until the rows can be read so."""
    known = [item for item in FORMATS.values() if TASKS[task].can_read(item.yields)]
    console.print_text(f"Formats that {task} reads:")
    item = known[_ask_number([f"{item.name}: {item.summary}" for item in known])]
    while True:
        columns = {ours: _ask_column(ours, look) for ours in item.example}
        try:
            return checked_reading(look, TASKS[task], item, {ours: name for ours, name in columns.items() if name})
        except DataError as error:
            console.print_text(f"{error}\nOnce more:")


def _ask_column(ours: str, look: Look) -> str:
    """The column that is called `ours` in the format; empty: none is."""

    def known(answer: str) -> str:
        top = answer.partition(".")[0]
        if answer != _NO_COLUMN and answer not in look.columns and top not in look.columns:
            raise RecipeError(f"no column is called `{answer}`; there are: {', '.join(look.columns)}; {_NO_COLUMN} for none")
        return "" if answer == _NO_COLUMN else answer

    return console.ask_until(f"Column for `{ours}`", ours if ours in look.columns else _NO_COLUMN, known)


def ask_task() -> str:
    """A task, by number or name."""
    console.print_text("Tasks:")
    names = [*TASKS]
    return names[_ask_number([f"{task.name}: {task.summary}" for task in TASKS.values()], names)]


def ask_model(task: str, recipe_dir: Path) -> str:
    """A base model, by number, hub id or folder; what can be known of it without the hub is checked."""
    known = [(name, what) for name, what in MODELS[task] if not name.startswith("embedded/") or find_model(name, recipe_dir)]
    console.print_text(f"Models for {task}, to begin with:")
    for number, (name, what) in enumerate(known, 1):
        console.print_text(f"  {number}  {name} ({what})")

    def checked(answer: str) -> str:
        name = known[int(answer) - 1][0] if answer.isdigit() and 0 < int(answer) <= len(known) else answer
        if name.isdigit() and not looks_local(name):
            raise RecipeError(f"{answer} is none of the numbers 1 to {len(known)}")
        if problem := model_problem(name, task, recipe_dir):
            raise RecipeError(problem)
        return name

    return console.ask_until("Number, hub id or folder", "1", checked)


def ask_method(task: str, config: Mapping[str, Any]) -> str:
    """An adapter method that fits task and model, by name."""
    able = methods_for(task, config)
    console.print_text(f"Methods (`peftkit methods` lists all {len(METHODS)}):")
    shown_ones = [name for name in _SHOWN_METHODS if name in able]
    for name in shown_ones:
        console.print_text(f"  {name}: {METHODS[name].summary}")

    def checked(answer: str) -> str:
        name = answer.lower()
        if name not in METHODS:
            raise RecipeError(f"no method is called `{answer}`{did_you_mean(name, METHODS)}")
        if reason := why_not(METHODS[name], task, config):
            raise RecipeError(reason)
        return name

    return console.ask_until("Method", shown_ones[0] if shown_ones else able[0], checked)


def _ask_number(choices: Sequence[str], names: Sequence[str] = ()) -> int:
    """Which of the choices, counted from 0, by its number or name; the first by default."""
    for number, choice in enumerate(choices, 1):
        console.print_text(f"  {number}  {choice}")

    def checked(answer: str) -> int:
        if answer.upper() in names:
            return list(names).index(answer.upper())
        if not (answer.isdigit() and 0 < int(answer) <= len(choices)):
            raise RecipeError(f"`{answer}` is none of the numbers 1 to {len(choices)}{' and no name of them' if names else ''}")
        return int(answer) - 1

    return console.ask_until("Number or name" if names else "Number", "1", checked)
