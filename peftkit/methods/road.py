"""RoAd (Liao et al. 2024, arXiv:2409.00119): y = R (W x + b), with R made of scaled 2-D rotations of pairs of outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets, divisors_text
from peftkit.section import PositiveInt, Section


class RoadSection(Section):
    """`adapter:` with `method: road`. Field names, meanings and defaults are those of `peft.RoadConfig`."""

    method: Literal["road"] = Field("road", description="RoAd: 2-D rotations of the outputs of linear layers.")
    variant: Literal["road_1", "road_2", "road_4"] = Field(
        "road_1",
        description="Angles and scales per pair of outputs: 1 of each, 2 (one per output) or 4 (one per matrix entry).",
    )
    group_size: PositiveInt = Field(
        64, description="Outputs in a group, whose halves are paired; even, and a divisor of the output features."
    )
    init_weights: bool = Field(True, description="Start as the base model; false starts with random rotations.")
    target_modules: TargetModules = None
    modules_to_save: ModulesToSave = None


def _check(section: RoadSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.group_size % 2:
        yield "group_size", f"must be even, it is {section.group_size}: the halves of a group are paired"


def _fits(section: RoadSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    size = section.group_size
    if outputs % size:
        would = divisors_text(outputs, size, step=2)
        yield "group_size", f"is {size}, which does not divide the outputs; {would} would"


ROAD = Method(
    name="road",
    summary="2-D rotations and scales of the outputs (Liao et al. 2024); rows of one batch can use different adapters",
    section=RoadSection,
    kind="weights",
    peft_config="RoadConfig",
    mixed_batches=True,
    targets="query_value",
    linear_only=True,
    other_layers=("torchao",),
    learning_rate=1e-3,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 38.5% at 1e-3",
    check=_check,
    fits=_fits,
)
