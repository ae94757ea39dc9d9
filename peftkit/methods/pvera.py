"""PVeRA (Fillioux et al. 2025, arXiv:2512.07703): W x + b * B z, z normal with mean and log-variance d * A x."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, Share


class PveraSection(Section):
    """`adapter:` with `method: pvera`. Field names, meanings and defaults are those of `peft.PveraConfig`."""

    method: Literal["pvera"] = Field("pvera", description="PVeRA: VeRA whose inner activations are sampled in training.")
    r: PositiveInt = Field(256, description="Rank of the shared matrices; much higher than LoRA's.")
    target_modules: TargetModules = None
    projection_prng_key: NonNegativeInt = Field(0, description="Seed of the shared matrices.")
    save_projection: bool = Field(
        True, description="Save the shared matrices too: a larger file that does not depend on torch's random numbers."
    )
    pvera_dropout: Share = Field(0.0, description="Dropout before the update, as a probability.")
    d_initial: PositiveFloat = Field(0.1, description="Value that the vector d starts with; 0.1 or less is usual.")
    bias: Literal["none", "all", "pvera_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None
    init_weights: bool = Field(True, description="Start as the base model; false starts with a random update.")
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None


def _check(section: PveraSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if not section.init_weights and section.d_initial != PveraSection.model_fields["d_initial"].default:
        yield "d_initial", "has no effect with `init_weights: false`"


PVERA = Method(
    name="pvera",
    summary="VeRA with sampled inner activations (Fillioux et al. 2025)",
    section=PveraSection,
    kind="weights",
    peft_config="PveraConfig",
    targets="query_value",
    other_layers=("torchao",),
    learning_rate=3e-3,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 35.3% at 3e-3, 35.6% with r 64",
    left_out={
        "fan_in_fan_out": "PEFT finds it out by itself",
        "sample_at_inference": "answers would differ from call to call, which no certificate can prove",
        "generator_seed": "the run's seed; generators of its own would not resume",
    },
    check=_check,
)
