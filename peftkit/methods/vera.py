"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454): W + diag(b) B diag(d) A; B, A random and shared by layers, b, d trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, Share


class VeraSection(Section):
    """`adapter:` with `method: vera`. Field names, meanings and defaults are those of `peft.VeraConfig`."""

    method: Literal["vera"] = Field("vera", description="VeRA: trained vectors scale random matrices that all layers share.")
    r: PositiveInt = Field(256, description="Rank of the shared matrices; much higher than LoRA's.")
    target_modules: TargetModules = None
    projection_prng_key: NonNegativeInt = Field(0, description="Seed of the shared matrices.")
    save_projection: bool = Field(
        True, description="Save the shared matrices too: a larger file that does not depend on torch's random numbers."
    )
    vera_dropout: Share = Field(0.0, description="Dropout before the update, as a probability.")
    d_initial: PositiveFloat = Field(0.1, description="Value that the vector d starts with; 0.1 or less is usual.")
    bias: Literal["none", "all", "vera_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None
    init_weights: bool = Field(True, description="Start as the base model; false starts with a random update.")
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None


def _check(section: VeraSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if not section.init_weights and section.d_initial != VeraSection.model_fields["d_initial"].default:
        yield "d_initial", "has no effect with `init_weights: false`"


VERA = Method(
    name="vera",
    summary="Trained vectors around random matrices that all layers share (Kopiczko et al. 2023)",
    section=VeraSection,
    kind="weights",
    peft_config="VeraConfig",
    targets="query_value",
    other_layers=("hqq",),
    learning_rate=1e-3,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 35.4% at 1e-3",
    left_out={"fan_in_fan_out": "PEFT finds it out by itself"},
    check=_check,
    to_lora=True,
)
