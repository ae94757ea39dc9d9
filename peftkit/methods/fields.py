"""Fields that most methods share, with the meaning that PEFT gives them."""

from __future__ import annotations

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
