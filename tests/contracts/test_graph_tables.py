"""Which adapters and architectures become ONNX files that answer alike; `make export-check` runs it (an hour on one core)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from peftkit.methods import METHODS
from tests.contracts.matrix import Cell, experts_of, refusal, write_recipe
from tests.contracts.test_architectures import ADAPTERS, trained
from tests.contracts.tiny_models import save_tiny_model
from tests.runs import run_cli

pytestmark = pytest.mark.export_tables
GUIDE = (Path(__file__).parents[2] / "docs/exporting_onnx.md").read_text(encoding="utf-8")
UNMERGED = [name for name, method in METHODS.items() if method.not_mergeable or name == "beft"]
PLACES = {"CAUSAL_LM": "llama", "SEQ_CLS": "bert", "SEQ_2_SEQ_LM": "t5"}
MODELS = {
    "CAUSAL_LM": (
        "bloom", "cohere", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "granite",
        "llama", "mistral", "mixtral", "mpt", "olmo2", "opt", "phi", "qwen2", "qwen3", "qwen3_moe",
    ),
    "SEQ_CLS": (
        "albert", "bart", "bert", "deberta-v2", "distilbert", "electra", "gpt2", "llama", "modernbert", "mpnet",
        "roberta", "t5", "xlnet",
    ),
    "TOKEN_CLS": ("deberta-v2", "llama", "modernbert"),
    "QUESTION_ANS": ("llama", "roberta"),
    "FEATURE_EXTRACTION": ("llama", "modernbert"),
    "SEQ_2_SEQ_LM": ("bart", "t5"),
}  # fmt: skip
FAILS = {("SEQ_CLS", "xlnet"): "XLNetForSequenceClassification cannot be traced"}


def export(run: Path, *arguments: str) -> Any:
    """`peftkit export` to ONNX."""
    return run_cli("export", "--adapter", run, "--target", "onnx", "--json", *arguments)


@pytest.mark.parametrize("method", UNMERGED)
@pytest.mark.parametrize("task", PLACES)
def test_an_adapter_that_cannot_be_merged_is_one_graph_with_its_base_or_refused(
    task: str, method: str, models_dir: Path, tmp_path: Path
) -> None:
    cell = Cell(method, task, PLACES[task])
    experts = experts_of(cell, models_dir, tmp_path) if method == "xlora" else None
    recipe = write_recipe(cell, models_dir, tmp_path, experts)
    if refusal(recipe):
        return
    assert run_cli("train", recipe, "--output", tmp_path / "run", "--json").code == 0
    named = ["--set", "task_id=second"] if cell.facts.num_tasks_field else []
    result = export(tmp_path / "run", "--set", "form=adapter", *named)
    if cell.facts.not_one_graph:
        assert result.code == 2
        assert cell.facts.not_one_graph in " ".join(result.err.split())
        assert f"`{method}`" in GUIDE
        return
    assert result.code == 0, result.err
    assert result.json["exports"][0]["check"]["passed"]


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in MODELS.items() for name in names])
def test_an_architecture_is_exported_and_answers_alike_or_is_refused(task: str, name: str, tmp_path: Path) -> None:
    model = save_tiny_model(name, tmp_path / "model")
    trained(tmp_path / "cell", task, model, ADAPTERS["lora"])
    result = export(tmp_path / "cell/run")
    if (task, name) in FAILS:
        assert result.code == 2
        assert FAILS[task, name] in " ".join(result.err.split())
        return
    assert result.code == 0, result.err
    assert result.json["exports"][0]["check"]["passed"]


def test_the_guide_names_the_architectures_of_the_table() -> None:
    (section,) = re.findall(r"^## Architectures\n(.*?)^## ", GUIDE, re.MULTILINE | re.DOTALL)
    rows = dict(re.findall(r"^\| (\w+) \| ([^|]*) \|", section, re.MULTILINE))
    for task, names in MODELS.items():
        assert set(rows[task].split(", ")) == {name for name in names if (task, name) not in FAILS}
