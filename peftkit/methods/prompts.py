"""What the prompt methods have in common: fields that PEFT sets from the model, and reasons."""

from __future__ import annotations

from peftkit.methods.base import ModelKind

_FROM_THE_MODEL = "set from the model"
SET_FROM_MODEL = {
    "token_dim": _FROM_THE_MODEL,
    "num_transformer_submodules": _FROM_THE_MODEL,
    "num_attention_heads": _FROM_THE_MODEL,
    "num_layers": _FROM_THE_MODEL,
}
TWENTY_TOKENS = {"num_virtual_tokens": "PEFT has none and fails without one; 20"}
# Tasks of encoder-decoder models that use their encoder alone, and why keys and values cannot be put there.
ENCODER_ALONE: tuple[tuple[str, ModelKind], ...] = (
    ("TOKEN_CLS", "encoder-decoder"),
    ("FEATURE_EXTRACTION", "encoder-decoder"),
)
NO_CACHE = "the encoder of such a model, which the task uses alone, keeps no keys and values to put more in front of"
NO_WEIGHTS = "virtual tokens are no weights of the base model"
