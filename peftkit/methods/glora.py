"""GLoRA (Chavan et al. 2023, arXiv:2306.07967): weight W + W o A + B, bias b + b o D + E + W C; A to E are low-rank or less."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import PositiveInt, Section


class GloraSection(Section):
    """`adapter:` with `method: glora`. Field names, meanings and defaults are those of `peft.GloraConfig`."""

    method: Literal["glora"] = Field("glora", description="GLoRA: weights and biases are scaled, shifted and mixed.")
    r: PositiveInt = Field(8, description="Rank of the terms that are `lora`.")
    target_modules: TargetModules = None
    bias: Literal["none", "all", "glora_only"] = Field("none", description="Biases of the base model to train as well.")
    modules_to_save: ModulesToSave = None
    config_A_B: Literal["lora", "vector", "constant", "none"] = Field(  # noqa: N815
        "lora", description="Form of A and B: low-rank, a factor per output feature, one number, or left out."
    )
    config_C: Literal["lora", "vector", "none"] = Field(  # noqa: N815
        "lora", description="Form of C; only layers with a bias have it."
    )
    config_D_E: Literal["vector", "constant", "none"] = Field(  # noqa: N815
        "constant", description="Form of D and E; only layers with a bias have them."
    )
    init_weights: bool = Field(True, description="Start as the base model; false starts with random changes.")


def _check(section: GloraSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if {section.config_A_B, section.config_C, section.config_D_E} == {"none"}:
        yield "config_A_B", "is `none`, and `config_C` and `config_D_E` are too: nothing would be trained"
    if "lora" not in (section.config_A_B, section.config_C) and section.r != GloraSection.model_fields["r"].default:
        yield "r", "has no effect where neither `config_A_B` nor `config_C` is `lora`"


GLORA = Method(
    name="glora",
    summary="Low-rank scales and shifts of weights and biases (Chavan et al. 2023)",
    section=GloraSection,
    kind="weights",
    peft_config="GloraConfig",
    quantizations=(),
    why_not_quantized="PEFT puts it on plain linear layers only",
    mixed_batches=True,
    targets="query_value",
    linear_only=True,
    size_fields=("r",),
    learning_rate=1e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 41.8% at 1e-4",
    check=_check,
)
