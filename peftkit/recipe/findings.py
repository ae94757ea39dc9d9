"""What a rule yields, and how it tells what a recipe states."""

from __future__ import annotations

from pydantic import BaseModel

Finding = tuple[str, str, int]  # dotted key, sentence, exit code


def written(section: BaseModel, *names: str) -> list[str]:
    """Those of the named keys that the recipe states with a value other than the default."""
    fields = type(section).model_fields
    return [name for name in names if name in section.model_fields_set and getattr(section, name) != fields[name].default]
