"""FRoD (AAAI 2026, doi:10.1609/aaai.v40i31.39813): U (S + diag(l)) V^T, V shared by layers; sparse S and l trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import NonNegativeInt, Number, PositiveFloat, Section, Share


class FrodSection(Section):
    """`adapter:` with `method: frod`. Field names, meanings and defaults are those of `peft.FrodConfig`."""

    method: Literal["frod"] = Field("frod", description="FRoD: scales and sparse rotations in a basis that layers share.")
    target_modules: TargetModules = None
    projection_prng_key: NonNegativeInt = Field(0, description="Seed of the places of the sparse entries.")
    save_projection: bool = Field(
        True, description="Save the basis too: a much larger file that does not depend on repeating the decomposition."
    )
    frod_dropout: Share = Field(0.0, description="Dropout before the update, as a probability.")
    bias: Literal["none", "all", "frod_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None
    init_weights: bool = Field(True, description="Start as the base model; false starts with random changes.")
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    sparse_rate: Annotated[Number, Field(ge=0.0, le=1.0)] = Field(
        0.01, description="Share of the off-diagonal entries that are trained, of input features squared per module."
    )
    regularization_alpha: PositiveFloat = Field(
        1e-3, description="Ridge that keeps the inverse stable while the basis is built."
    )
    progressbar: bool = Field(False, description="Show PEFT's own progress bar while the basis is built.")


def _shapes(section: FrodSection, inputs: int, outputs: int, bias: bool) -> list[tuple[int, ...]]:
    off_diagonal = min(int(inputs * inputs * section.sparse_rate), inputs * inputs - inputs)
    return [(inputs,), (max(1, off_diagonal) if section.sparse_rate else 0,)]


def _fits(section: FrodSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    if section.sparse_rate and int(inputs * inputs * section.sparse_rate) == 0:
        least = f"PEFT would train one all the same; at least {1 / inputs**2:.2g}, or 0"
        yield "sparse_rate", f"is {section.sparse_rate}, less than one of {inputs} x {inputs} entries, and {least}"


FROD = Method(
    name="frod",
    summary="Scales and sparse rotations in a full-rank basis that layers share (FRoD, AAAI 2026)",
    section=FrodSection,
    kind="weights",
    peft_config="FrodConfig",
    quantizations=(),
    why_not_quantized="it decomposes the weights and trains the factors",
    targets="query_value",
    not_compilable="torch.compile breaks off in its layers",
    learning_rate=1e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 50.9% at 1e-4; "
    "27.1% at 1e-3 with sparse_rate 0.02",
    left_out={
        "fan_in_fan_out": "PEFT finds it out by itself",
        "runtime_offload_base_weight": "where the base weights lie while training is not part of the adapter",
    },
    other_defaults={"progressbar": "only our console prints"},
    check=check_targets,
    fits=_fits,
    weight_copies=2,
    trained_shapes=_shapes,
)
