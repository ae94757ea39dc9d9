"""Jinja texts over the columns of a row, which cannot reach anything else."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The text is taken as written: a line break at its end stays, and `null` is never the word None.
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_text)


def _text(value: Any) -> Any:
    from jinja2 import UndefinedError

    if value is None:
        raise UndefinedError("a value is null; `{{ name or '' }}` would make it the empty text")
    return value


@lru_cache(maxsize=256)
def compile_template(text: str) -> Template:
    """The template, compiled once.

    Raises:
        jinja2.TemplateSyntaxError: it does not parse.
    """
    template: Template = _environment().from_string(text)
    return template


def template_fault(text: str) -> str | None:
    """Why a template does not parse; None where it does."""
    from jinja2 import TemplateSyntaxError

    try:
        compile_template(text)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None
