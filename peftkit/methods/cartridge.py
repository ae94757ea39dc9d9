"""Cartridges (Eyuboglu et al. 2025, arXiv:2506.06266): attention over [P_k; K], [P_v; V], with trained P but for its start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ModulesToSave, VirtualTokens
from peftkit.methods.prompts import ENCODER_ALONE, NO_CACHE, NO_WEIGHTS, SET_FROM_MODEL, TWENTY_TOKENS
from peftkit.section import NonNegativeInt, Section


class CartridgeSection(Section):
    """`adapter:` with `method: cartridge`. Fields are those of `peft.CartridgeConfig`, and `init_text`."""

    method: Literal["cartridge"] = Field("cartridge", description="Cartridge: a trained cache that stands for a long text.")
    num_virtual_tokens: VirtualTokens = 20
    num_frozen_tokens: NonNegativeInt = Field(
        1, description="Tokens at its start that stay as they are; 1 spares the first, on which much attention falls."
    )
    init_text: str | None = Field(
        None,
        min_length=1,
        description="Text whose keys and values the prefix starts from: those of its first num_virtual_tokens tokens "
        "(it needs as many). Default: random ones. Decoders only.",
    )
    modules_to_save: ModulesToSave = None


def _check(section: CartridgeSection) -> Iterator[tuple[str, str]]:
    if section.num_frozen_tokens >= section.num_virtual_tokens:
        yield (
            "num_frozen_tokens",
            f"must be below `num_virtual_tokens`, which is {section.num_virtual_tokens}: nothing is trained",
        )


CARTRIDGE = Method(
    name="cartridge",
    summary="A trained cache of keys and values that stands for a long text (Eyuboglu et al. 2025)",
    section=CartridgeSection,
    kind="prompt",
    virtual_tokens_in="keys_and_values",
    peft_config="CartridgeConfig",
    without=ENCODER_ALONE,
    why_not=NO_CACHE,
    not_mergeable=NO_WEIGHTS,
    virtual_tokens=lambda section: section.num_virtual_tokens,
    size_fields=("num_virtual_tokens",),
    learning_rate=5e-3,
    learning_rate_source="as for prefix_tuning, whose parameters are the same but for the frozen ones",
    task_learning_rates={"SEQ_CLS": (3e-2, "as for prefix_tuning, whose parameters are the same but for the frozen ones")},
    left_out=SET_FROM_MODEL,
    own_fields={"init_text": "goes through the model before training; its keys and values fill the prefix"},
    other_defaults=TWENTY_TOKENS,
    check=_check,
    runtime_module="peftkit.methods.prefix_torch",
)
