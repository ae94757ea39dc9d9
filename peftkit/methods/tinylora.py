"""TinyLoRA (Morris et al. 2026, arXiv:2602.04118): W + B (sum_i v_i P_i) A; B, A from W's SVD, P random, only v trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import NonNegativeInt, Number, PositiveFloat, PositiveInt, Section, Share


class TinyLoraSection(Section):
    """`adapter:` with `method: tinylora`. Field names, meanings and defaults are those of `peft.TinyLoraConfig`."""

    method: Literal["tinylora"] = Field("tinylora", description="TinyLoRA: a handful of parameters per module, or for all.")
    r: PositiveInt = Field(2, description="Singular directions of the weight that the update moves between.")
    u: PositiveInt = Field(64, description="Trained parameters per module, or per group of modules (weight_tying).")
    weight_tying: Annotated[Number, Field(ge=0.0, le=1.0)] = Field(
        0.0, description="How far modules share their parameters: 0 not at all, 1 one vector for all."
    )
    projection_seed: NonNegativeInt = Field(42, description="Seed of the random projections.")
    save_projection: bool = Field(True, description="Save the projections too: a file that does not depend on random numbers.")
    init_v_bound: PositiveFloat = Field(0.02, description="Range of the start values with `init_weights: uniform`.")
    target_modules: TargetModules = None
    tinylora_dropout: Share = Field(0.0, description="Dropout before the update, as a probability.")
    bias: Literal["none", "all", "tinylora_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None
    # PEFT's false leaves the vector as whatever was in memory.
    init_weights: Literal[True, "uniform"] = Field(
        True, description="Start as the base model; uniform starts with random values within init_v_bound."
    )
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None


def _check(section: TinyLoraSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.init_v_bound != 0.02 and section.init_weights != "uniform":
        yield "init_v_bound", "has no effect without `init_weights: uniform`"


def _fits(section: TinyLoraSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    if section.r > (most := min(inputs, outputs)):
        yield "r", f"is {section.r}, more than the weight has singular directions, and PEFT would lower it; at most {most}"


TINYLORA = Method(
    name="tinylora",
    summary="A handful of trained parameters per module, or for the whole model (Morris et al. 2026)",
    section=TinyLoraSection,
    kind="weights",
    peft_config="TinyLoraConfig",
    quantizations=(),
    why_not_quantized="it takes the singular value decomposition of the weights",
    targets="query_value",
    not_compilable="each of its layers is another, and would be compiled for itself",
    size_fields=("u",),
    learning_rate=1e-2,
    learning_rate_source="ours, one seed: 80 steps of a 5.4M-parameter Llama on answers in capitals, held-out loss "
    "from 4.22 to 4.03 at 1e-3, 3.98 at 1e-2, 4.02 at 5e-2",
    left_out={"fan_in_fan_out": "PEFT finds it out by itself"},
    check=_check,
    fits=_fits,
    to_lora=True,
)
