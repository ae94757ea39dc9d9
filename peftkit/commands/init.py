"""`peftkit init`: a commented starter recipe; at a terminal, what is not given is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.commands import init_questions as questions
from peftkit.errors import RecipeError
from peftkit.methods import METHODS
from peftkit.reading.guess import Look, Reading, look_at, readings_of, refuse_unread, splits_beside
from peftkit.recipe.fit import config_of, methods_for, why_not
from peftkit.recipe.load import did_you_mean, load_recipe
from peftkit.recipe.starter import MODELS, StarterData, starter_recipe
from peftkit.run import require_place, write_text
from peftkit.tasks import TASKS

_MIN_ROWS = 10  # of which a tenth is one
_MAX_LENGTH = 512  # tokens


@dataclass(frozen=True)
class Given:
    """What the command line says; None is asked for at a terminal, and has a default elsewhere."""

    task: str | None
    method: str | None
    model: str | None
    data: str | None


def init(path: Path, given: Given, force: bool) -> None:
    """Write a recipe that is valid where its rows and its model are known, and say what comes next."""
    task, method = _known(given)
    require_place(path, "PATH")
    is_asked = console.is_dialogue()
    if path.exists() and not force:
        if not is_asked:
            raise RecipeError(f"{path} exists already; name another file, or add --force to replace it")
        path = questions.ask_place(path)
    look = look_at(given.data, path.parent) if given.data else questions.ask_data(path.parent) if is_asked else None
    reading = _reading(look, task, is_asked) if look else None
    task = reading.task.name if reading else task or (questions.ask_task() if is_asked else "CAUSAL_LM")
    model = given.model or (questions.ask_model(task, path.parent) if is_asked else MODELS[task][0][0])
    config = config_of(model, path.parent)
    if method is None:
        method = questions.ask_method(task, config) if is_asked else "lora"
    elif reason := why_not(METHODS[method], task, config):
        raise RecipeError(f"--method: {reason}. These do: {', '.join(methods_for(task, config))}")
    data = _data(look, reading, path.parent) if look and reading else None
    write_text(path, starter_recipe(TASKS[task], METHODS[method], _place(model, path.parent), data, _max_length(config)))
    _tell_next(path)


def _known(given: Given) -> tuple[str | None, str | None]:
    """Task and method as tables name them.

    Raises:
        RecipeError: there are none of these names.
    """
    task = given.task.upper() if given.task else None
    method = given.method.lower() if given.method else None
    if task is not None and task not in TASKS:
        raise RecipeError(f"--task: no task is called `{given.task}`; there are: {', '.join(TASKS)}")
    if method is not None and method not in METHODS:
        known = ", ".join(METHODS) + did_you_mean(method, METHODS)
        raise RecipeError(f"--method: no method is called `{given.method}`; there are: {known}")
    return task, method


def _reading(look: Look, task: str | None, is_asked: bool) -> Reading:
    """What is learned of the rows: chosen at a terminal, elsewhere the likeliest.

    Raises:
        DataError: nothing can be.
    """
    for line in questions.look_lines(look):
        console.print_text(line)
    found = readings_of(look, task)
    if is_asked:
        return questions.ask_reading(look, found, task)
    if not found:
        refuse_unread(look, task)
    console.print_text(questions.reading_text(found[0], look))
    return found[0]


def _data(look: Look, reading: Reading, recipe_dir: Path) -> StarterData:
    """The rows of the recipe: validation and test rows that lie beside the training rows, or a tenth of those."""
    found = splits_beside(look, recipe_dir)
    beside = {name: (_place(path, recipe_dir), split) for name, (path, split) in found.items()}
    fraction = None if look.is_whole and len(look.rows) - reading.num_bad < _MIN_ROWS else 0.1
    return StarterData(
        train=(_place(look.path, recipe_dir), look.split),
        format=reading.format.name,
        columns=reading.columns,
        validation=beside.get("validation", fraction),
        test=beside.get("test"),
    )


def _place(name: str, recipe_dir: Path) -> str:
    """A path as the recipe finds it wherever it is called from: it looks in its own folder first."""
    if (recipe_dir / name).exists() or not Path(name).exists():
        return name
    return str(Path(name).absolute())


def _max_length(config: Mapping[str, Any]) -> int:
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    return min(_MAX_LENGTH, positions) if isinstance(positions, int) and positions > 0 else _MAX_LENGTH


def _tell_next(path: Path) -> None:
    try:
        load_recipe(path)
    except RecipeError as error:
        console.print_text(f"{path} written. Before it can train:\n{error}\nthen: peftkit validate {path}")
        return
    console.print_text(f"{path} written; it is valid. Rows as the model will see them: peftkit data {path}")
    console.print_text(f"next: peftkit train {path}")
