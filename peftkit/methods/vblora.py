"""VB-LoRA (Li et al. 2024, arXiv:2405.15179): W + B A, whose parts are softmax mixtures of k vectors of a shared bank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ExcludeModules, LayersPattern, LayersToTransform, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_divides_both, check_targets
from peftkit.section import PositiveFloat, PositiveInt, Section, Share


class VBLoraSection(Section):
    """`adapter:` with `method: vblora`. Field names, meanings and defaults are those of `peft.VBLoRAConfig`."""

    method: Literal["vblora"] = Field("vblora", description="VB-LoRA: low-rank updates put together from a bank of vectors.")
    r: PositiveInt = Field(4, description="Rank of the update.")
    num_vectors: Annotated[PositiveInt, Field(ge=2)] = Field(256, description="Vectors in the bank.")
    vector_length: PositiveInt = Field(256, description="Their length; divides the input and the output features.")
    topk: Annotated[PositiveInt, Field(ge=2)] = Field(
        2, description="Vectors that are mixed for each part, at least 2: with one there is no weight to train."
    )
    target_modules: TargetModules = None
    exclude_modules: ExcludeModules = None
    save_only_topk_weights: bool = Field(
        False, description="Save only the mixed vectors' weights: a much smaller adapter, which cannot be trained on."
    )
    vblora_dropout: Share = Field(0.0, description="Dropout before the update, as a probability.")
    bias: Literal["none", "all", "vblora_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None
    init_vector_bank_bound: PositiveFloat = Field(0.02, description="The bank starts uniform between minus and plus this.")
    init_logits_std: PositiveFloat = Field(0.1, description="Standard deviation of the mixing logits at the start.")
    layers_to_transform: LayersToTransform = None
    layers_pattern: LayersPattern = None


def _check(section: VBLoraSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.topk > section.num_vectors:
        yield "topk", f"must be at most `num_vectors` ({section.num_vectors}), it is {section.topk}"


def _fits(section: VBLoraSection, inputs: int, outputs: int) -> Iterator[tuple[str, str]]:
    return check_divides_both("vector_length", section.vector_length, inputs, outputs)


VBLORA = Method(
    name="vblora",
    summary="Low-rank updates put together from a shared bank of vectors (Li et al. 2024)",
    section=VBLoraSection,
    kind="weights",
    peft_config="VBLoRAConfig",
    targets="query_value",
    other_layers=("torchao",),
    not_compilable="torch.compile breaks off in its layers",
    size_fields=("num_vectors",),
    learning_rate=5e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 33.4% at 1e-4, "
    "40.1% at 5e-4 with 1024 vectors",
    left_out={"fan_in_fan_out": "PEFT finds it out by itself"},
    check=_check,
    fits=_fits,
    to_lora=True,
)
