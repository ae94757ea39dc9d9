"""What needs a CUDA GPU: skipped where there is none."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import rows_of, tiny_tokenizer, write_jsonl
from tests.runs import tiny_recipe

_HERE = Path(__file__).parent
LARGE = {
    "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 8, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder."""
    has_gpu = torch.cuda.is_available()
    for item in items:
        if item.path.parent == _HERE:
            item.add_marker(pytest.mark.gpu)
            if not has_gpu:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU"))


@pytest.fixture(autouse=True)
def _fresh_gpu() -> Iterator[None]:
    """What one test holds at most is not counted for the next."""
    yield
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@pytest.fixture(scope="session")
def large_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config and tokenizer of a Llama of 255M parameters; `init: random` makes its weights."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("large")
    LlamaConfig(architectures=["LlamaForCausalLM"], **LARGE).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def large_recipe(large_llama: Path, tmp_path: Path) -> Any:
    """Write a recipe of three steps on the large Llama, in rows of up to 600 tokens: `large_recipe(training={...})`."""
    rows = rows_of("CAUSAL_LM", 48)
    for number, row in enumerate(rows):
        row["output"] = " ".join([row["output"]] * (4 + 5 * number % 31))
    source = write_jsonl(tmp_path / "long.jsonl", rows)

    def write(**sections: dict[str, Any]) -> Path:
        defaults: dict[str, dict[str, Any]] = {
            "model": {"name_or_path": str(large_llama), "init": "random"},
            "adapter": {"method": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
            "data": {"train": str(source), "max_length": 1024},
            "training": {"learning_rate": 1e-4, "max_steps": 3, "batch_size": 16, "micro_batch_size": 8},
        }
        merged = {name: values | sections.get(name, {}) for name, values in defaults.items()}
        if "method" in sections.get("adapter", {}):
            merged["adapter"] = sections["adapter"]
        return tiny_recipe("CAUSAL_LM", large_llama.parent, tmp_path, **merged)

    return write
