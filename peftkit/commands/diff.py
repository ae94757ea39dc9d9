"""`peftkit diff`: in what two runs or recipes differ, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.report.differences import Pairs, differences, read_side
from peftkit.report.show import show


def diff(left: Path, right: Path) -> dict[str, Any]:
    """What `--json` prints: each part as name -> [left, right], and what could not be read.

    Raises:
        LoadError, RecipeError: see `read_side`.
    """
    sides = [read_side(path) for path in (left, right)]
    found = differences(*sides)
    return {
        "left": str(left),
        "right": str(right),
        "recipe": found.recipe,
        "environment": found.environment,
        "fingerprints": found.fingerprints,
        "results": found.results,
        "notes": [f"{side.path}: {note}" for side in sides for note in side.notes],
    }


def print_diff(result: dict[str, Any]) -> None:
    """A table for each part in which there is something to see."""
    names = ["left", "right"]
    console.print_text(f"left:  {result['left']}\nright: {result['right']}")
    if not result["recipe"]:
        console.print_text("The recipes say the same.")
    for part, title in (("recipe", "recipe"), ("environment", "made with"), ("fingerprints", "fingerprints of rows and model")):
        if result[part]:
            console.print_figures(title, ["", *names], _rows(result[part]))
    if result["results"]:
        rows = [[*row, _change(*result["results"][row[0]])] for row in _rows(result["results"])]
        console.print_figures("what came out", ["", *names, "right - left"], rows)
    for note in result["notes"]:
        console.print_note(f"note: {note}")


def _rows(pairs: Pairs) -> list[list[str]]:
    return [[name, show(left), show(right)] for name, (left, right) in pairs.items()]


def _change(left: Any, right: Any) -> str:
    if not all(isinstance(value, int | float) for value in (left, right)):
        return ""
    change = right - left
    return f"{'+' if change > 0 else ''}{show(change)}"
