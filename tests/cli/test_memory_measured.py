"""Predicted memory beside what processes of their own really held, on models large enough for it to show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from tests.conftest import tiny_tokenizer, write_jsonl
from tests.runs import peftkit_process

SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6, "vocab_size": 8000}
LLAMA = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2, pad_token_id=0, **SIZES)
BERT = transformers.BertConfig(architectures=["BertModel"], pad_token_id=0, **SIZES)
TEXT = {"text": "the cat sat on a mat and saw two red birds in an old tree " * 8}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (LLAMA, {"task": "CAUSAL_LM", "adapter": {"method": "lora", "target_modules": "all-linear"}}),
    "full": (BERT, {"task": "SEQ_CLS", "adapter": {"method": "full"}}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_holds_what_was_predicted_within_a_fifth(name: str, tmp_path: Path) -> None:
    config, sections = CASES[name]
    config.save_pretrained(tmp_path / "model")
    tiny_tokenizer(None).save_pretrained(tmp_path / "model")
    rows = [TEXT if name == "lora" else TEXT | {"label": f"l{number % 2}"} for number in range(16)]
    recipe = sections | {
        "model": {"name_or_path": str(tmp_path / "model"), "init": "random"},
        "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "max_length": 256, "truncation": "right"},
        "training": {"max_steps": 2, "batch_size": 8, "micro_batch_size": 8},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    process = peftkit_process("train", tmp_path / "recipe.yaml", "--output", tmp_path / "run", "--json", cold=True)
    out, err = process.communicate()
    assert process.returncode == 0, err
    summary = json.loads(out)
    assert summary["predicted_memory_bytes"] == pytest.approx(summary["peak_memory_bytes"], rel=0.2)
