"""Public models by hub id: what their config.json says of their dimensions, and which kind of tokenizer they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """A model on the hub.

    Attributes:
        architecture: class of its checkpoint.
        tokenizer: a kind of `tests.stand_ins.TOKENIZERS`.
        config: its config.json, as far as it decides on shapes and positions.
    """

    architecture: str
    tokenizer: str
    config: Config


def _sizes(hidden: int, inner: int, layers: int, heads: int, vocabulary: int) -> Config:
    """The five numbers that most config.json files call alike."""
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "vocab_size": vocabulary,
    }  # fmt: skip


def _bert(hidden: int, layers: int, vocabulary: int, architecture: str = "BertForPreTraining") -> Published:
    sizes = _sizes(hidden, 4 * hidden, layers, 12, vocabulary)
    return Published(architecture, "bert", sizes | {"model_type": "bert", "max_position_embeddings": 512, "type_vocab_size": 2})


def _t5(model_type: str, width: int, inner: int, layers: int, heads: int, vocabulary: int) -> Published:
    config = {
        "model_type": model_type, "d_model": width, "d_kv": 64, "d_ff": inner, "num_layers": layers,
        "num_decoder_layers": layers, "num_heads": heads, "vocab_size": vocabulary, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False, "decoder_start_token_id": 0,
    }  # fmt: skip
    return Published("MT5ForConditionalGeneration" if model_type == "mt5" else "T5ForConditionalGeneration", "t5", config)


def _decoder(model_type: str, tokenizer: str, sizes: Config, kv_heads: int, positions: int, **rest: Any) -> Published:
    """A decoder of Llama's kind."""
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3_text": "Gemma3"}
    config = sizes | {"model_type": model_type, "num_key_value_heads": kv_heads, "max_position_embeddings": positions}
    return Published(f"{names[model_type]}ForCausalLM", tokenizer, config | {"tie_word_embeddings": True} | rest)


_GEMMA3 = {"head_dim": 256, "sliding_window": 512}

MODELS: dict[str, Published] = {
    "answerdotai/ModernBERT-base": Published(
        "ModernBertForMaskedLM", "modernbert",
        _sizes(768, 1152, 22, 12, 50368) | {"model_type": "modernbert", "max_position_embeddings": 8192},
    ),
    "BAAI/bge-small-en-v1.5": _bert(384, 12, 30522, "BertModel"),
    "bigscience/bloomz-560m": Published(
        "BloomForCausalLM", "bloom",
        {"model_type": "bloom", "hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880},
    ),
    "bigscience/mt0-large": _t5("mt5", 1024, 2816, 24, 16, 250112),
    "facebook/opt-350m": Published(
        "OPTForCausalLM", "opt",
        {
            "model_type": "opt", "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "word_embed_proj_dim": 512, "do_layer_norm_before": False, "max_position_embeddings": 2048, "vocab_size": 50272,
        },
    ),
    "google-bert/bert-base-cased": _bert(768, 12, 28996),
    "google-bert/bert-base-chinese": _bert(768, 12, 21128),
    "google-bert/bert-base-uncased": _bert(768, 12, 30522),
    "google/flan-t5-small": _t5("t5", 512, 1024, 8, 6, 32128),
    "google/flan-t5-base": _t5("t5", 768, 2048, 12, 12, 32128),
    "google/gemma-3-270m-it": _decoder("gemma3_text", "gemma", _sizes(640, 2048, 18, 4, 262144), 1, 32768, **_GEMMA3),
    "google/gemma-3-1b-it": _decoder("gemma3_text", "gemma", _sizes(1152, 6912, 26, 4, 262144), 1, 32768, **_GEMMA3),
    "google/mt5-small": _t5("mt5", 512, 1024, 8, 6, 250112),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _decoder("llama", "chatml", _sizes(576, 1536, 30, 9, 49152), 3, 8192),
    "intfloat/multilingual-e5-small": _bert(384, 12, 250037, "BertModel"),
    "meta-llama/Llama-3.2-1B-Instruct": _decoder("llama", "llama3", _sizes(2048, 8192, 16, 32, 128256), 8, 131072, head_dim=64),
    "Qwen/Qwen2.5-0.5B-Instruct": _decoder("qwen2", "chatml", _sizes(896, 4864, 24, 14, 151936), 2, 32768),
    "Qwen/Qwen2.5-32B-Instruct": _decoder(
        "qwen2", "chatml", _sizes(5120, 27648, 64, 40, 152064), 8, 32768, tie_word_embeddings=False
    ),
    "Qwen/Qwen2.5-7B-Instruct": _decoder(
        "qwen2", "chatml", _sizes(3584, 18944, 28, 28, 152064), 4, 32768, tie_word_embeddings=False
    ),
    "Qwen/Qwen3-0.6B": _decoder("qwen3", "think", _sizes(1024, 3072, 28, 16, 151936), 8, 40960, head_dim=128),
}  # fmt: skip

# Where a tiny model has other sizes than the real one, by key; all else, ties and positions among it, stays.
TINY: Config = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "n_layer": 2, "n_head": 4, "ffn_dim": 64, "word_embed_proj_dim": 16, "global_attn_every_n_layers": 2,
}  # fmt: skip


def tiny_config(model: Published) -> Config:
    """The config of a model with its sizes made tiny."""
    return {key: TINY.get(key, value) for key, value in model.config.items()}
