"""`peftkit validate`: check a recipe without torch, in a fraction of a second."""

from __future__ import annotations

from pathlib import Path

from peftkit import console
from peftkit.errors import RecipeError
from peftkit.recipe import load_recipe


def validate(path: Path, overrides: list[str], as_json: bool) -> None:
    """Check a recipe without torch."""
    try:
        load_recipe(path, overrides)
    except RecipeError as error:
        if as_json:
            problems = [{"where": p.where, "key": p.key, "what": p.what} for p in error.problems]
            console.print_json({"valid": False, "problems": problems})
        raise
    console.print_json({"valid": True, "problems": []}) if as_json else console.print_text(f"{path}: valid")
