"""The columns of a row by the names that our formats have for them: renamed, and filled in by templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftkit.formats.base import RowError, columns_text
from peftkit.recipe.templates import compile_template


def computed_columns(
    row: Mapping[str, Any], columns: Mapping[str, str], template: Mapping[str, str], *, partial: bool = False
) -> dict[str, Any]:
    """A row with its columns renamed and those added that templates make of them.

    Args:
        row: a raw row.
        columns: our name -> the name in the row; dots lead inwards unless a column has that very name.
        template: our name -> Jinja text over the row and the renamed columns.
        partial: whether columns that are not there are left out (inference), with the templates that need them.

    Raises:
        RowError: a column is not there, or a template fails.
    """
    renamed = dict(row)
    for ours, theirs in columns.items():
        try:
            renamed[ours] = _value_at(row, theirs)
        except RowError:
            if not partial:
                raise
    filled = {name: _filled(name, text, renamed, partial) for name, text in template.items()}
    return renamed | {name: text for name, text in filled.items() if text is not None}


def _value_at(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            at = f" (nothing is at `{part}`)" if "." in name else ""
            raise RowError(f"no column `{name}`{at} (from `columns`); the row has {columns_text(row)}")
    return value


def _filled(name: str, text: str, row: Mapping[str, Any], partial: bool) -> str | None:
    """The text that a template gives for a row; None where `partial` allows a column to be missing."""
    from jinja2 import UndefinedError

    template = compile_template(text)
    try:
        return template.render(row)
    except UndefinedError as error:
        if partial:
            return None
        raise RowError(f"template `{name}`: {error.message}; the row has {columns_text(row)}") from error
    except Exception as error:  # a template computes: it can raise anything
        raise RowError(f"template `{name}` fails: {type(error).__name__}: {error}") from error
