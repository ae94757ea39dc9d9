"""P-tuning (Liu et al. 2021, arXiv:2103.10385): [f(e_1) ... f(e_n); E(x)], with embeddings e and a small network f trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from peftkit.methods.base import Method
from peftkit.methods.fields import ModulesToSave, VirtualTokens
from peftkit.methods.prompts import NO_WEIGHTS, SET_FROM_MODEL, TWENTY_TOKENS
from peftkit.section import PositiveInt, Section, Share


class PTuningSection(Section):
    """`adapter:` with `method: p_tuning`. Field names and meanings are those of `peft.PromptEncoderConfig`."""

    method: Literal["p_tuning"] = Field("p_tuning", description="P-tuning: virtual tokens that a small network computes.")
    num_virtual_tokens: VirtualTokens = 20
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = Field(
        "MLP", description="The network: three linear layers, or a bidirectional LSTM with two behind it."
    )
    encoder_hidden_size: PositiveInt | None = Field(None, description="Its width; default: that of the embeddings.")
    encoder_num_layers: PositiveInt = Field(2, description="Layers of the LSTM.")
    encoder_dropout: Share = Field(0.0, description="Dropout between the layers of the LSTM, as a probability.")
    modules_to_save: ModulesToSave = None


def _check(section: PTuningSection) -> Iterator[tuple[str, str]]:
    is_lstm = section.encoder_reparameterization_type == "LSTM"
    if section.encoder_num_layers != 2 and not is_lstm:
        yield "encoder_num_layers", "has no effect without `encoder_reparameterization_type: LSTM`"
    if section.encoder_dropout and not (is_lstm and section.encoder_num_layers > 1):
        yield "encoder_dropout", "has no effect without `encoder_reparameterization_type: LSTM` of at least two layers"


P_TUNING = Method(
    name="p_tuning",
    summary="Virtual tokens in front of the input that a small network computes (Liu et al. 2021)",
    section=PTuningSection,
    kind="prompt",
    virtual_tokens_in="embeddings",
    peft_config="PromptEncoderConfig",
    not_mergeable=NO_WEIGHTS,
    virtual_tokens=lambda section: section.num_virtual_tokens,
    size_fields=("encoder_hidden_size",),
    learning_rate=1e-4,
    learning_rate_source="PEFT's method comparison (Llama-3.2-3B, MetaMathQA to GSM8K): 35.0% at 1e-4",
    left_out=SET_FROM_MODEL,
    other_defaults=TWENTY_TOKENS,
    check=_check,
)
