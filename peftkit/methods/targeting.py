"""What is wrong with a choice of modules and layers, for all methods whose section has such fields; sizes that would fit."""

from __future__ import annotations

import math
from collections.abc import Iterator

from peftkit.section import Section


def check_targets(section: Section) -> Iterator[tuple[str, str]]:
    """Yields (field, sentence), like `Method.check`; fields that the section does not have are passed over."""
    targets, layers, pattern = (
        getattr(section, name, None) for name in ("target_modules", "layers_to_transform", "layers_pattern")
    )
    if targets == []:
        yield "target_modules", "is an empty list: nothing would be adapted; `method: head` trains the head alone"
    if pattern is not None and layers is None:
        yield "layers_pattern", "has no effect without `layers_to_transform`"
    if layers == []:
        yield "layers_to_transform", "is an empty list, which PEFT takes for all layers; leave it out"
    if layers is not None and isinstance(targets, str):
        yield "layers_to_transform", "works only with a list of `target_modules`, not with a regular expression or `all-linear`"


def divisors_text(number: int, near: int, *, least: int = 1, most: int | None = None, step: int = 1, limit: int = 4) -> str:
    """Divisors of a number, those nearest to a value (by ratio), the largest first: `64, 32, 16`; `none` where there is none.

    Args:
        number: what they divide.
        near: the value that does not.
        least: the smallest one allowed.
        most: the largest one allowed; default: the number.
        step: what they must be multiples of.
        limit: how many at most.
    """
    most = number if most is None else most
    fit = [divisor for divisor in range(least, most + 1) if number % divisor == 0 and divisor % step == 0]
    nearest = sorted(fit, key=lambda divisor: max(divisor / near, near / divisor))[:limit]
    return ", ".join(map(str, sorted(nearest, reverse=True))) or "none"


def check_divides_both(name: str, value: int, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    """Yields (field, sentence), like `Method.fits`, for a field that must divide both sides of a layer."""
    common = math.gcd(inputs, outputs)
    if common % value:
        yield name, f"is {value}, which does not divide the inputs and the outputs; {divisors_text(common, value)} would"
