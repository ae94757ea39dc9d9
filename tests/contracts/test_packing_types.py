"""recipe/packing.py against transformers: packed rows of every causal model type, beside the same rows alone."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peftkit.engine.packing import block_positions, for_model
from peftkit.recipe.packing import BY_MASK, NOT_PACKED, WITHOUT_FLASH, Way, packs_by, why_not_packed

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
MASKED = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
LENGTHS, PACKS, WIDTH = (7, 5, 9), ((0, 1, 2), (2, 0)), 24  # two packs, with 3 and 8 tokens of padding
CLOSE = 1e-4  # largest difference over the largest logit

# What AutoModelForCausalLM, or this machine, cannot build.
UNBUILT = {
    "dots3_note": "its default text config names layers by number; its text model is tried",
    "gemma3n": "needs timm; its text model is tried",
    "gemma4_assistant": "has no keys and values of its own",
    "gemma4_unified_assistant": "has no keys and values of its own",
    "musicgen": "AutoModelForCausalLM does not build it",
    "musicgen_melody": "AutoModelForCausalLM does not build it",
    "zamba2": "its shapes follow from one another in a way that does not shrink",
}


def _sizes(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Sizes by the names that configs have for them: windows, chunks and indexers are shorter than the rows.
SMALL: dict[str, Any] = {
    **_sizes(
        "hidden_size d_model n_embd dim embedding_size emb_dim embedding_dim lru_width word_embed_proj_dim "
        "input_embedding_size output_embedding_size backbone_hidden_size router_hidden_size pronunciation_embed_dim "
        "shape_embed_dim ple_embed_dim attention_hidden_size hidden_size_per_layer_input hidden_size_global",
        32,
    ),
    **_sizes(
        "intermediate_size ffn_dim d_inner n_inner decoder_ffn_dim encoder_ffn_dim dim_ff ffn_hidden_size dff "
        "feed_forward_size dense_intermediate_size intermediate_size_mlp",
        64,
    ),
    **_sizes(
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size q_lora_rank "
        "kv_lora_rank o_lora_rank hc_lowrank gated_norm_rank laurel_rank adapter_rank time_step_rank mamba_dt_rank",
        16,
    ),
    **_sizes(
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads mamba_num_heads mamba_n_heads "
        "linear_num_heads index_n_heads num_experts num_local_experts n_routed_experts moe_num_experts sliding_window "
        "attention_chunk_size window_size attention_window_size local_attention sliding_window_size keep_window_size "
        "floor_scale index_block_size",
        4,
    ),
    **_sizes(
        "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads linear_num_value_heads "
        "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers num_blocks num_experts_per_tok moe_k num_experts_per_token moe_topk top_k_experts",
        2,
    ),
    **_sizes(
        "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim attention_head_dim kv_channels swa_head_dim "
        "linear_head_dim d_rel linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim mamba_headdim "
        "attention_head_size d_head dim_head index_head_dim global_head_dim state_size mamba_d_state ssm_state_size "
        "chunk_size mamba_chunk_size rotary_dim",
        8,
    ),
    **_sizes(
        "vocab_size n_tokens vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size pronunciation_vocab_size "
        "shape_vocab_size encoder_hash_byte_group_vocab",
        300,
    ),
    **_sizes("max_position_embeddings n_positions n_ctx max_seq_len context_length", 64),
    **_sizes("n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts", 1),
    **_sizes("zero_expert_num n_groups mamba_n_groups mamba_ngroups index_topk_blocks index_local_blocks", 1),
    "index_topk": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALL_HEADS = {"num_key_value_heads": 4}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SLIDING = ["sliding_attention", "full_attention"]
# What the sizes above do not settle.
CHANGES: dict[str, dict[str, Any]] = {
    **_sizes(
        "axk1 axk2 bailing_hybrid deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa hy_v4 kimi_linear longcat_flash",
        _ALL_HEADS,
    ),
    **_sizes("minicpm3 youtu", _ALL_HEADS),
    "bamba": {"mamba_d_head": 16},
    "big_bird": {"attention_type": "original_full"},  # its blocks become that for good after one short row
    "cohere_compass_text": {"layer_types": _SLIDING, "rope_parameters": dict.fromkeys(_SLIDING, _PLAIN_ROPE)},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 64}},
    "deepseek_v2": _ALL_HEADS | {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": _ALL_HEADS | {"head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 32},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": _SLIDING},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "moe_layers": [0]},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64,
        "attention_head_dim": 16, "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
_WINDOW = {"sliding_window": 4}
_WINDOWS = _WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
# Choices within a type that other checkpoints of it make.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"position_embedding_type": "absolute"}),
    ("doge", _WINDOW),
    ("falcon", {"alibi": True}),
    ("falcon", {"new_decoder_architecture": True, "alibi": False}),
    ("granitemoehybrid", {"layer_types": ["attention", "attention"]}),
    ("laguna", _WINDOW | {"layer_types": _SLIDING}),
    ("mixtral", _WINDOW),
    ("mpt", {"attn_config": {"alibi": False}}),
    ("phi3", _WINDOW),
    ("phimoe", _WINDOW),
    ("qwen2", _WINDOWS),
    ("qwen2_moe", _WINDOWS),
    ("qwen3", _WINDOWS),
    ("qwen3_moe", _WINDOW | {"use_sliding_window": True}),
    ("smollm3", _WINDOW | {"use_sliding_window": True, "layer_types": _SLIDING}),
    ("starcoder2", _WINDOW),
]
CASES = [(name, {}) for name in sorted(CAUSAL) if name not in UNBUILT] + VARIANTS


@functools.cache
def defaults(config_class: Any) -> dict[str, Any]:
    """The default config of a class."""
    content: dict[str, Any] = config_class().to_dict()
    return content


def shrunk(config_class: Any) -> dict[str, Any]:
    """Arguments that make a config tiny, its kinds of layers all there; the configs within it likewise."""
    content = defaults(config_class)
    sizes = {name: SMALL[name] for name, value in content.items() if type(value) is int and name in SMALL}
    sizes |= {name: SMALL[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id") if name in content}
    sizes |= {name: 0.0 for name, value in content.items() if type(value) is float and ("drop" in name)}
    kinds = list(dict.fromkeys(content.get("layer_types") or []))
    if kinds and "num_hidden_layers" in sizes:
        number = max(2, len(kinds))
        sizes |= {"num_hidden_layers": number, "layer_types": [kinds[layer % len(kinds)] for layer in range(number)]}
    for name in getattr(config_class, "sub_configs", None) or {}:
        inner = content.get(name)
        if isinstance(inner, dict) and inner.get("model_type") in CONFIG_MAPPING:
            model_type = inner["model_type"]
            sizes[name] = shrunk(CONFIG_MAPPING[model_type]) | CHANGES.get(model_type, {}) | {"model_type": model_type}
    return sizes


def small_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """A tiny config of a type, as that of a decoder."""
    config_class = CONFIG_MAPPING[model_type]
    arguments = shrunk(config_class) | CHANGES.get(model_type, {})
    if "layers_block_type" in arguments:
        arguments.pop("layer_types", None)
    if defaults(config_class).get("is_encoder_decoder"):
        arguments |= {"is_encoder_decoder": False, "is_decoder": True}
    if model_type in MASKED or model_type == "bert-generation":
        arguments["is_decoder"] = True
    config: PretrainedConfig = config_class(**arguments | changes)
    return config


def small_model(config: PretrainedConfig, attention: str) -> Any:
    """A model whose weights are large enough for every token to count; None where it has no such attention."""
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except ValueError as error:
        if "does not support an attention implementation" in str(error):
            return None
        raise
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * 1.5 / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(noise * 0.1)
    return model.eval()


def rows() -> list[torch.Tensor]:
    """Three rows of random tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 100, (length,), generator=generator) for length in LENGTHS]


def packed_batch() -> dict[str, torch.Tensor]:
    """The rows in packs."""
    parts = [torch.cat([rows()[row] for row in pack]) for pack in PACKS]
    ids = [torch.nn.functional.pad(part, (0, WIDTH - len(part))) for part in parts]
    positions = [block_positions([LENGTHS[row] for row in pack], WIDTH) for pack in PACKS]
    return {"input_ids": torch.stack(ids), "position_ids": torch.tensor(positions)}


@torch.no_grad()
def alone(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits (T, V) of each row by itself."""
    return [model(input_ids=row[None], use_cache=False).logits[0] for row in rows()]


@torch.no_grad()
def difference(model: PreTrainedModel, expected: list[torch.Tensor], way: Way) -> float:
    """The largest difference of packed logits over the largest logit; infinity where the model refuses them."""
    try:
        inputs = for_model(packed_batch(), model, way)
        logits = model(**inputs, use_cache=False).logits.reshape(len(PACKS), WIDTH, -1)
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError, AssertionError):
        return math.inf
    found = []
    for pack, numbers in enumerate(PACKS):
        parts = logits[pack, : sum(LENGTHS[row] for row in numbers)].split([LENGTHS[row] for row in numbers])
        found += [float((part - expected[row]).abs().max()) for row, part in zip(numbers, parts, strict=True)]
    return max(found) / max(float(part.abs().max()) for part in expected)


@pytest.mark.parametrize(
    ("model_type", "changes"), CASES, ids=lambda value: value if isinstance(value, str) else str(len(value))
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_keeps_packed_rows_apart_exactly_as_the_table_says(
    model_type: str, changes: dict[str, Any], attention: str
) -> None:
    config = small_config(model_type, **changes)
    model = small_model(config, attention)
    if model is None:
        return
    expected = alone(model)
    by: dict[Way, bool] = {way: difference(model, expected, way) < CLOSE for way in ("positions", "mask")}
    way = packs_by(config.to_dict(), attention)
    found: Way = "positions" if by["positions"] else "mask" if by["mask"] else ""
    assert found == way


def test_every_type_in_the_tables_is_one_of_transformers() -> None:
    assert {*NOT_PACKED, *BY_MASK, *WITHOUT_FLASH} <= set(CAUSAL)
    assert not set(NOT_PACKED) & BY_MASK


def test_what_cannot_be_built_here_is_still_not_buildable() -> None:
    built = []
    for name in UNBUILT:
        try:
            alone(small_model(small_config(name), "eager"))
        except Exception:  # whatever stops it
            continue
        built.append(name)
    assert built == []


def test_an_unknown_model_is_left_to_the_proof() -> None:
    assert why_not_packed({}) == ""
    assert why_not_packed({"model_type": "brand_new"}) == ""
    assert packs_by({"model_type": "brand_new"}) == "positions"
    assert packs_by({"model_type": "brand_new"}, "flash_attention_2") == "one_sequence"


def test_an_unknown_composite_is_judged_by_its_text_model() -> None:
    assert "recurrent" in why_not_packed({"model_type": "brand_new", "text_config": {"model_type": "qwen3_next"}})
    assert packs_by({"model_type": "brand_new", "text_config": {"model_type": "opt"}}) == "mask"


def attend(query: Any, key: Any, value: Any, softmax_scale: Any, window: int, softcap: float, sinks: Any) -> torch.Tensor:
    """Causal attention in a window; tensors (B, T, heads, D)."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    scores = query @ key.transpose(-1, -2) * (softmax_scale or query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    places = torch.arange(query.shape[2])
    back = places[:, None] - places[None]
    scores = scores.masked_fill((back < 0) | (back > window), -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)], -1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)


def flash_kernel(
    q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
    window_size: Any = (-1, -1), softcap: float = 0.0, s_aux: Any = None,
) -> torch.Tensor:  # fmt: skip
    """flash_attn_func in torch."""
    assert causal
    return attend(q, k, v, softmax_scale, window_size[0] if window_size[0] >= 0 else WIDTH * 9, softcap, s_aux)


def varlen_kernel(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: Any = None,
    max_seqlen_k: Any = None, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
    window_size: Any = (-1, -1), softcap: float = 0.0, s_aux: Any = None,
) -> torch.Tensor:  # fmt: skip
    """flash_attn_varlen_func in torch: every sequence by itself."""
    bounds = cu_seqlens_q.tolist()
    options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap, "s_aux": s_aux}
    spans = itertools.pairwise(bounds)
    return torch.cat([flash_kernel(q[None, a:b], k[None, a:b], v[None, a:b], **options)[0] for a, b in spans])


@pytest.fixture
def flash_in_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers' own way to the flash kernels, with these in their place."""
    kernels = (flash_kernel, varlen_kernel, None, None, None)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **options: kernels)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    yield
    flash._loaded_implementation = None


def with_flash(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, its layers set to flash attention without asking whether the package is there."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            config._attn_implementation_internal = "flash_attention_2"
    return model


FLASH = [
    name for name in sorted(CAUSAL) if name not in UNBUILT and name != "falcon"
]  # whose layers for it are a class of their own


@pytest.mark.usefixtures("flash_in_torch")
@pytest.mark.parametrize("model_type", FLASH)
def test_flash_attention_keeps_packs_apart_in_one_sequence_only(model_type: str) -> None:
    config = small_config(model_type)
    model = small_model(config, "eager")
    if model_type in ("gpt2", "gpt-sw3"):
        model = model.double()  # in float32 transformers looks for a dtype of the kernel in linear layers, which these lack
    if not model._supports_flash_attn:
        return
    expected = alone(model)
    way = packs_by(config.to_dict(), "flash_attention_2")
    model = with_flash(model)
    assert way in ("one_sequence", "")
    assert (difference(model, expected, "one_sequence") < CLOSE) == bool(way)
    assert difference(model, expected, "positions") > CLOSE


def test_flash_attention_is_refused_with_a_way_out() -> None:
    reason = why_not_packed({"model_type": "gptj"}, "flash_attention_2")
    assert "`model.attn_implementation: sdpa` or `eager` does" in reason
    assert why_not_packed({"model_type": "gptj"}, "sdpa") == ""
    assert "position_ids" in inspect.signature(AutoModelForCausalLM.from_config(small_config("gptj")).forward).parameters


def test_flex_attention_and_blocks_of_big_bird_are_refused() -> None:
    assert "flex attention gave packed rows wrong logits" in why_not_packed({"model_type": "llama"}, "flex_attention")
    assert "patches or blocks" in why_not_packed({"model_type": "big_bird", "attention_type": "block_sparse"})
    assert packs_by({"model_type": "llama"}, "flex_attention") == ""
