"""What can be turned into a LoRA is, head included, with an error that is told and shrinks with the rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftkit.methods import METHODS
from tests.contracts.matrix import SETTINGS
from tests.runs import run_cli, tiny_recipe, train


def trained(models_dir: Path, folder: Path, task: str, method: str) -> Path:
    """A run of a method."""
    adapter: dict[str, Any] = {"method": method, **SETTINGS.get(method, {})}
    generation = {"generation": {"max_new_tokens": 8}} if task == "CAUSAL_LM" else {}
    recipe = tiny_recipe(task, models_dir, folder, adapter=adapter, training={"learning_rate": 0.05}, **generation)
    train(recipe, folder / "run")
    return folder / "run"


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.to_lora])
def test_an_adapter_of_full_rank_is_converted_nearly_exactly(models_dir: Path, tmp_path: Path, task: str, method: str) -> None:
    run = trained(models_dir, tmp_path, task, method)
    result = run_cli("convert", "--adapter", run, "--output", tmp_path / "lora", "--rank", "0.9999999", "--json")
    assert result.code == 0, result.err
    assert result.json["relative_diff"] < 1e-2
    one = run_cli("convert", "--adapter", run, "--output", tmp_path / "one", "--rank", 1, "--json").json
    assert one["rank_max"] == 1
    assert one["max_abs_diff"] >= result.json["max_abs_diff"]
    rows = tmp_path / "rows.jsonl"
    for adapter in (run, tmp_path / "lora"):
        answered = run_cli("infer", "--adapter", adapter, "--input", rows, "--output", tmp_path / f"{adapter.name}.jsonl")
        assert answered.code == 0, answered.err


def test_rows_measure_the_adapter_before_and_after(models_dir: Path, tmp_path: Path) -> None:
    run = trained(models_dir, tmp_path, "SEQ_CLS", "loha")
    result = run_cli("convert", "--adapter", run, "--output", tmp_path / "lora", "--data", tmp_path / "rows.jsonl", "--json")
    before, after = (result.json[f"metrics_{when}"] for when in ("before", "after"))
    assert result.json["num_rows"] == 21
    assert before["loss"] != after["loss"] == pytest.approx(before["loss"], abs=0.1)
    again = run_cli("evaluate", tmp_path / "lora", "--data", tmp_path / "rows.jsonl", "--json").json["metrics"]
    assert after["loss"] == pytest.approx(again["loss"], abs=1e-6)
    refused = run_cli("convert", "--adapter", run, "--output", tmp_path / "no", "--to", "ia3")
    assert (refused.code, "--to: `ia3` is not allowed" in refused.err) == (2, True)


@pytest.mark.parametrize("method", ["ia3", "prompt_tuning", "bitfit"])
def test_what_cannot_be_converted_is_refused_with_what_can(models_dir: Path, tmp_path: Path, method: str) -> None:
    run = trained(models_dir, tmp_path, "SEQ_CLS", method)
    result = run_cli("convert", "--adapter", run, "--output", tmp_path / "lora")
    assert result.code == 2
    assert f"a {method} adapter cannot be turned into a LoRA; these can: c3a, delora" in result.err
    assert not (tmp_path / "lora").exists()


def test_a_rank_that_is_none_is_refused(models_dir: Path, tmp_path: Path) -> None:
    run = trained(models_dir, tmp_path, "SEQ_CLS", "vera")
    result = run_cli("convert", "--adapter", run, "--output", tmp_path / "lora", "--rank", 2.5)
    assert (result.code, "--rank: 2.5 is neither a whole number nor a share" in result.err) == (2, True)
