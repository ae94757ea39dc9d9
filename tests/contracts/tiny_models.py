"""Tiny models of many architectures, with random weights: enough of each to train, save, reload and merge an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.conftest import tiny_tokenizer

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = _BERT | {"num_key_value_heads": 2, "head_dim": 8}
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_POSITIONS = {"max_position_embeddings": 256}

SIZES: dict[str, dict[str, Any]] = {
    "albert": _BERT | _POSITIONS | {"embedding_size": 16},
    "bart": _BART | _POSITIONS,
    "bert": _BERT | _POSITIONS,
    "big_bird": _BERT | _POSITIONS | {"attention_type": "original_full"},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": _GPT | {"rotary_dim": 8},
    "cohere": _LLAMA | _POSITIONS,
    "deberta": _BERT | _POSITIONS | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deberta-v2": _BERT | _POSITIONS | {"relative_attention": True, "position_buckets": 32, "pos_att_type": ["p2c", "c2p"]},
    "deepseek_v3": _BERT | _POSITIONS | {
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8,
    },
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, **_POSITIONS},
    "electra": _BERT | _POSITIONS | {"embedding_size": 16},
    "ernie4_5": _LLAMA | _POSITIONS,
    "eurobert": _LLAMA | _POSITIONS,
    "falcon": _BERT | {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    "gemma": _LLAMA | _POSITIONS,
    "gemma2": _LLAMA | _POSITIONS,
    "gemma3_text": _LLAMA | _POSITIONS,
    "glm": _LLAMA | _POSITIONS,
    "glm4": _LLAMA | _POSITIONS,
    "glm4_moe": _LLAMA | _POSITIONS | {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    },
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], **_POSITIONS,
    },
    "gpt_neox": _BERT | _POSITIONS,
    "gpt_oss": _LLAMA | _POSITIONS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": _GPT | {"rotary_dim": 8},
    "granite": _LLAMA | _POSITIONS,
    "granitemoe": _LLAMA | _POSITIONS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama": _LLAMA | _POSITIONS,
    "llama4_text": _LLAMA | _POSITIONS | {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1,
    },
    "m2m_100": _BART | _POSITIONS,
    "marian": _BART | _POSITIONS,
    "mbart": _BART | _POSITIONS,
    "mistral": _LLAMA | _POSITIONS,
    "mixtral": _LLAMA | _POSITIONS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "modernbert": _BERT | _POSITIONS | {"global_attn_every_n_layers": 2, "local_attention": 16},
    "mpnet": _BERT | _POSITIONS,
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256},
    "mt5": _T5 | {"feed_forward_proj": "gated-gelu"},
    "olmo2": _LLAMA | _POSITIONS,
    "olmoe": _LLAMA | _POSITIONS | {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {
        "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
        **_POSITIONS,
    },
    "pegasus": _BART | _POSITIONS,
    "phi": _BERT | _POSITIONS,
    "phi3": _LLAMA | _POSITIONS,
    "qwen2": _LLAMA | _POSITIONS,
    "qwen2_moe": _LLAMA | _POSITIONS | {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32,
    },
    "qwen3": _LLAMA | _POSITIONS,
    "qwen3_moe": _LLAMA | _POSITIONS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "roberta": _BERT | _POSITIONS,
    "seed_oss": _LLAMA | _POSITIONS,
    "smollm3": _LLAMA | _POSITIONS,
    "stablelm": _LLAMA | _POSITIONS,
    "starcoder2": _LLAMA | _POSITIONS,
    "t5": _T5,
    "umt5": _T5 | {"feed_forward_proj": "gated-gelu"},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, **_POSITIONS},
    "xlm-roberta": _BERT | _POSITIONS,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
}  # fmt: skip
DECODERS = (
    "bloom", "codegen", "cohere", "deepseek_v3", "ernie4_5", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "llama",
    "llama4_text", "mistral", "mixtral", "mpt", "olmo2", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm",
)  # fmt: skip
_NO_DROPOUT = ("dropout", "pdrop", "drop_rate", "drop_prob")


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """The config of a tiny model without dropout."""
    config_class = CONFIG_MAPPING[model_type]
    config: PretrainedConfig = config_class(vocab_size=300, **(_SPECIAL | SIZES[model_type] | changes))
    for name, value in config.to_dict().items():
        if isinstance(value, float) and any(part in name for part in _NO_DROPOUT):
            setattr(config, name, 0.0)
    return config


def save_tiny_model(model_type: str, folder: Path, **changes: Any) -> Path:
    """A checkpoint as one is published: a language model of decoders and encoder-decoders, the bare encoder of all others."""
    set_seed(0)
    config = tiny_config(model_type, **changes)
    decoder = model_type in DECODERS
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM if decoder else AutoModel
    auto.from_config(config).save_pretrained(folder)
    tiny_tokenizer(adds_end=model_type in ("t5", "bart")).save_pretrained(folder)
    return folder
