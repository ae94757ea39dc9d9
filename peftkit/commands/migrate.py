"""`peftkit migrate`: a recipe from the configuration of LLaMA-Factory, axolotl or TRL, and what became of each key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.errors import Problem, RecipeError
from peftkit.migration import TOOLS
from peftkit.migration.base import OUTCOMES
from peftkit.migration.convert import added, convert, recognise
from peftkit.migration.read import read_config
from peftkit.migration.write import recipe_text
from peftkit.recipe import load_recipe
from peftkit.recipe.load import did_you_mean
from peftkit.run import require_place, write_text


@dataclass(frozen=True)
class Migration:
    """What a migration gave: what `--json` prints, and what is still wrong with the recipe."""

    result: dict[str, Any]
    problems: list[Problem]


def migrate(path: Path, tool_name: str | None, output: Path | None, force: bool) -> Migration:
    """Write the recipe.

    Raises:
        RecipeError: the file is none of theirs, or of a training that cannot be had here; nothing is written then.
    """
    if tool_name is not None and tool_name not in TOOLS:
        raise RecipeError(
            f"--from: no tool is called `{tool_name}`; there are: {', '.join(TOOLS)}{did_you_mean(tool_name, TOOLS)}"
        )
    recipe_path = output or Path(f"{path.stem}.recipe.yaml")
    require_place(recipe_path, "--output")
    if recipe_path.exists() and not force:
        raise RecipeError(f"{recipe_path} exists already; name another file by --output, or add --force to replace it")
    config = read_config(path)
    tool = TOOLS[tool_name] if tool_name is not None else recognise(config)
    draft = convert(config, tool, recipe_path.parent)
    command = f"peftkit train {recipe_path}" + (f" --launch {draft.launch}" if draft.launch else "")
    write_text(recipe_path, recipe_text(draft, command))
    problems = _problems(recipe_path)
    keys = [vars(note) | {"line": config.lines.get(note.key)} for note in (*draft.notes.values(), *added(draft))]
    found = [{"where": p.where, "key": p.key, "what": p.what} for p in problems]
    return Migration(
        {
            "recipe": str(recipe_path),
            "tool": tool.name,
            "command": command,
            "keys": keys,
            "valid": not problems,
            "problems": found,
        },
        problems,
    )


def _problems(path: Path) -> list[Problem]:
    try:
        load_recipe(path)
    except RecipeError as error:
        return error.problems
    return []


def print_migration(result: dict[str, Any]) -> None:
    """The result for people: one table for each kind of outcome."""
    title = TOOLS[result["tool"]].title
    for outcome, heading in OUTCOMES.items():
        rows = [(key["key"], key["ours"], key["why"]) for key in result["keys"] if key["outcome"] == outcome]
        if outcome == "ignored":
            _print_names(heading, [row[0] for row in rows])
        elif rows:
            columns = [title, "peftkit", ""]
            used = [place for place in range(3) if any(row[place] for row in rows)]
            console.print_wide_table(
                heading, [columns[place] for place in used], [[row[place] for place in used] for row in rows]
            )
    console.print_text(f"{result['recipe']} written; next: peftkit data {result['recipe']}, then {result['command']}")


def _print_names(heading: str, names: list[str]) -> None:
    if names:
        console.print_text(f"{heading} (--json says why): {', '.join(names)}")
