"""Fields that most methods share, with the meaning that PEFT gives them, and a check that some do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import Field

from peftkit.section import NonNegativeInt, PositiveFloat, PositiveInt

TargetModules = Annotated[
    list[str] | str | None,
    Field(
        description="Modules to adapt: a list of names (suffixes), a regular expression over full names, or `all-linear`. "
        "Default: PEFT's table for the architecture, else found by inspection."
    ),
]
ExcludeModules = Annotated[list[str] | str | None, Field(description="Modules to leave alone: names or a regular expression.")]
ModulesToSave = Annotated[
    list[str] | None,
    Field(description="Modules to train and save whole. The head of the task is always among them."),
]
LayersToTransform = Annotated[
    list[NonNegativeInt] | NonNegativeInt | None, Field(description="Indices of the layers to adapt; the others stay.")
]
LayersPattern = Annotated[
    list[str] | str | None,
    Field(description="Name of the layer list, where it is not the usual `layers` or `h`; goes with layers_to_transform."),
]
RankPattern = Annotated[
    dict[str, PositiveInt], Field(description="Rank by module name or regular expression, where it is not r.")
]
AlphaPattern = Annotated[
    dict[str, PositiveFloat], Field(description="Alpha by module name or regular expression, where it differs.")
]
VirtualTokens = Annotated[PositiveInt, Field(description="Number of virtual tokens.")]


def check_adapters(adapters: Sequence[str], what: str) -> Iterator[tuple[str, str]]:
    """What is wrong with the trained adapters that a method builds on.

    Args:
        adapters: as the recipe names them.
        what: what they are, and what for.
    """
    if len(adapters) < 2:
        yield "adapters", f"must name at least 2 {what}, it names {len(adapters)}"
    if twice := sorted({name for name in adapters if adapters.count(name) > 1}):
        yield "adapters", f"names an adapter twice: {', '.join(twice)}"
