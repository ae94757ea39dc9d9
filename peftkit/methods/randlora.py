"""RandLoRA (Albert et al. 2025, arXiv:2502.00987): W + alpha / r * sum_j B_j L_j A G_j; B, A random, diagonals L, G trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, Share


class RandLoraSection(Section):
    """`adapter:` with `method: randlora`. Field names, meanings and defaults are those of `peft.RandLoraConfig`."""

    method: Literal["randlora"] = Field("randlora", description="RandLoRA: a full-rank sum of random low-rank bases.")
    r: PositiveInt = Field(32, description="Rank of one random basis; a smaller one means more bases and more parameters.")
    target_modules: TargetModules = None
    projection_prng_key: NonNegativeInt = Field(0, description="Seed of the random bases.")
    save_projection: bool = Field(
        True, description="Save the bases too: a much larger file that does not depend on torch's random numbers."
    )
    sparse: bool = Field(False, description="Bases of -1, 0 and 1, with two thirds zeros.")
    very_sparse: bool = Field(False, description="Bases of -1, 0 and 1, with a share of 1 - 2 / sqrt(d) zeros or less.")
    randlora_dropout: Share = Field(0.0, description="Dropout before the update, as a probability.")
    randlora_alpha: PositiveFloat = Field(
        640, description="Scale: the update is multiplied by randlora_alpha / r; 20 times r is usual."
    )
    bias: Literal["none", "all", "randlora_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None
    init_weights: bool = Field(True, description="Start as the base model; false starts with a random update.")
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None


def _check(section: RandLoraSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.sparse and section.very_sparse:
        yield "sparse", "has no effect with `very_sparse`"


RANDLORA = Method(
    name="randlora",
    summary="Full-rank sum of random low-rank bases with trained diagonals (Albert et al. 2025)",
    section=RandLoraSection,
    kind="weights",
    peft_config="RandLoraConfig",
    targets="query_value",
    other_layers=("torchao",),
    learning_rate=1e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 47.8% at 1e-4",
    left_out={"fan_in_fan_out": "PEFT finds it out by itself"},
    check=_check,
    to_lora=True,
)
