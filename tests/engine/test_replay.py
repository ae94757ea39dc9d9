"""The first steps of a run once more: equal where nothing has changed, else what differs and since when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftkit.run import Run, write_json, write_text
from tests.runs import lines_of, run_cli, tiny_recipe, train


@pytest.fixture(scope="module")
def recorded(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with dropout, logged every second one."""
    folder = tmp_path_factory.mktemp("recorded")
    adapter = {"method": "lora", "r": 4, "lora_dropout": 0.2}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, folder, adapter=adapter, training={"logging_steps": 2})
    train(recipe, folder / "run")
    return folder / "run"


def replayed(run: Path, *arguments: Any) -> tuple[int, dict[str, Any]]:
    result = run_cli("replay", run, "--json", *arguments)
    return result.code, result.json


def test_a_run_replays_bit_for_bit(recorded: Path) -> None:
    before = sorted(path.name for path in recorded.rglob("*"))
    code, result = replayed(recorded, "--steps", 5)
    assert (code, result["equal"], result["steps"], result["max_loss_difference"]) == (0, True, [2, 4], 0.0)
    assert (result["differences"], result["environment"]) == ({}, {})
    assert sorted(path.name for path in recorded.rglob("*")) == before


def test_every_difference_is_told_with_its_step(recorded: Path, tmp_path: Path) -> None:
    lines = lines_of(recorded)
    lines[1] |= {"loss": lines[1]["loss"] + 0.5, "rows": "other"}
    facts = Run(recorded).read_environment()
    write_json(
        tmp_path / "environment.json", facts | {"initial_weights": "x", "packages": facts["packages"] | {"torch": "1.0"}}
    )
    write_text(tmp_path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_text(tmp_path / "resolved.yaml", (recorded / "resolved.yaml").read_text())
    code, result = replayed(tmp_path, "--steps", 6)
    assert (code, result["max_loss_difference"]) == (6, pytest.approx(0.5))
    assert result["differences"]["initial_weights"].startswith("was x, is ")
    assert result["differences"]["rows"].startswith("step 4: was other, is ")
    assert result["differences"]["loss"].startswith("step 4: was ")
    assert result["environment"]["torch"].startswith("was 1.0, is ")


def test_steps_that_were_not_logged_cannot_be_compared(cli: Any, recorded: Path) -> None:
    result = cli("replay", recorded, "--steps", 1)
    assert result.code == 2
    assert "has no line that far; its first line is at step 2" in result.err
