"""Adapters of plain PEFT that tools have merged wrongly: merged here, and compared by PEFT and transformers alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.conftest import Result, tiny_tokenizer

EVERY_LINEAR = {"target_modules": "all-linear"}
BOTH_SAVED = {"modules_to_save": ["embed_tokens", "lm_head"]}
IDS = torch.arange(5, 45)[None, :]


def config_of(kind: str, *, tied: bool) -> Any:
    """The config of a tiny model."""
    common = {"vocab_size": 300, "pad_token_id": 0, "tie_word_embeddings": tied}
    if kind == "gpt2":
        return transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **common)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **common}
    if kind == "mixtral":
        return transformers.MixtralConfig(num_key_value_heads=4, num_local_experts=4, **sizes)
    return transformers.LlamaConfig(**sizes)


def make_adapter(folder: Path, kind: str, fields: dict[str, Any], *, tied: bool, added: int = 0) -> tuple[Path, Any]:
    """A base of random weights, an adapter for it that is not trained and does much, and the model of both."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config_of(kind, tied=tied)).save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = tiny_tokenizer()
    if added:
        tokenizer.add_tokens([f"<new-{number}>" for number in range(added)])
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "init_lora_weights": False, **fields})
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter) * ("lora_" not in name)
    model.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    return folder / "adapter", model.eval()


@torch.no_grad()
def merged_alone(cli: Callable[..., Result], adapter: Path, model: Any, *arguments: str) -> Any:
    """The merged model as transformers alone loads it, once its logits are those of PEFT's model."""
    folder = adapter.parent / "merged"
    result = cli("merge", "--adapter", adapter, "--output", folder, "--json", *arguments)
    assert result.code == 0, result.err
    alone = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(alone(IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=1e-5)
    assert not torch.allclose(alone(IDS).logits, copy.deepcopy(model).unload()(IDS).logits, rtol=0, atol=1e-2)
    return alone


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "fields",
    [
        BOTH_SAVED | EVERY_LINEAR,
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [5, 6, 7]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ],
    ids=["both saved", "head saved", "embedding saved", "tokens", "embedding", "head", "embedding and head"],
)
def test_adapted_embeddings_are_merged(cli: Any, tmp_path: Path, fields: dict[str, Any], tied: bool) -> None:
    adapter, model = make_adapter(tmp_path, "llama", fields, tied=tied)
    merged_alone(cli, adapter, model)


@pytest.mark.parametrize(
    ("fields", "tied"),
    [
        (EVERY_LINEAR, False),
        (EVERY_LINEAR, True),
        (BOTH_SAVED, False),
        (BOTH_SAVED, True),
        ({"trainable_token_indices": [300, 301, 302]}, False),
        ({"trainable_token_indices": [300, 301, 302]}, True),
        ({"target_modules": ["embed_tokens", "q_proj"]}, True),
    ],
    ids=["untouched", "untouched tied", "saved", "saved tied", "tokens", "tokens tied", "adapted tied"],
)
def test_tokens_that_were_added_before_training_are_in_the_merged_model(
    cli: Any, tmp_path: Path, fields: dict[str, Any], tied: bool
) -> None:
    adapter, model = make_adapter(tmp_path, "llama", fields, tied=tied, added=3)
    alone = merged_alone(cli, adapter, model)
    expected = copy.deepcopy(model).merge_and_unload().get_input_embeddings().weight
    torch.testing.assert_close(alone.get_input_embeddings().weight, expected, rtol=0, atol=1e-6)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")) == alone.config.vocab_size == 303


def test_added_tokens_whose_output_weights_are_lost_are_refused(cli: Any, tmp_path: Path) -> None:
    adapter, _ = make_adapter(tmp_path, "llama", {"target_modules": ["embed_tokens"]}, tied=False, added=3)
    result = cli("merge", "--adapter", adapter, "--output", tmp_path / "merged")
    assert (result.code, "with 303 tokens on a base of 300, and has no weights of the output layer" in result.err) == (7, True)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", EVERY_LINEAR | {"use_dora": True}),
        ("llama", EVERY_LINEAR | {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ],
    ids=["dora", "rslora and patterns", "conv1d", "experts"],
)
def test_other_kinds_of_layers_are_merged(cli: Any, tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    adapter, model = make_adapter(tmp_path, kind, fields, tied=False)
    merged_alone(cli, adapter, model)
    names = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("base", "merged")]
    assert names[0] == names[1]  # experts are stored one by one, as the base stores them


def test_the_merged_model_is_written_in_shards_with_an_index(cli: Any, tmp_path: Path) -> None:
    adapter, model = make_adapter(tmp_path, "llama", EVERY_LINEAR, tied=False)
    merged_alone(cli, adapter, model, "--max-shard-size", "50KB")
    shards = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(shard.stat().st_size < 60_000 for shard in shards)
    assert (tmp_path / "merged/model.safetensors.index.json").is_file()


@pytest.mark.parametrize("size", ["0GB", "5 apples", "-1GB", "5"])
def test_a_shard_size_that_is_none_is_refused(cli: Any, tmp_path: Path, size: str) -> None:
    result = cli("merge", "--adapter", tmp_path, "--output", tmp_path / "merged", f"--max-shard-size={size}")
    assert (result.code, f"--max-shard-size: `{size}` is no size" in result.err) == (2, True)
