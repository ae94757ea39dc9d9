"""ShadowPEFT (Li et al. 2026, arXiv:2604.19254): a small model s runs beside the base; layers get h + alpha (h - s) A B."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ExcludeModules, ModulesToSave, TargetModules
from peftkit.methods.targeting import check_targets
from peftkit.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section, Share


class ShadowSection(Section):
    """`adapter:` with `method: shadow`. Field names, meanings and defaults are those of `peft.ShadowConfig`."""

    method: Literal["shadow"] = Field("shadow", description="ShadowPEFT: a small trained model beside the frozen one.")
    target_modules: TargetModules = Field(
        None, description="Whole layers, next to one another: names or a regular expression. Default: all layers."
    )
    exclude_modules: ExcludeModules = None
    r: PositiveInt = Field(8, description="Rank of the correction of a layer's input.")
    shadow_alpha: PositiveFloat = Field(0.1, description="Scale of that correction.")
    shadow_dropout: Share = Field(0.2, description="Dropout before it, as a probability.")
    init_weights: bool = Field(True, description="Start as the base model; false starts with random corrections.")
    shadow_model: str = Field(
        "mirror",
        min_length=1,
        description="The small model: mirror (new, shaped like the base), or a hub id or folder of a trained one.",
    )
    shadow_num_hidden_layers: PositiveInt | None = Field(None, description="Layers of a mirror; default: 1.")
    shadow_hidden_size: PositiveInt | None = Field(None, description="Width of a mirror; default: the base model's.")
    shadow_num_attention_heads: PositiveInt | None = Field(None, description="Heads of a mirror; default: the base model's.")
    shadow_intermediate_size: PositiveInt | None = Field(
        None, description="Width of a mirror's feed-forward layers; default: the base model's."
    )
    share_embeddings: bool = Field(
        True, description="Feed the base model's frozen embeddings to a mirror of its width; false trains own ones (large)."
    )
    update_hidden_size: PositiveInt | None = Field(
        None, description="Width of the networks that carry the small model's state from layer to layer; default: r."
    )
    auxiliary_loss_weight: NonNegativeFloat = Field(
        0.05, description="Weight of the small model's own loss (CAUSAL_LM and SEQ_CLS); 0 leaves it out."
    )
    modules_to_save: ModulesToSave = None


_OF_A_MIRROR = (
    "shadow_num_hidden_layers",
    "shadow_hidden_size",
    "shadow_num_attention_heads",
    "shadow_intermediate_size",
    "share_embeddings",
)


def _check(section: ShadowSection) -> Iterator[tuple[str, str]]:
    yield from check_targets(section)
    if section.target_modules == "all-linear":
        yield "target_modules", "`all-linear` names linear layers; here it must name whole layers, such as `.*\\.layers\\.\\d+`"
    for name in _OF_A_MIRROR if section.shadow_model != "mirror" else ():
        if getattr(section, name) != ShadowSection.model_fields[name].default:
            yield name, f"belongs to `shadow_model: mirror`; `{section.shadow_model}` has its own shape"
    widths = (section.shadow_hidden_size, section.shadow_num_attention_heads)
    if widths[0] is not None and widths[1] is not None and widths[0] % widths[1]:
        yield (
            "shadow_hidden_size",
            f"must be a multiple of `shadow_num_attention_heads`, which is {widths[1]}; it is {widths[0]}",
        )


SHADOW = Method(
    name="shadow",
    summary="A small trained model beside the frozen one, which corrects every layer's input (Li et al. 2026)",
    section=ShadowSection,
    kind="weights",
    peft_config="ShadowConfig",
    model_kinds=("decoder",),
    why_not="it rides along a decoder's stack of layers, and its small model is a decoder",
    not_mergeable="its corrections depend on the input, so no weights amount to them",
    not_one_graph="its second stack of layers has a cache of its own, for which clients have no inputs",
    other_layers=("torchao", "hqq"),
    learning_rate=1e-3,
    learning_rate_source="ours, one seed: 80 steps of a 5.4M-parameter Llama on answers in capitals, held-out loss "
    "from 4.22 to 3.84 at 3e-4, 3.39 at 1e-3, 3.00 at 3e-3; below the best, since larger bases were not tried",
    left_out={
        "layers_to_transform": "PEFT ignores it, or finds no layer at all; name the layers in target_modules",
        "layers_pattern": "goes with layers_to_transform",
    },
    check=_check,
    runtime_module="peftkit.methods.shadow_torch",
    skips_parameters=lambda section: True,
)
