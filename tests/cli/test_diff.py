"""`peftkit diff`: in what runs and recipes differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Result

Cli = Callable[..., Result]


@pytest.fixture
def two_runs(cls_run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run and a copy of it to change."""
    shutil.copytree(cls_run, tmp_path / "copy")
    return cls_run, tmp_path / "copy"


def change(path: Path, **values: Any) -> None:
    """Replace facts of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_run_and_its_copy_say_the_same_and_have_the_same_results(cli: Cli, two_runs: tuple[Path, Path]) -> None:
    found = cli("diff", *two_runs, "--json").json
    assert (found["recipe"], found["environment"], found["fingerprints"], found["notes"]) == ({}, {}, {}, [])
    assert all(left == right for left, right in found["results"].values())
    assert {"test.accuracy", "train_loss", "trainable_params"} <= found["results"].keys()
    assert "The recipes say the same." in cli("diff", *two_runs).out


def test_keys_versions_rows_and_results_are_compared(cli: Cli, two_runs: tuple[Path, Path]) -> None:
    run, copy = two_runs
    text = (copy / "resolved.yaml").read_text()
    (copy / "resolved.yaml").write_text(text.replace("learning_rate: 0.02", "learning_rate: 0.5").replace("  r: 8", "  r: 16"))
    facts = json.loads((copy / "environment.json").read_text())
    changed = {"packages": facts["packages"] | {"peft": "0.1"}, "device": "an H100"}
    change(copy / "environment.json", **changed, fingerprints=facts["fingerprints"] | {"data.train": "other"})
    found = cli("diff", run, copy, "--json").json
    assert found["recipe"] == {"adapter.r": [8, 16], "training.learning_rate": [0.02, 0.5]}
    assert {*found["environment"]} == {"peft", "device"}
    assert [*found["fingerprints"]] == ["data.train"]
    shown = cli("diff", run, copy)
    assert shown.code == 0
    assert "an H100" in shown.out
    assert "right - left" in shown.out


def test_of_another_method_only_what_is_not_the_default_is_shown(cli: Cli, two_runs: tuple[Path, Path]) -> None:
    run, copy = two_runs
    before, _, rest = (copy / "resolved.yaml").read_text().partition("adapter:\n")
    (copy / "resolved.yaml").write_text(f"{before}adapter:\n  method: ia3\ndata:\n{rest.partition('data:' + chr(10))[2]}")
    found = cli("diff", run, copy, "--json").json["recipe"]
    assert found["adapter.method"] == ["lora", "ia3"]
    assert found["adapter.target_modules"] == ["all-linear", None]
    assert "adapter.lora_dropout" not in found


def test_a_recipe_is_compared_with_its_run_and_what_it_leaves_open_is_no_difference(cli: Cli, cls_run: Path) -> None:
    recipe = cls_run.parent / "recipe.yaml"
    assert cli("diff", recipe, cls_run, "--json").json["recipe"] == {}


def test_recipes_are_compared_whose_rows_are_not_here(
    cli: Cli, write_recipe: Callable[..., Path], recipe: dict[str, Any]
) -> None:
    one = write_recipe(recipe | {"data": {"train": "gone.jsonl"}})
    other = write_recipe(recipe | {"data": {"train": "away.jsonl"}, "training": {"optim": "paged_adamw_8bit"}}, "other.yaml")
    found = cli("diff", one, other, "--json").json
    assert found["recipe"] == {
        "data.train.path": ["gone.jsonl", "away.jsonl"],
        "training.optim": ["adamw_torch_fused", "paged_adamw_8bit"],
    }
    assert found["results"] == {}


def test_what_a_damaged_run_still_tells_is_compared(cli: Cli, two_runs: tuple[Path, Path]) -> None:
    run, copy = two_runs
    (copy / "environment.json").write_text("{")
    result = cli("diff", run, copy)
    assert result.code == 0
    assert f"{copy}: environment.json cannot be read" in result.err


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [("empty", 7, "is no run directory"), ("gone.yaml", 2, "No such file"), ("bad.yaml", 2, "training.lerning_rate")],
)
def test_what_cannot_be_read_is_told(cli: Cli, cls_run: Path, tmp_path: Path, name: str, code: int, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text(
        "task: SEQ_CLS\nmodel: {name_or_path: a}\ntraining: {lerning_rate: 1}\nadapter: {method: full}"
    )
    result = cli("diff", cls_run, tmp_path / name, "--json")
    assert result.code == code
    assert words in result.err
    assert result.json["problems"]
