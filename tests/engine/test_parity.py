"""Rows of training give the same tokens wherever the adapter is used, or the command stops with exit code 6."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHATML
from tests.runs import run_cli, tiny_recipe, train

TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@pytest.fixture(scope="module")
def runs(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One trained run of each task."""
    found = {}
    for task in TASKS:
        folder = tmp_path_factory.mktemp(task)
        train(tiny_recipe(task, models_dir, folder, training={"max_steps": 1}), folder / "run")
        found[task] = folder / "run"
    return found


def kept(run: Path) -> list[dict[str, Any]]:
    """The renderings in a run's adapter folder."""
    content = json.loads((run / "adapter" / "renderings.json").read_text(encoding="utf-8"))
    return list(content["renderings"])


@pytest.mark.parametrize("task", TASKS)
def test_five_rows_are_kept_with_their_tokens(runs: dict[str, Path], task: str) -> None:
    rows = kept(runs[task])
    assert len(rows) == 5
    assert all(row["row"] and row["input_ids"][0] for row in rows)


def test_a_conversation_is_kept_with_its_text_and_its_prompt(runs: dict[str, Path]) -> None:
    first = kept(runs["CAUSAL_LM"])[0]
    assert first["text"].startswith(first["generation_prompt"])
    assert first["generation_prompt"].endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("task", TASKS)
def test_other_tokens_stop_the_answer(runs: dict[str, Path], tmp_path: Path, task: str) -> None:
    shutil.copytree(runs[task], tmp_path / "run")
    path = tmp_path / "run" / "adapter" / "renderings.json"
    rows = kept(tmp_path / "run")
    rows[3]["input_ids"][0][1] += 1
    path.write_text(json.dumps({"renderings": rows}), encoding="utf-8")
    prompt = '{"question": "who?", "context": "tom sat"}' if task == "QUESTION_ANS" else "the cat"
    result = run_cli("infer", "--adapter", tmp_path / "run", "--prompt", prompt)
    assert result.code == 6
    assert "row 4 of training gives another `input_ids` than in training" in result.err


@pytest.fixture
def changed(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A run whose chat template was changed afterwards, in its generation prompt alone."""
    shutil.copytree(runs["CAUSAL_LM"], tmp_path / "run")
    changed = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant")
    (tmp_path / "run" / "adapter" / "chat_template.jinja").write_text(changed, encoding="utf-8")
    return tmp_path / "run"


def test_another_generation_prompt_stops_infer_evaluate_and_merge(changed: Path, tmp_path: Path) -> None:
    commands = [
        ("infer", "--adapter", changed, "--prompt", "hello"),
        ("evaluate", changed, "--data", tmp_path / "rows.jsonl"),
        ("merge", "--adapter", changed, "--output", tmp_path / "merged"),
    ]
    for command in commands:
        result = run_cli(*command)
        assert result.code == 6, command
        assert "row 1 of training gives another `generation_prompt` than in training" in result.err
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_keeps_the_renderings(runs: dict[str, Path], tmp_path: Path) -> None:
    assert run_cli("merge", "--adapter", runs["CAUSAL_LM"], "--output", tmp_path / "merged").code == 0
    assert json.loads((tmp_path / "merged" / "renderings.json").read_text())["renderings"] == kept(runs["CAUSAL_LM"])


DATED = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML


def test_a_template_that_writes_the_date_gives_the_same_tokens_on_another_day(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dated.jinja").write_text(DATED, encoding="utf-8")
    model = {"name_or_path": str(models_dir / "llama"), "chat_template": str(tmp_path / "dated.jinja")}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model=model, training={"max_steps": 1}, data={"max_length": 120})
    train(recipe, tmp_path / "run")
    day = json.loads((tmp_path / "run" / "environment.json").read_text())["template_date"]
    facts = tmp_path / "run" / "adapter" / "peftkit.json"
    assert f'"template_date": "{day}"' in facts.read_text()
    rows = kept(tmp_path / "run")
    # As if it had been trained on another day: the tokens of that day are those to give again.
    for row in rows:
        row.pop("input_ids")
        row["text"] = "Today is 26 Jul 2024.\n" + row["text"].partition("\n")[2]
        row["generation_prompt"] = "Today is 26 Jul 2024.\n" + row["generation_prompt"].partition("\n")[2]
    (tmp_path / "run" / "adapter" / "renderings.json").write_text(json.dumps({"renderings": rows}))
    facts.write_text(facts.read_text().replace(day, "2024-07-26"))
    result = run_cli("infer", "--adapter", tmp_path / "run", "--prompt", "hello")
    assert "gives another `text`" not in result.err
    assert "gives another `input_ids`" in result.err
