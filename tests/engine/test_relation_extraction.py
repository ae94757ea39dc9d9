"""Triples that a model writes, measured through the command line: while training, afterwards, beside the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import WORDS, tiny_tokenizer, write_jsonl
from tests.contracts.tiny_models import save_tiny_model
from tests.runs import lines_of, run_cli, tiny_recipe, train

RECIPE = Path(__file__).parents[2] / "recipes" / "relation_extraction_zh.yaml"
ROWS = [
    {"instruction": f"who {verb} {who}?", "output": f"{who} | {verb} | {what}\n{what} | {verb} | {who}" if place else "none"}
    for place, (who, verb, what) in enumerate(zip(WORDS[:8], ["saw", "ran"] * 4, WORDS[8:16], strict=True))
]
EVALUATION = {"generation_metrics": ["triples"], "batch_size": 8}
TRAINING = {
    "max_steps": 60, "learning_rate": 0.03, "eval_steps": 20, "micro_batch_size": 8, "metric_for_best_model": "triple_f1",
}  # fmt: skip
SCORES = ("triple_precision", "triple_recall", "triple_f1", "triple_malformed")


def recipe_of(models_dir: Path, folder: Path, task: str = "CAUSAL_LM", **training: Any) -> Path:
    names = ("instruction", "output") if task == "CAUSAL_LM" else ("source", "target")
    rows = [dict(zip(names, row.values(), strict=True)) for row in ROWS]
    source = str(write_jsonl(folder / "triples.jsonl", rows))
    adapter = {"method": "lora", "r": 16, "target_modules": "all-linear", "modules_to_save": ["lm_head"]}
    return tiny_recipe(
        task, models_dir, folder, data={"train": source, "validation": source, "max_length": 120}, adapter=adapter,
        evaluation=EVALUATION, generation={"max_new_tokens": 30}, training=TRAINING | training,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("relations")
    train(recipe_of(models_dir, folder), folder / "run")
    return folder / "run"


def test_the_adapter_with_the_best_f1_of_triples_is_kept(run: Path) -> None:
    measured = [line["metrics"]["triple_f1"] for line in lines_of(run) if "triple_f1" in line.get("metrics", {})]
    written = json.loads((run / "evaluations/validation.json").read_text())["metrics"]
    assert written["triple_f1"] == max(measured) > 0.3
    assert set(SCORES) <= written.keys()


def test_the_figures_are_those_of_the_answers_that_are_written_down(run: Path) -> None:
    lines = (run / "evaluations/validation.generations.jsonl").read_text(encoding="utf-8").splitlines()
    right = guessed = wanted = malformed = 0
    for row in map(json.loads, lines):
        sides = [{tuple(piece.strip() for piece in line.split("|")) for line in text.splitlines() if line.count("|") == 2}
                 for text in (row["prediction"], row["reference"])]  # fmt: skip
        guess, truth = ({side for side in found if all(side)} for found in sides)
        assert guess == {tuple(triple) for triple in row["triples"]}
        right, guessed, wanted = right + len(guess & truth), guessed + len(guess), wanted + len(truth)
        malformed += bool(row["malformed"])
    metrics = json.loads((run / "evaluations/validation.json").read_text())["metrics"]
    expected = [right / guessed, right / wanted, 2 * right / (guessed + wanted), malformed / len(lines)]
    assert [metrics[name] for name in SCORES] == pytest.approx(expected)
    assert wanted == 14


def test_beside_the_base_scores_have_intervals(run: Path) -> None:
    result = run_cli("evaluate", run, "--compare-base", "--json")
    assert result.code == 0, result.err
    found = result.json["differences"]["triple_f1"]
    assert result.json["base_metrics"]["triple_f1"] == 0.0
    assert 0 < found["low"] <= found["difference"] == result.json["metrics"]["triple_f1"] <= found["high"]


def test_a_table_shows_how_much_was_malformed(run: Path) -> None:
    result = run_cli("evaluate", run)
    assert "triple_malformed" in result.out


def test_rows_whose_answers_are_no_triples_are_refused_with_their_place(run: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "bad.jsonl", [ROWS[1], {"instruction": "who?", "output": "the cat saw"}])
    result = run_cli("evaluate", run, "--data", data)
    assert result.code == 3
    assert "bad.jsonl:2: the row's answer has something that is no triple: 'the cat saw'" in result.err


def test_encoder_decoder_models_are_measured_too(models_dir: Path, tmp_path: Path) -> None:
    summary = train(recipe_of(models_dir, tmp_path, "SEQ_2_SEQ_LM", max_steps=2, eval_steps=1), tmp_path / "run")
    assert set(SCORES) <= summary["metrics"].keys()


def test_other_tasks_write_no_triples(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path, evaluation=EVALUATION, data={"validation": 0.2})
    for command in ("validate", "plan"):
        result = run_cli(command, recipe)
        assert result.code == 2
        assert "evaluation.generation_metrics: has no effect for SEQ_CLS, which generates no text" in result.err


def test_the_chinese_recipe_trains_on_a_tiny_qwen_and_measures_its_answers(tmp_path: Path) -> None:
    model = save_tiny_model("qwen2", tmp_path / "model", max_position_embeddings=1024)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 1024
    tokenizer.save_pretrained(model)
    keys = [f"model.name_or_path={model}", "training.max_steps=4", "training.eval_steps=2", "generation.max_new_tokens=8"]
    summary = train(RECIPE, tmp_path / "run", *(part for key in keys for part in ("--set", key)))
    assert summary["certificate"]["passed"]
    measured = [line["step"] for line in lines_of(tmp_path / "run") if "triple_f1" in line.get("metrics", {})]
    assert measured[:2] == [2, 4]
    answers = (tmp_path / "run/evaluations/validation.generations.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == 8
    assert sum(len(json.loads(line)["reference_triples"]) for line in answers) >= 8


def test_rows_of_the_chinese_recipe_use_their_relations_and_words_of_their_sentence() -> None:
    lines = (RECIPE.parent / "data/samples/relations_zh.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert (len(rows), len({row["text"] for row in rows})) == (40, 40)
    assert sum(not row["triples"] for row in rows) == 4
    for row in rows:
        for head, relation, tail in row["triples"]:
            assert relation in row["relations"]
            assert head in row["text"]
            assert tail in row["text"]
