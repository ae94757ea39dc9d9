"""Trainable tokens (PEFT's own, no paper): the embeddings of chosen tokens are trained, E[i] for i in token_indices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import OTHER_LAYERS, Method
from peftkit.methods.fields import TargetModules
from peftkit.section import NonNegativeInt, Section


class TrainableTokensSection(Section):
    """`adapter:` with `method: trainable_tokens`. Fields are those of `peft.TrainableTokensConfig`, and `tokens`."""

    method: Literal["trainable_tokens"] = Field(
        "trainable_tokens", description="Only the embeddings of chosen tokens are trained (and the task's head)."
    )
    token_indices: list[NonNegativeInt] = Field([], description="Ids of the tokens.")
    tokens: list[str] = Field([], description="Tokens by their text, each one token of the vocabulary such as `<|user|>`.")
    target_modules: TargetModules = Field(
        None,
        description="Embedding layers: names or a regular expression. Default: the input embedding and what is tied to it.",
    )
    init_weights: bool = Field(True, description="Start from the base model's embeddings; false starts at random.")


def _check(section: TrainableTokensSection) -> Iterator[tuple[str, str]]:
    if not section.token_indices and not section.tokens:
        yield "token_indices", "is missing: name the tokens to train, by id here or by text in `tokens`"
    for name, values in (("token_indices", list(map(str, section.token_indices))), ("tokens", section.tokens)):
        if twice := sorted({value for value in values if values.count(value) > 1}):
            yield name, f"names a token twice: {', '.join(twice)}"
    if "" in section.tokens:
        yield "tokens", "holds an empty text, which is no token"
    if section.target_modules == []:
        yield "target_modules", "is an empty list: nothing would be adapted; leave it out for the input embedding"
    if section.target_modules == "all-linear":
        yield "target_modules", "`all-linear` names linear layers; here it must name embedding layers"


TRAINABLE_TOKENS = Method(
    name="trainable_tokens",
    summary="The embeddings of chosen tokens, such as new special tokens (PEFT's own)",
    section=TrainableTokensSection,
    kind="weights",
    peft_config="TrainableTokensConfig",
    targets="embedding",
    other_layers=OTHER_LAYERS,
    learning_rate=0.2,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 24.6% at 0.2, with two tokens",
    own_fields={"tokens": "turned into token_indices with the model's tokenizer"},
    check=_check,
    runtime_module="peftkit.methods.trainable_tokens_torch",
    starter={"token_indices": "[0]"},
)
