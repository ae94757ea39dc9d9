"""Which models keep packed rows apart, known from config.json alone: what every causal model of transformers 5.23 was tried on.

A packed batch has rows end to end, position ids that start again at 0 with every row, and no attention mask. There are
four ways in which a model then keeps the rows apart, and models for which there is none:

- `positions`: the model builds a block-diagonal mask (sliding windows and chunks within each row) from the position ids.
- `mask`: it does not, but takes the same mask ready made.
- `rows`: `engine.segments` takes the place of the kernel in either case and runs it on one row after the other.
- `one_sequence`: flash attention takes no mask; transformers finds the rows by the position ids, in one single sequence only.
  With two or more it lets rows see each other, so the packs of a micro-batch must lie end to end.

`tests/contracts/test_packing_types.py` compares packed with separate logits of every type, in float32 on the CPU, by sdpa and
eager attention, and with flash kernels written in torch under transformers' own code that calls them. Not tried for want of a
GPU: the flash kernels themselves, and recurrent layers with kernels of their own (fla, mamba-ssm). Flex attention was, on the
CPU (torch 2.13): right for a row alone, wrong for packed ones and not twice the same; it is refused until a GPU shows better.
`engine.packing.prove_packing` tries the model itself, whatever its type and kernel, before the first step.

Frequencies that depend on the length (RoPE types `dynamic` and `longrope`) follow the longest row of a batch, packed or padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Way = Literal["positions", "mask", "one_sequence", "rows", ""]

_RECURRENT = "its recurrent or convolutional layers carry what they read from one row into the next"
_OWN_POSITIONS = "it counts positions and builds its mask by itself, without regard to where a row starts"
_FROM_PADDING = "it counts positions from its padding token's number on, not from 0"
_BY_PATCHES = "it sees tokens in patches or blocks, which do not end where a row ends"
_ALIBI = "it works out distances (ALiBi) from a padding mask, which cannot say where a row starts"
_NOT_ALONE = "it reads the keys and values of another model"

_REASONS = {
    _RECURRENT: """
        bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid inkling2_text inkling_text jamba kimi_linear lfm2 lfm2_moe
        lfm3 mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp
        qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2 zaya
    """,
    _OWN_POSITIONS: """
        bart bigbird_pegasus blenderbot blenderbot-small cpmant marian mbart mvp openai-gpt pegasus plbart prophetnet roformer
        trocr xlm xlnet
    """,
    _FROM_PADDING: "camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod",
    _BY_PATCHES: "blt deepseek_v4 reformer",
    _ALIBI: "bloom",
    _NOT_ALONE: "gemma4_assistant gemma4_unified_assistant",
}
NOT_PACKED = {model_type: reason for reason, names in _REASONS.items() for model_type in names.split()}
BY_MASK = frozenset(
    """
afmoe bert bert-generation big_bird biogpt electra ernie falcon gpt_oss megatron-bert mpt opt rembert roc_bert xglm
""".split()  # noqa: SIM905 - a list of them would be one name a line
)
# Types whose attention layers do not hand position ids on to the flash kernels.
WITHOUT_FLASH = frozenset(
    """
cohere_compass_text ctrl fuyu gpt_bigcode gpt_neo gptj granitemoehybrid moshi persimmon whisper
""".split()  # noqa: SIM905 - a list of them would be one name a line
)
_NO_FLASH = "its layers do not tell flash attention where a row starts; `model.attn_implementation: sdpa` or `eager` does"
_NO_FLEX = "flex attention gave packed rows wrong logits where it was tried; use `model.attn_implementation: sdpa` or `eager`"


def why_not_packed(config: Mapping[str, Any], attention: str | None = None) -> str:
    """Why rows cannot be packed for a model; empty where they can, or where its type is not known.

    Args:
        config: the model's config.json; empty where there is none at hand.
        attention: `model.attn_implementation`.
    """
    model_type = _text(config).get("model_type")
    reason = _refusal(_text(config), attention)
    who = f"`{model_type}` models" if model_type else "models"
    return f"{who} cannot keep packed rows apart: {reason}" if reason else ""


def packs_by(config: Mapping[str, Any], attention: str | None = None) -> Way:
    """How a model keeps packed rows apart; empty where it cannot. Arguments as of `why_not_packed`."""
    text = _text(config)
    if _refusal(text, attention):
        return ""
    if (attention or "").startswith("flash"):
        return "one_sequence"
    return "mask" if text.get("model_type") in BY_MASK or _is_hybrid_without_state(text) else "positions"


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a composite config that tells of the text model, where the table does not know the whole."""
    model_type, inner = config.get("model_type"), config.get("text_config")
    known = model_type in NOT_PACKED or model_type in BY_MASK or model_type in WITHOUT_FLASH
    return inner if not known and isinstance(inner, Mapping) and inner.get("model_type") else config


def _refusal(text: Mapping[str, Any], attention: str | None) -> str:
    model_type = text.get("model_type")
    if model_type == "falcon" and text.get("alibi"):
        return _ALIBI
    if model_type == "big_bird" and text.get("attention_type") != "original_full":
        return _BY_PATCHES
    if model_type in NOT_PACKED and not _is_hybrid_without_state(text):
        return NOT_PACKED[model_type]
    if attention == "flex_attention":
        return _NO_FLEX
    return _NO_FLASH if model_type in WITHOUT_FLASH and (attention or "").startswith("flash") else ""


def _is_hybrid_without_state(text: Mapping[str, Any]) -> bool:
    """Whether this is one of the small Granite 4 models, hybrids by type whose layers are all attention."""
    kinds = set(text.get("layer_types") or ())
    return text.get("model_type") == "granitemoehybrid" and bool(kinds) and kinds <= {"attention", "full_attention"}
