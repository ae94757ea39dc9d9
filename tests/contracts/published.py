"""Well-known checkpoints of many architectures: what their config.json says beside transformers' defaults for that type."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Published:
    """One checkpoint.

    Attributes:
        family: what people call the architecture.
        checkpoint: its name on the hub.
        config: values of its config.json that are not the defaults of its type.
        num_parameters: how many its files hold, where that is published.
    """

    family: str
    checkpoint: str
    config: dict[str, Any] = field(default_factory=dict)
    num_parameters: int | None = None


def _sizes(hidden: int, inner: int, layers: int, heads: int, vocab: int, **further: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "vocab_size": vocab, **further,
    }  # fmt: skip


def _bart(width: int, inner: int, layers: int, heads: int, vocab: int, **further: Any) -> dict[str, Any]:
    return {
        "d_model": width, "encoder_ffn_dim": inner, "decoder_ffn_dim": inner, "encoder_layers": layers,
        "decoder_layers": layers, "encoder_attention_heads": heads, "decoder_attention_heads": heads, "vocab_size": vocab,
        **further,
    }  # fmt: skip


_DEBERTA = {
    "type_vocab_size": 0, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"],
}  # fmt: skip
_MT5 = {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"}
_UNTIED = {"tie_word_embeddings": False}
_TIED = {"tie_word_embeddings": True}

PUBLISHED: dict[str, Published] = {
    "albert": Published("ALBERT", "albert/albert-base-v2", _sizes(768, 3072, 12, 12, 30000)),
    "bart": Published("BART", "facebook/bart-base", _bart(768, 3072, 6, 12, 50265), 139_420_416),
    "bert": Published("BERT", "google-bert/bert-base-uncased", {}, 109_482_240),
    "big_bird": Published("BigBird", "google/bigbird-roberta-base"),
    "bloom": Published(
        "BLOOM", "bigscience/bloomz-560m", {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880}, 559_214_592
    ),
    "codegen": Published(
        "CodeGen", "Salesforce/codegen-350M-mono",
        {"n_embd": 1024, "n_layer": 20, "n_head": 16, "rotary_dim": 32, "vocab_size": 51200, "n_positions": 2048},
        356_712_448,
    ),
    "cohere": Published("Cohere (parallel)", "CohereLabs/c4ai-command-r-v01", {}, 34_980_831_232),
    "deberta": Published("DeBERTa", "microsoft/deberta-base", _DEBERTA | {"vocab_size": 50265}, 138_601_728),
    "deberta-v2": Published(
        "DeBERTa v3", "microsoft/deberta-v3-base",
        _sizes(768, 3072, 12, 12, 128100, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True, **_DEBERTA),
        183_831_552,
    ),
    "deepseek_v3": Published("DeepSeek-V3 (MoE)", "deepseek-ai/DeepSeek-V3", {}),
    "distilbert": Published("DistilBERT", "distilbert/distilbert-base-uncased", {}, 66_362_880),
    "electra": Published("ELECTRA", "google/electra-small-discriminator"),
    "ernie4_5": Published("ERNIE 4.5", "baidu/ERNIE-4.5-0.3B-PT", {}, 360_748_032),
    "eurobert": Published("EuroBERT", "EuroBERT/EuroBERT-210m"),
    "falcon": Published(
        "Falcon (parallel)", "tiiuae/falcon-7b",
        {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "vocab_size": 65024}, 6_921_720_704,
    ),
    "gemma": Published(
        "Gemma", "google/gemma-2b", _sizes(2048, 16384, 18, 8, 256000, num_key_value_heads=1, head_dim=256), 2_506_172_416
    ),
    "gemma2": Published(
        "Gemma 2", "google/gemma-2-2b", _sizes(2304, 9216, 26, 8, 256000, num_key_value_heads=4, head_dim=256), 2_614_341_888
    ),
    "gemma3_text": Published(
        "Gemma 3", "google/gemma-3-1b-pt", _sizes(1152, 6912, 26, 4, 262144, num_key_value_heads=1, head_dim=256), 999_885_952
    ),
    "glm": Published("GLM-4", "zai-org/glm-4-9b-chat-hf", {}, 9_399_951_360),
    "glm4": Published("GLM-4-0414", "zai-org/GLM-4-9B-0414", {}, 9_400_279_040),
    "glm4_moe": Published("GLM-4.5 (MoE)", "zai-org/GLM-4.5-Air", {"head_dim": 128}),
    "gpt2": Published("GPT-2", "openai-community/gpt2", {}, 124_439_808),
    "gpt_bigcode": Published(
        "StarCoder", "bigcode/starcoderbase-1b",
        {"n_embd": 2048, "n_inner": 8192, "n_layer": 24, "n_head": 16, "n_positions": 8192, "vocab_size": 49152},
        1_137_207_296,
    ),
    "gpt_neo": Published(
        "GPT-Neo", "EleutherAI/gpt-neo-125m",
        {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "attention_types": [[["global", "local"], 6]]}, 125_198_592,
    ),
    "gpt_neox": Published("GPT-NeoX (parallel)", "EleutherAI/pythia-410m", _sizes(1024, 4096, 24, 16, 50304), 405_334_016),
    "gpt_oss": Published(
        "GPT-OSS (MoE)", "openai/gpt-oss-20b", {"num_hidden_layers": 24, "num_local_experts": 32}, 20_914_757_184
    ),
    "gptj": Published("GPT-J (parallel)", "EleutherAI/gpt-j-6b", {}, 6_050_882_784),
    "granite": Published(
        "Granite", "ibm-granite/granite-3.3-2b-instruct",
        _sizes(2048, 8192, 40, 32, 49159, num_key_value_heads=8, **_TIED), 2_533_539_840,
    ),
    "granitemoe": Published(
        "Granite (MoE)", "ibm-granite/granite-3.0-1b-a400m-instruct",
        _sizes(1024, 512, 24, 16, 49155, num_key_value_heads=8, num_local_experts=32, num_experts_per_tok=8, **_TIED),
    ),
    "llama": Published(
        "LLaMA", "meta-llama/Llama-3.2-1B", _sizes(2048, 8192, 16, 32, 128256, num_key_value_heads=8, head_dim=64, **_TIED),
        1_235_814_400,
    ),
    "llama4_text": Published("Llama 4 (MoE), text", "meta-llama/Llama-4-Scout-17B-16E"),
    "m2m_100": Published(
        "M2M-100, NLLB", "facebook/nllb-200-distilled-600M", _bart(1024, 4096, 12, 16, 256206), 615_073_792
    ),
    "marian": Published("Marian", "Helsinki-NLP/opus-mt-en-de", _bart(512, 2048, 6, 8, 58101, max_position_embeddings=512)),
    "mbart": Published("mBART", "facebook/mbart-large-50", _bart(1024, 4096, 12, 16, 250054), 610_879_488),
    "mistral": Published("Mistral", "mistralai/Mistral-7B-v0.1", {}, 7_241_732_096),
    "mixtral": Published("Mixtral (MoE)", "mistralai/Mixtral-8x7B-v0.1", {}, 46_702_792_704),
    "modernbert": Published("ModernBERT", "answerdotai/ModernBERT-base", {}, 149_014_272),
    "mpnet": Published("MPNet", "microsoft/mpnet-base", {"max_position_embeddings": 514}, 109_486_464),
    "mpt": Published(
        "MPT", "mosaicml/mpt-7b",
        {"d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50432}, 6_649_286_656,
    ),
    "mt5": Published("mT5", "google/mt5-small", _MT5 | _UNTIED | {"vocab_size": 250112}, 300_176_768),
    "olmo2": Published("OLMo 2", "allenai/OLMo-2-0425-1B", _sizes(2048, 8192, 16, 16, 100352), 1_484_916_736),
    "olmoe": Published("OLMoE (MoE)", "allenai/OLMoE-1B-7B-0924", {"intermediate_size": 1024}, 6_919_161_856),
    "opt": Published("OPT", "facebook/opt-125m", {}, 125_239_296),
    "pegasus": Published("PEGASUS", "google/pegasus-xsum", _bart(1024, 4096, 16, 16, 96103, max_position_embeddings=512)),
    "phi": Published("Phi (parallel)", "microsoft/phi-2", _sizes(2560, 10240, 32, 32, 51200), 2_779_683_840),
    "phi3": Published("Phi-3", "microsoft/Phi-3-mini-4k-instruct", {}, 3_821_079_552),
    "qwen2": Published(
        "Qwen2, Qwen2.5", "Qwen/Qwen2.5-0.5B-Instruct", _sizes(896, 4864, 24, 14, 151936, num_key_value_heads=2, **_TIED),
        494_032_768,
    ),
    "qwen2_moe": Published("Qwen1.5 and 2 (MoE)", "Qwen/Qwen1.5-MoE-A2.7B", {}, 14_315_784_192),
    "qwen3": Published(
        "Qwen3", "Qwen/Qwen3-0.6B", _sizes(1024, 3072, 28, 16, 151936, num_key_value_heads=8, head_dim=128, **_TIED),
        596_049_920,
    ),
    "qwen3_moe": Published(
        "Qwen3 (MoE)", "Qwen/Qwen3-30B-A3B",
        _sizes(2048, 6144, 48, 32, 151936, num_key_value_heads=4, head_dim=128, moe_intermediate_size=768), 30_532_122_624,
    ),
    "roberta": Published(
        "RoBERTa", "FacebookAI/roberta-base", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
        124_645_632,
    ),
    "seed_oss": Published(
        "Seed-OSS", "ByteDance-Seed/Seed-OSS-36B-Instruct",
        _sizes(5120, 27648, 64, 80, 155136, num_key_value_heads=8, head_dim=128), 36_151_104_512,
    ),
    "smollm3": Published("SmolLM3", "HuggingFaceTB/SmolLM3-3B", _TIED, 3_075_098_624),
    "stablelm": Published(
        "StableLM", "stabilityai/stablelm-2-1_6b", _sizes(2048, 5632, 24, 32, 100352, use_qkv_bias=True), 1_644_515_328
    ),
    "starcoder2": Published(
        "StarCoder2", "bigcode/starcoder2-3b", _sizes(3072, 12288, 30, 24, 49152, num_key_value_heads=2), 3_030_371_328
    ),
    "t5": Published("T5", "google-t5/t5-small", {}, 60_506_624),
    "umt5": Published("UMT5", "google/umt5-small", _MT5 | _UNTIED | {"vocab_size": 256384}),
    "xglm": Published(
        "XGLM", "facebook/xglm-564M",
        {"d_model": 1024, "ffn_dim": 4096, "num_layers": 24, "attention_heads": 16, "vocab_size": 256008}, 564_463_616,
    ),
    "xlm-roberta": Published(
        "XLM-RoBERTa", "FacebookAI/xlm-roberta-base",
        {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1}, 278_043_648,
    ),
    "xlnet": Published("XLNet", "xlnet/xlnet-base-cased", {"d_model": 768, "n_layer": 12, "n_head": 12, "d_inner": 3072}),
}  # fmt: skip
