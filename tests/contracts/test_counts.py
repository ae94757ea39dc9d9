"""Parameter counts from a config alone: those that PEFT publishes for its benchmark, and those of bare PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LLAMA_3B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "tie_word_embeddings": True, "max_position_embeddings": 131072,
}  # fmt: skip
BLOOMZ = {
    "model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 1024, "n_layer": 24, "n_head": 16,
    "vocab_size": 250880,
}  # fmt: skip

# peft's method_comparison (MetaMathQA), experiments of these names: trainable, and all where it is given.
ON_LLAMA: list[tuple[dict[str, Any], int, int | None]] = [
    ({"method": "lora", "r": 32, "target_modules": ["q_proj", "v_proj"]}, 9_175_040, None),
    ({"method": "lora", "r": 32, "use_dora": True, "target_modules": ["q_proj", "v_proj"]}, 9_289_728, None),
    ({"method": "ia3"}, 286_720, None),
    ({"method": "adalora", "init_r": 64, "target_r": 32}, 18_353_664, None),
    ({"method": "oft", "r": 32, "oft_block_size": 0}, 8_171_520, None),
    ({"method": "vera"}, 129_024, None),
    ({"method": "prefix_tuning", "num_virtual_tokens": 200}, 11_468_800, 3_224_218_624),
    ({"method": "p_tuning", "num_virtual_tokens": 20, "encoder_hidden_size": 3072}, 28_382_208, None),
]
# peft 0.21.2 on the meta device, where it can: trainable and all.
ON_BLOOMZ: list[tuple[dict[str, Any], int, int | None]] = [
    ({"method": "lora"}, 786_432, 560_001_024),
    ({"method": "lora", "r": 16}, 1_572_864, 560_787_456),
    ({"method": "lora", "target_modules": "all-linear"}, 3_145_728, 562_360_320),
    ({"method": "lora", "use_dora": True}, 860_160, 560_074_752),
    ({"method": "prompt_tuning", "num_virtual_tokens": 8}, 8_192, 559_222_784),
    ({"method": "prefix_tuning", "num_virtual_tokens": 20}, 983_040, 560_197_632),
    ({"method": "prefix_tuning", "num_virtual_tokens": 30}, 1_474_560, 560_689_152),
    ({"method": "prefix_tuning", "num_virtual_tokens": 20, "prefix_projection": True}, 51_450_880, 610_665_472),
    ({"method": "p_tuning", "num_virtual_tokens": 20, "encoder_hidden_size": 128}, 300_288, 559_514_880),
    (
        {
            "method": "p_tuning", "num_virtual_tokens": 20, "encoder_hidden_size": 128,
            "encoder_reparameterization_type": "LSTM",
        },
        1_926_400, 561_140_992,
    ),
    ({"method": "ia3"}, 172_032, 559_386_624),
    ({"method": "adalora"}, 1_179_936, 560_394_552),
    ({"method": "ln_tuning"}, 100_352, 559_314_944),
    ({"method": "loha"}, 1_572_864, 560_787_456),
    ({"method": "lokr"}, 55_296, 559_269_888),
    ({"method": "oft"}, 380_928, 559_595_520),
    ({"method": "vera"}, 79_872, 559_294_464),
    ({"method": "fourierft"}, 24_000, 559_238_592),
    ({"method": "hra"}, 196_608, 559_411_200),
    ({"method": "miss"}, 4_718_592, 563_933_184),
    ({"method": "road"}, 73_728, 559_288_320),
    ({"method": "randlora"}, 811_008, 560_025_600),
    ({"method": "c3a"}, 294_912, 559_509_504),
    ({"method": "waveft"}, 62_208, 559_276_800),
    ({"method": "vblora"}, 458_752, 559_673_344),
    ({"method": "hira"}, 3_145_728, 562_360_320),
    ({"method": "delora"}, 786_456, 560_001_048),
    ({"method": "gralora"}, 3_145_728, 562_360_320),
    ({"method": "poly", "n_tasks": 1}, 3_145_824, 562_360_416),
    ({"method": "cartridge", "num_virtual_tokens": 20}, 933_888, 560_197_632),
    ({"method": "trainable_tokens", "token_indices": list(range(10))}, 10_240, 559_224_832),
    ({"method": "tinylora"}, 1_536, 559_216_128),
    ({"method": "beft"}, 73_728, 559_288_320),
    ({"method": "psoft"}, 13_440, 559_228_032),
    ({"method": "osf"}, 113_270_784, 672_485_376),
    ({"method": "lily"}, 984_576, 560_199_168),
    ({"method": "peanut"}, 4_718_592, 563_933_184),
    ({"method": "supertuning"}, 754_968, 559_969_560),
    ({"method": "deft"}, 786_432, 560_001_024),
    ({"method": "glora"}, 1_769_712, 560_984_304),
    ({"method": "pvera"}, 86_016, 559_300_608),
    # Not possible on bare PEFT: the shapes' own formulas, which the matrix compares with trained adapters.
    ({"method": "shira"}, 3_145_728, 562_360_320),
    ({"method": "unilora"}, 256, 559_214_848),
    ({"method": "boft"}, 172_032, 559_386_624),
]  # fmt: skip


def _count(cli: Callable[..., Any], folder: Path, config: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"task": "CAUSAL_LM", "model": {"name_or_path": str(model)}, "adapter": adapter}))
    result = cli("params", recipe, "--json")
    assert result.code == 0, result.err
    counts: dict[str, Any] = result.json
    return counts


def _id(case: tuple[dict[str, Any], int, int | None]) -> str:
    return "-".join(str(value) for value in case[0].values() if not isinstance(value, list))


@pytest.mark.parametrize("case", ON_LLAMA, ids=_id)
def test_counts_on_llama_3b_are_those_that_peft_publishes(cli: Callable[..., Any], tmp_path: Path, case: Any) -> None:
    adapter, trainable, total = case
    counts = _count(cli, tmp_path, LLAMA_3B, adapter)
    assert counts["trainable_params"] == trainable
    assert total is None or counts["all_params"] == total


@pytest.mark.parametrize("case", ON_BLOOMZ, ids=_id)
def test_counts_on_bloomz_are_those_of_bare_peft(cli: Callable[..., Any], tmp_path: Path, case: Any) -> None:
    adapter, trainable, total = case
    counts = _count(cli, tmp_path, BLOOMZ, adapter)
    assert counts["trainable_params"] == trainable
    assert total is None or counts["all_params"] == total
