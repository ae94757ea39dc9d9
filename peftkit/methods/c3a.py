"""C3A (Chen et al. 2024, arXiv:2407.19342): W + C / d_in, with C made of circulant blocks, each from one trained vector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_divides_both, check_targets
from peftkit.section import PositiveInt, Section


class C3ASection(Section):
    """`adapter:` with `method: c3a`. Field names, meanings and defaults are those of `peft.C3AConfig`."""

    method: Literal["c3a"] = Field("c3a", description="C3A: block-circulant updates, computed by fast Fourier transform.")
    block_size: PositiveInt = Field(
        256, description="Side of a block; divides the input and the output features. Larger blocks mean fewer parameters."
    )
    target_modules: TargetModules = None
    bias: Literal["none", "all", "c3a_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None
    block_size_pattern: dict[str, PositiveInt] = Field(
        {}, description="Block size by module name or regular expression, where it is not block_size."
    )
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = Field(
        "xavier_uniform", description="How the vectors start: true means zeros (the base model), false means xavier_uniform."
    )


def _fits(section: C3ASection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    return check_divides_both("block_size", section.block_size, inputs, outputs)


C3A = Method(
    name="c3a",
    summary="Block-circulant updates (circular convolutions) of linear layers (Chen et al. 2024)",
    section=C3ASection,
    kind="weights",
    peft_config="C3AConfig",
    targets="query_value",
    linear_only=True,
    other_layers=("torchao",),
    learning_rate=0.3,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 48.7% at 0.3",
    check=check_targets,
    fits=_fits,
    to_lora=True,
)
