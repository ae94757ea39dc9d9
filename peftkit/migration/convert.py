"""Another tool's configuration becomes the draft of a recipe, with a note on each of its keys."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, RecipeError
from peftkit.migration import TOOLS
from peftkit.migration.base import DEFAULT, Config, Draft, Move, Note, Tool, is_on
from peftkit.migration.ours import fields_of
from peftkit.recipe.load import did_you_mean

# Files that lie beside such configurations and are none.
_OTHERS: tuple[tuple[str, str], ...] = (
    ("compute_environment distributed_type", "is a launch file of accelerate; `peftkit train --launch FILE` takes it as it is"),
    ("zero_optimization", "is a configuration of DeepSpeed; a launch file such as configs/deepspeed_zero3.yaml says it here"),
    ("task model adapter", "is a recipe of peftkit already"),
)
# A key that would have no effect without another, which is an error in a recipe.
_NEEDED = {"training.loraplus_lr_embedding": "training.loraplus_lr_ratio"}


def recognise(config: Config) -> Tool:
    """The tool whose keys these are.

    Raises:
        RecipeError: no tool's, or those of several.
    """
    names = {*config.values}
    for keys, what in _OTHERS:
        if names.issuperset(keys.split()):
            raise RecipeError([Problem(str(config.path), "", what)])
    if config.command:
        return TOOLS["trl"]
    own = {name: _own_keys(name) & names for name in TOOLS}
    found = [name for name, keys in own.items() if keys]
    if len(found) == 1:
        return TOOLS[found[0]]
    if found:
        shown = "; ".join(f"{TOOLS[name].title}: {', '.join(sorted(own[name])[:4])}" for name in found)
        what = f"has keys of several tools ({shown}); name one by --from, and the keys of the others are listed as unknown"
    else:
        known = ", ".join(tool.title for tool in TOOLS.values())
        what = f"has no key that one of {known} alone has, so that it may be none of theirs; --from says whose it is"
    raise RecipeError([Problem(str(config.path), "", what)])


def _own_keys(name: str) -> frozenset[str]:
    """The keys that no other tool has."""
    return TOOLS[name].keys.difference(*(TOOLS[other].keys for other in TOOLS if other != name))


def convert(config: Config, tool: Tool, recipe_dir: Path) -> Draft:
    """A configuration as the draft of a recipe.

    Args:
        config: what was read.
        tool: whose it is.
        recipe_dir: folder that the recipe will be in.

    Raises:
        RecipeError: it is of a training that cannot be had here; every such key at once.
    """
    draft = Draft(config, tool, recipe_dir)
    _refuse(draft)
    for step in tool.steps:
        step(draft)
    if draft.problems:
        raise RecipeError(draft.problems)
    for key, value in config.values.items():
        if key not in draft.notes:
            _by_table(draft, key, value)
    for ours, value in tool.defaults.items():
        if not (ours == "training.num_train_epochs" and "training.max_steps" in draft.entries):
            draft.add(ours, value)
    _settle(draft)
    return draft


def _refuse(draft: Draft) -> None:
    """Keys of other trainings; those with the same reason together."""
    grouped: dict[str, list[str]] = {}
    for key, value in draft.config.values.items():
        if key in draft.tool.refused and is_on(value):
            grouped.setdefault(draft.tool.refused[key], []).append(key)
    for why, keys in grouped.items():
        draft.problems.append(Problem(draft.config.where(keys[0]), ", ".join(keys), why))
    if draft.problems:
        raise RecipeError(draft.problems)  # what else such a file has means other things


def _by_table(draft: Draft, key: str, value: Any) -> None:
    """What the tables say of a key that no step has taken."""
    tool = draft.tool
    if key not in tool.keys:
        others = [TOOLS[name].title for name in TOOLS if key in TOOLS[name].keys and name != tool.name]
        why = did_you_mean(key, tool.keys).removeprefix("; ") or (f"a key of {', '.join(others)}" if others else "")
        draft.drop(key, why or f"{tool.title} {tool.version} has no such key", "unknown")
    elif key in tool.ignored or key in tool.refused:
        draft.drop(key, tool.ignored.get(key, "is off"))
    elif value is None:
        draft.drop(key, "is empty: its default")
    elif key in tool.moves:
        _move(draft, key, value, tool.moves[key])
    elif not is_on(value):
        draft.drop(key, "is off")
    elif key in tool.no_equal:
        draft.drop(key, tool.no_equal[key], "no_equal")
    else:
        draft.drop(key, f"has no effect without the keys that it goes with ({tool.read[key].ours})")


def _move(draft: Draft, key: str, value: Any, move: Move) -> None:
    if move.ours.partition(".")[0] == "adapter" and draft.value("adapter.method") not in ("lora", None):
        draft.drop(key, f"has no effect with `method: {draft.value('adapter.method')}`")
        return
    known = value in move.values if isinstance(value, str | int | bool) else False
    draft.put(move.ours, move.values[value] if known else value, key, why=move.why)


def _settle(draft: Draft) -> None:
    """Take out what would have no effect, and what is the default here."""
    for ours, needed in _NEEDED.items():
        if ours in draft.entries and needed not in draft.entries:
            _take_out(draft, ours, f"has no effect without {needed}", "ignored")
    for ours, entry in list(draft.entries.items()):
        section, _, name = ours.partition(".")
        field = fields_of(section, draft.value("adapter.method")).get(name)
        is_told = entry.why and not entry.why.startswith(DEFAULT)  # stays, for its comment
        if section != "adapter" and not is_told and field is not None and _equal(field.default, entry.value):
            _take_out(draft, ours, "", "default")


def _take_out(draft: Draft, ours: str, why: str, outcome: Any) -> None:
    for key in draft.entries.pop(ours).keys:
        if draft.notes[key].ours == ours:
            draft.notes[key] = Note(key, outcome, ours, why)


def _equal(default: Any, value: Any) -> bool:
    return (
        type(default) in (type(value), int, float) and default == value and isinstance(default, bool) == isinstance(value, bool)
    )


def added(draft: Draft) -> Iterable[Note]:
    """Values of the recipe that no key of theirs has said."""
    return [Note("", "added", ours, entry.why) for ours, entry in draft.entries.items() if not entry.keys]
