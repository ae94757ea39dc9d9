"""The draft of a recipe as YAML, in the order of the schema, with comments that say where each value is from."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from peftkit.migration.base import Draft, Entry
from peftkit.migration.ours import fields_of
from peftkit.recipe.schema import Recipe
from peftkit.recipe.yaml_file import parse_scalar

_WIDTH = 116
# Texts of several lines that a literal block holds as they are: plain ASCII, no space at an end of a line.
_BLOCK = re.compile(r"(?!\s)(?:[ -~\n](?<! \n))*\n(?:[ -~\n](?<! \n))*(?<!\s)")
_OLD_WORDS = ("yes", "no", "on", "off", "y", "n")  # which YAML 1.1 takes for true and false
_PLAIN = re.compile(r"[A-Za-z_./~][\w./+\-]*(\.[\w]+)*")


def recipe_text(draft: Draft, command: str) -> str:
    """The text of the recipe.

    Args:
        draft: what goes into it.
        command: the command that trains it.
    """
    title = (
        f"From {draft.config.path.name} ({draft.tool.title}), by `peftkit migrate`. A key without comment has its name there."
    )
    lines = [*_comment(title, ""), f"# {command}", *_left_out(draft)]
    for section in Recipe.model_fields:
        if section in draft.entries:
            lines += _entry(section, draft.entries[section], "")
        inner = [key for key in draft.entries if key.startswith(f"{section}.")]
        if inner:
            lines.append(f"{section}:")
            order = [f"{section}.{name}" for name in fields_of(section, draft.value("adapter.method"))]
            for key in sorted(inner, key=lambda key: order.index(key) if key in order else len(order)):
                lines += _entry(key.partition(".")[2], draft.entries[key], "  ")
    return "\n".join(lines) + "\n"


def _left_out(draft: Draft) -> Iterator[str]:
    notes = [note for note in draft.notes.values() if note.outcome in ("no_equal", "unknown")]
    if notes:
        yield "# Not taken over:"
    for note in notes:
        yield from _comment(f"- {note.key}: {note.why}", "", "    ")


def _entry(name: str, entry: Entry, indent: str) -> Iterator[str]:
    lines = list(_lines(name, entry.value, indent))
    keys = ", ".join(key for key in entry.keys if entry.why or key != name or len(entry.keys) > 1)
    comment = _one_line(": ".join(part for part in (keys, entry.why) if part))
    if comment and len(lines[0]) + len(comment) <= _WIDTH:
        lines[0] += f"    # {comment}"
    elif comment:
        yield from _comment(comment, indent)
    yield from lines


def _one_line(text: str) -> str:
    """A text in a comment: what stands in their values must not end the line."""
    return " ".join("".join(mark if mark.isprintable() else " " for mark in text).split())


def _comment(text: str, indent: str, hanging: str = "") -> list[str]:
    return textwrap.wrap(
        _one_line(text), _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# {hanging}", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _lines(name: str, value: Any, indent: str) -> Iterator[str]:
    """A key and its value: on one line where there is room."""
    line = f"{indent}{name}: {_flow(value)}"
    if isinstance(value, str) and _BLOCK.fullmatch(value):
        yield f"{indent}{name}: |-"
        yield from (f"{indent}  {part}".rstrip() for part in value.split("\n"))
    elif len(line) <= _WIDTH or not isinstance(value, dict | list):
        yield line
    elif isinstance(value, dict):
        yield f"{indent}{name}:"
        for key, inner in value.items():
            yield from _lines(_key(key), inner, f"{indent}  ")
    else:
        yield f"{indent}{name}:"
        for item in value:
            yield from _item(item, f"{indent}  ")


def _item(value: Any, indent: str) -> Iterator[str]:
    line = f"{indent}- {_flow(value)}"
    if len(line) <= _WIDTH or not isinstance(value, dict):
        yield line
        return
    lines = [line for key, inner in value.items() for line in _lines(_key(key), inner, f"{indent}  ")]
    yield f"{indent}- {lines[0].lstrip()}"
    yield from lines[1:]


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _key(value) if isinstance(value, str) else json.dumps(value)


def _key(value: Any) -> str:
    """A text, in quotes where YAML would read it as something else."""
    text = str(value)
    is_plain = _PLAIN.fullmatch(text) and isinstance(parse_scalar(text), str) and text.lower() not in _OLD_WORDS
    if is_plain:
        return text
    # JSON leaves some marks as they are that YAML takes for the end of a line, or refuses.
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(mark if mark.isprintable() else f"\\U{ord(mark):08x}" for mark in quoted)
