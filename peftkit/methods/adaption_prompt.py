"""LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199): attention + g * attention over n trained tokens, gate g from 0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.section import PositiveInt, Section


class AdaptionPromptSection(Section):
    """`adapter:` with `method: adaption_prompt`. Field names and meanings are those of `peft.AdaptionPromptConfig`."""

    method: Literal["adaption_prompt"] = Field(
        "adaption_prompt", description="LLaMA-Adapter: trained tokens in the attention of the upper layers, gated from zero."
    )
    target_modules: str | None = Field(
        None, min_length=1, description="Name of the attention modules; default: `self_attn`, or `attn` for GPT-2."
    )
    adapter_len: PositiveInt = Field(10, description="Trained tokens per layer.")
    adapter_layers: PositiveInt | None = Field(None, description="Layers that get them, from the top; default: all.")


def _check(section: AdaptionPromptSection) -> Iterator[tuple[str, str]]:
    if section.target_modules == "all-linear":
        yield "target_modules", "`all-linear` names linear layers; here it must name attention modules, such as `self_attn`"


ADAPTION_PROMPT = Method(
    name="adaption_prompt",
    summary="LLaMA-Adapter: gated trained tokens in the attention of the upper layers (Zhang et al. 2023)",
    section=AdaptionPromptSection,
    kind="weights",
    targets="suffix",
    peft_config="AdaptionPromptConfig",
    model_kinds=("decoder",),
    model_types=("llama", "mistral", "gpt2"),
    why_not="PEFT has wrappers for the attention of llama, mistral and gpt2 only",
    not_mergeable="its tokens have an attention of their own, which is no change of weights",
    other_layers=("torchao",),
    learning_rate=5e-3,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 21.2% at 5e-4, 38.4% at 5e-3",
    other_defaults={"adapter_len": "PEFT has none and fails without one; the paper uses 10"},
    check=_check,
    runtime_module="peftkit.methods.adaption_prompt_torch",
)
