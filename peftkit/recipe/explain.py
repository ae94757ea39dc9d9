"""The recipe's keys as data: paths, types in words, JSON Schema, and what a single key means."""

from __future__ import annotations

import functools
import operator
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import annotated_types
from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from peftkit.methods import METHODS
from peftkit.recipe.schema import Recipe

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}


@dataclass(frozen=True)
class KeyInfo:
    """One key of the recipe.

    Attributes:
        path: dotted key; the keys of a method are `adapter.NAME` with `method` saying which.
        type_text: what it takes, in words.
        default: value when it is left out; `None` with `required`.
        required: whether it must be written.
        description: its meaning.
        method: the method that has this key, or an empty string.
    """

    path: str
    type_text: str
    default: Any
    required: bool
    description: str
    method: str = ""


@functools.cache
def all_keys() -> tuple[KeyInfo, ...]:
    """Every key that a recipe may hold, in the order of the schema."""
    return tuple(_keys_of(Recipe, ""))


def _keys_of(section: type[BaseModel], prefix: str, method: str = "") -> Iterator[KeyInfo]:
    for name, info in section.model_fields.items():
        path = f"{prefix}{name}"
        yield key_info(path, info, method)
        if path == "adapter":
            for item in METHODS.values():
                yield from _keys_of(item.section, "adapter.", item.name)
        elif (inner := section_of(info.annotation)) is not None:
            yield from _keys_of(inner, f"{path}.", method)


def key_info(path: str, info: FieldInfo, method: str = "") -> KeyInfo:
    """Describe one field of a section."""
    default = None if info.default is PydanticUndefined else info.default
    if isinstance(default, BaseModel):
        default = None
    return KeyInfo(path, type_text(info), default, info.is_required(), info.description or "", method)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The one section inside a type such as `Source | float | None`, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [section_of(part) for part in typing.get_args(annotation)]
    sections = [part for part in found if part is not None]
    return sections[0] if len(sections) == 1 else None


def type_text(info: FieldInfo) -> str:
    """What a field takes, in words: `a whole number above 0`."""
    return _words_of(info.annotation, info.metadata) + _bounds(info.metadata)


def _words_of(annotation: Any, metadata: Sequence[Any]) -> str:
    """What a type takes, and what is turned into it before, such as a plain path into a section."""
    if typing.get_origin(annotation) is tuple and Ellipsis in typing.get_args(annotation):
        return f"{_words(typing.get_args(annotation)[0])} | a list of these"
    inputs = [
        getattr(item, "json_schema_input_type", PydanticUndefined) for item in metadata if isinstance(item, BeforeValidator)
    ]
    return next((_words(known) for known in inputs if known is not PydanticUndefined), None) or _words(annotation)


def _words(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(str(arg) for arg in args)
    if origin is typing.Annotated:
        return _words_of(args[0], args[1:]) + _bounds(args[1:])
    words = [_words(arg) for arg in args]
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(words))
    if origin is list:
        return f"a list of {words[0].removeprefix('a ')}"
    if origin is tuple:
        return "a pair [" + ", ".join(words) + "]"
    return f"a mapping from {words[0]} to {words[1]}" if origin is dict else _WORDS.get(annotation, "a section")


def _bounds(metadata: Any) -> str:
    texts = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            texts.append(_bounds(item.metadata).strip())
        elif isinstance(item, annotated_types.Gt):
            texts.append(f"above {item.gt}")
        elif isinstance(item, annotated_types.Ge):
            texts.append(f"at least {item.ge}")
        elif isinstance(item, annotated_types.Lt):
            texts.append(f"below {item.lt}")
        elif isinstance(item, annotated_types.Le):
            texts.append(f"at most {item.le}")
        elif pattern := getattr(item, "pattern", None):
            texts.append(f"matching {pattern}")
    words = " and ".join(text for text in texts if text)
    return f" {words}" if words else ""


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the recipe, for editors."""
    schema = Recipe.model_json_schema()
    sections: Any = functools.reduce(operator.or_, (method.section for method in METHODS.values()))
    union: Any = Annotated[sections, Field(discriminator="method")]
    adapter = TypeAdapter(union).json_schema(ref_template="#/$defs/{model}")
    schema["$defs"] |= adapter.pop("$defs")
    schema["properties"]["adapter"] |= adapter
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "peftkit recipe"}
    return title | {key: value for key, value in schema.items() if key != "title"}
