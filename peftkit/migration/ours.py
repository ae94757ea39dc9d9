"""The fields of our own sections, by name, and what they take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from peftkit.methods import METHODS
from peftkit.recipe.explain import section_of
from peftkit.recipe.schema import Recipe


def fields_of(section: str, method: Any) -> Mapping[str, Any]:
    """Name -> field of a section of a recipe; of `adapter` those of the method. Empty where there is no such section."""
    if section == "adapter":
        return METHODS[method].section.model_fields if method in METHODS else {}
    field = Recipe.model_fields.get(section)
    found = section_of(field.annotation) if field is not None else None
    return found.model_fields if found is not None else {}


def names_of(section: str, name: str) -> tuple[str, ...]:
    """The names that a field of a section takes."""
    return tuple(_literals(fields_of(section, None)[name].annotation))


def _literals(annotation: Any) -> Iterator[str]:
    for part in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield part
        else:
            yield from _literals(part)
