"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): [p_1 ... p_n; E(x)], n trained embeddings in front of the input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ModulesToSave, VirtualTokens
from peftkit.methods.prompts import NO_WEIGHTS, SET_FROM_MODEL, TWENTY_TOKENS
from peftkit.section import Section


class PromptTuningSection(Section):
    """`adapter:` with `method: prompt_tuning`. Field names and meanings are those of `peft.PromptTuningConfig`."""

    method: Literal["prompt_tuning"] = Field("prompt_tuning", description="Prompt tuning: trained embeddings before the input.")
    num_virtual_tokens: VirtualTokens = 20
    prompt_tuning_init: Literal["RANDOM", "TEXT", "SAMPLE_VOCAB"] = Field(
        "RANDOM", description="How they start: at random, as the tokens of a text, or as random tokens of the vocabulary."
    )
    prompt_tuning_init_text: str | None = Field(
        None, min_length=1, description="That text; it is repeated or cut to num_virtual_tokens."
    )
    modules_to_save: ModulesToSave = None


def _check(section: PromptTuningSection) -> Iterator[tuple[str, str]]:
    if section.prompt_tuning_init == "TEXT" and section.prompt_tuning_init_text is None:
        yield "prompt_tuning_init_text", "is missing: `prompt_tuning_init: TEXT` starts from it"
    if section.prompt_tuning_init != "TEXT" and section.prompt_tuning_init_text is not None:
        yield "prompt_tuning_init_text", "has no effect without `prompt_tuning_init: TEXT`"


PROMPT_TUNING = Method(
    name="prompt_tuning",
    summary="Trained embeddings in front of the input (Lester et al. 2021)",
    section=PromptTuningSection,
    kind="prompt",
    virtual_tokens_in="embeddings",
    peft_config="PromptTuningConfig",
    not_mergeable=NO_WEIGHTS,
    virtual_tokens=lambda section: section.num_virtual_tokens,
    size_fields=("num_virtual_tokens",),
    learning_rate=1e-3,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 5.7% at 1e-4, 23.4% at 1e-3, "
    "34.3% at 1e-3 with SAMPLE_VOCAB",
    task_learning_rates={"SEQ_CLS": (1e-2, "ours: all-MiniLM-L6-v2 on sentence polarity, benchmarks/README.md")},
    left_out={
        **SET_FROM_MODEL,
        "tokenizer_name_or_path": "the model's tokenizer",
        "tokenizer_kwargs": "the model's tokenizer is loaded already",
    },
    other_defaults=TWENTY_TOKENS,
    check=_check,
    runtime_module="peftkit.methods.prompt_tuning_torch",
)
