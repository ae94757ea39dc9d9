"""Uni-LoRA (Li et al. 2025, arXiv:2506.00799): LoRA whose A and B, of all layers, are entries of one trained vector theta_d."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import NonNegativeInt, PositiveFloat, PositiveInt, Section, Share


class UniLoraSection(Section):
    """`adapter:` with `method: unilora`. Field names, meanings and defaults are those of `peft.UniLoraConfig`."""

    method: Literal["unilora"] = Field("unilora", description="Uni-LoRA: one trained vector fills the factors of all layers.")
    r: PositiveInt = Field(4, description="Rank of the update.")
    proj_seed: NonNegativeInt = Field(42, description="Seed of which entry of the vector goes where.")
    theta_d_length: PositiveInt = Field(
        256, description="Length of the vector: all trained parameters. The paper has tens of thousands and more."
    )
    target_modules: TargetModules = None
    unilora_dropout: Share = Field(0.0, description="Dropout before the update, as a probability.")
    bias: Literal["none", "all", "unilora_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None
    init_theta_d_bound: PositiveFloat = Field(0.02, description="The vector starts uniform between minus and plus this.")
    init_weights: bool = Field(
        True, description="Start like that, near the base model; false starts standard normal, far from it."
    )
    save_indices: bool = Field(
        False, description="Save where the entries go too: a larger file that does not depend on the seed."
    )
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None


def _check(section: UniLoraSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if not section.init_weights and section.init_theta_d_bound != UniLoraSection.model_fields["init_theta_d_bound"].default:
        yield "init_theta_d_bound", "has no effect with `init_weights: false`"


UNILORA = Method(
    name="unilora",
    summary="LoRA whose parameters, of all layers, come from one trained vector (Li et al. 2025)",
    section=UniLoraSection,
    kind="weights",
    peft_config="UniLoraConfig",
    quantizations=(),
    why_not_quantized="PEFT rounds the scales of its entries to whole numbers there, which makes its gradient zero",
    targets="query_value",
    size_fields=("theta_d_length",),
    learning_rate=2e-3,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 0.2% at 1e-4, "
    "40.8% at 2e-3 with theta_d_length 131072",
    left_out={"fan_in_fan_out": "PEFT finds it out by itself"},
    check=_check,
    trained_shapes=lambda section, inputs, outputs, bias: [],
    shared_shapes=lambda section: [(section.theta_d_length,)],
    to_lora=True,
)
