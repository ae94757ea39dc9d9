"""The base of every part of a recipe, and the kinds of numbers that its fields take."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A part of a recipe: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    return value


# Pydantic's own types of these names read `r: true` as 1.
Number = Annotated[float, BeforeValidator(_no_bool)]
PositiveInt = Annotated[int, Field(gt=0), BeforeValidator(_no_bool)]
PositiveFloat = Annotated[float, Field(gt=0), BeforeValidator(_no_bool)]
NonNegativeInt = Annotated[int, Field(ge=0), BeforeValidator(_no_bool)]
NonNegativeFloat = Annotated[float, Field(ge=0), BeforeValidator(_no_bool)]
Share = Annotated[float, Field(ge=0.0, lt=1.0), BeforeValidator(_no_bool)]
