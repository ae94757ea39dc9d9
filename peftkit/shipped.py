"""Recipes and launch files that come with the package, for who has installed it and has no checkout."""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("recipes", "configs")
# In an installed package they lie beside its modules; in a checkout beside the package.
_ROOTS = (Path(__file__).parent / "shipped", Path(__file__).parents[1])


def here_or_shipped(path: Path) -> Path:
    """The path itself where something is there; for `recipes/...` and `configs/...` else what the package brings."""
    if path.exists() or path.parts[:1] not in [(name,) for name in FOLDERS]:
        return path
    return next((root / path for root in _ROOTS if (root / path).is_file()), path)
