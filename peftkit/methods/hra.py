"""HRA (Yuan et al. 2024, arXiv:2405.17484): W prod_i (I - 2 u_i u_i^T), r Householder reflections; unit vectors u_i trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ExcludeModules, LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import PositiveInt, Section


class HraSection(Section):
    """`adapter:` with `method: hra`. Field names, meanings and defaults are those of `peft.HRAConfig`."""

    method: Literal["hra"] = Field("hra", description="HRA: weights are reflected by a chain of Householder reflections.")
    r: PositiveInt = Field(8, description="Number of reflections, an even number: they start in pairs that cancel out.")
    apply_GS: bool = Field(False, description="Make the vectors orthogonal to each other (Gram-Schmidt).")  # noqa: N815
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    init_weights: bool = Field(True, description="Start as the base model; false starts with random reflections.")
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    bias: Literal["none", "all", "hra_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None


def _check(section: HraSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.init_weights and section.r % 2:
        yield "r", f"must be even, so that training starts from the base model; it is {section.r}"
    if section.init_weights and section.apply_GS:
        # PEFT makes the second vector of each pair orthogonal to its copy: what is left of it is rounding noise.
        yield (
            "apply_GS",
            "cannot start from the base model, whose pairs of equal vectors have no orthogonal form; set `init_weights: false`",
        )


def _fits(section: HraSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    if section.apply_GS and section.r > inputs:
        yield "r", f"is {section.r}, and so many vectors of {inputs} numbers cannot be orthogonal; at most {inputs}"


HRA = Method(
    name="hra",
    summary="Chains of trained Householder reflections (Yuan et al. 2024)",
    section=HraSection,
    kind="weights",
    peft_config="HRAConfig",
    quantizations=(),
    why_not_quantized="it multiplies the weights, and PEFT hands it the quantised codes",
    targets="query_value",
    linear_only=True,
    size_fields=("r",),
    learning_rate=1e-3,
    learning_rate_source="the authors' scripts (DaShenZi721/HRA) have 1e-5 for Llama-2-7B and 6e-3 for SST-2; ours, 60 steps "
    "of a 5M-parameter Llama: loss 5.44 to 5.39 at 1e-4, to 5.12 at 1e-3, to 4.46 at 6e-3",
    task_learning_rates={
        "SEQ_CLS": (6e-3, "the authors' script for SST-2 with DeBERTaV3 (DaShenZi721/HRA)"),
    },
    check=_check,
    fits=_fits,
)
