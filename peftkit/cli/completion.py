"""What a shell offers at Tab for values; where nothing is offered, it offers files. Torch-free, in a fraction of a second."""

from __future__ import annotations

import glob
from collections.abc import Iterable


def task_names(incomplete: str) -> list[str]:
    """Task types, in any case."""
    from peftkit.tasks import TASKS

    found = [name for name in TASKS if name.startswith(incomplete.upper())]
    return [name.lower() for name in found] if incomplete.islower() else found


def method_names(incomplete: str) -> list[str]:
    """Adapter methods, the last one of a list with commas."""
    from peftkit.methods import METHODS

    return _last_of_list(METHODS, incomplete)


def target_names(incomplete: str) -> list[str]:
    """Export targets, the last one of a list with commas."""
    from peftkit.exports import EXPORTS

    return _last_of_list(EXPORTS, incomplete)


def recipe_keys(incomplete: str) -> list[str]:
    """Keys of a recipe, each once although several methods may have it."""
    from peftkit.recipe.explain import all_keys

    return [key for key in dict.fromkeys(info.path for info in all_keys()) if key.startswith(incomplete)]


def recipe_files(incomplete: str) -> list[str]:
    """YAML files whose path begins so, those of folders that do too: `re` offers what is in `recipes/`."""
    start = glob.escape(incomplete)
    return sorted(path for ending in ("yaml", "yml") for place in ("", "*/") for path in glob.glob(f"{start}{place}*.{ending}"))


def _last_of_list(names: Iterable[str], incomplete: str) -> list[str]:
    before, comma, last = incomplete.rpartition(",")
    named = before.split(",")
    return [f"{before}{comma}{name}" for name in names if name.startswith(last) and name not in named]
