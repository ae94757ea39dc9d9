"""Commands that look things up."""

from __future__ import annotations

from typing import Annotated

import typer

from peftkit.cli import completion
from peftkit.cli.options import AsJson


def methods(
    name: Annotated[str | None, typer.Argument(help="One method.", autocompletion=completion.method_names)] = None,
    as_json: AsJson = False,
) -> None:
    """List the adapter methods, or the fields of one."""
    from peftkit.commands import reference

    reference.list_methods(name, as_json)


def explain(
    key: Annotated[str, typer.Argument(help="A key, such as training.batch_size.", autocompletion=completion.recipe_keys)],
    as_json: AsJson = False,
) -> None:
    """Explain one key of the recipe."""
    from peftkit.commands import reference

    reference.explain(key, as_json)


def schema() -> None:
    """Print the JSON Schema of the recipe, for editors."""
    from peftkit import console
    from peftkit.recipe.explain import json_schema

    console.print_json(json_schema())


def doctor(as_json: AsJson = False) -> None:
    """Tell what is installed, try what works on this machine, and name what mends the rest."""
    from peftkit import console
    from peftkit.commands import doctor as command

    found = command.doctor()
    console.print_json(command.facts_of(found)) if as_json else command.print_findings(found)
    command.require_sound(found)
