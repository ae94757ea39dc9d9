"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190): attention over [P_k; K], [P_v; V], with trained P in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ModulesToSave, VirtualTokens
from peftkit.methods.prompts import ENCODER_ALONE, NO_CACHE, NO_WEIGHTS, SET_FROM_MODEL, TWENTY_TOKENS
from peftkit.section import PositiveInt, Section


class PrefixTuningSection(Section):
    """`adapter:` with `method: prefix_tuning`. Fields are those of `peft.PrefixTuningConfig`, and `init_text`."""

    method: Literal["prefix_tuning"] = Field(
        "prefix_tuning", description="Prefix tuning: trained keys and values in front of every layer's own."
    )
    num_virtual_tokens: VirtualTokens = 20
    init_weights: Literal["zero"] | None = Field(
        None,
        description="zero: keys and values start at zero (but take some attention already); default: standard normal values.",
    )
    init_text: str | None = Field(
        None,
        min_length=1,
        description="Text whose keys and values the prefix starts from: those of its first num_virtual_tokens tokens "
        "(it needs as many). Decoders only.",
    )
    prefix_projection: bool = Field(
        False, description="Compute keys and values by a two-layer network from one embedding per token; many more parameters."
    )
    encoder_hidden_size: PositiveInt | None = Field(None, description="Width of that network; default: that of a layer's keys.")
    modules_to_save: ModulesToSave = None


def _check(section: PrefixTuningSection) -> Iterator[tuple[str, str]]:
    if section.encoder_hidden_size is not None and not section.prefix_projection:
        yield "encoder_hidden_size", "has no effect without `prefix_projection`"
    if section.init_text is not None and section.prefix_projection:
        yield (
            "init_text",
            "cannot be combined with `prefix_projection`: no embeddings are known that give these keys and values",
        )
    if section.init_text is not None and section.init_weights is not None:
        yield "init_weights", "has no effect with `init_text`"


PREFIX_TUNING = Method(
    name="prefix_tuning",
    summary="Trained keys and values in front of every layer's own (Li and Liang 2021)",
    section=PrefixTuningSection,
    kind="prompt",
    virtual_tokens_in="keys_and_values",
    peft_config="PrefixTuningConfig",
    without=ENCODER_ALONE,
    why_not=NO_CACHE,
    not_mergeable=NO_WEIGHTS,
    virtual_tokens=lambda section: section.num_virtual_tokens,
    size_fields=("num_virtual_tokens",),
    learning_rate=5e-3,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 18.6% at 1e-3, 35.8% at 5e-3 with "
    "`init_weights: zero`, 41.6% at 5e-3 from a text",
    task_learning_rates={"SEQ_CLS": (3e-2, "ours: all-MiniLM-L6-v2 on sentence polarity, benchmarks/README.md")},
    left_out=SET_FROM_MODEL,
    own_fields={"init_text": "goes through the model before training; its keys and values fill the prefix"},
    other_defaults=TWENTY_TOKENS,
    check=_check,
    runtime_module="peftkit.methods.prefix_torch",
)
