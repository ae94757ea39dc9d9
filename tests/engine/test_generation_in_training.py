"""Answers to held-out prompts while training: metrics, samples, the best adapter by one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import instruction_rows, write_jsonl
from tests.runs import lines_of, run_cli, tiny_recipe, train

METRICS = ["chrf", "exact_match", "answer"]
EVALUATION = {"generation_metrics": METRICS, "answer_pattern": r"(\w+)", "generation_rows": 4, "samples": 2}
ADAPTER = {"method": "lora", "r": 8, "target_modules": "all-linear", "modules_to_save": ["lm_head"]}


def recipe_of(models_dir: Path, folder: Path, task: str = "CAUSAL_LM", **sections: Any) -> Path:
    settings = {"max_steps": 40, "learning_rate": 0.02, "eval_steps": 10, "micro_batch_size": 8}
    sections = {"data": {"validation": 0.3}, "evaluation": EVALUATION, "training": settings, "adapter": ADAPTER} | sections
    return tiny_recipe(task, models_dir, folder, generation={"max_new_tokens": 6}, **sections)


@pytest.fixture(scope="module")
def run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generating")
    train(recipe_of(models_dir, folder), folder / "run")
    return folder / "run"


def test_answers_are_measured_once_at_the_end(run: Path) -> None:
    measured = [line["step"] for line in lines_of(run) if "chrf" in line.get("metrics", {})]
    evaluated = [line["step"] for line in lines_of(run) if "metrics" in line]
    assert (len(measured), len(set(evaluated))) == (1, 4)
    written = json.loads((run / "evaluations/validation.json").read_text())
    assert (written["num_generated"], written["num_rows"]) == (4, 6)
    assert {"chrf", "exact_match", "answer_accuracy", "answer_missing", "loss"} <= written["metrics"].keys()
    assert written["signatures"]["chrf"].startswith("nrefs:1|case:mixed")
    summary = json.loads((run / "status.json").read_text())["summary"]["metrics"]
    assert summary["chrf"] == written["metrics"]["chrf"] > 0.0


def test_samples_are_written_at_each_evaluation(run: Path) -> None:
    found = [line for line in lines_of(run) if "samples" in line]
    assert [line["step"] for line in found][:4] == [10, 20, 30, 40]
    for line in found:
        assert [set(sample) for sample in line["samples"]] == [{"row", "prompt", "reference", "prediction"}] * 2
        assert line["split"] == "validation"
    assert found[0]["samples"][0]["prompt"].endswith("<|im_start|>assistant\n")


def test_evaluate_gives_the_same_answers_as_training(run: Path, tmp_path: Path) -> None:
    generations = run / "evaluations/validation.generations.jsonl"
    before, metrics = generations.read_text(), json.loads((run / "evaluations/validation.json").read_text())["metrics"]
    result = run_cli("evaluate", run, "--json").json
    assert result["num_generated"] == 4
    assert generations.read_text() == before
    assert result["metrics"] == pytest.approx(metrics, rel=1e-5)


def test_infer_gives_the_same_answers_too(run: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (run / "evaluations/validation.generations.jsonl").read_text().splitlines()]
    rows = [instruction_rows(21)[int(line["row"].rpartition(":")[2]) - 1] for line in lines]
    source = write_jsonl(tmp_path / "asked.jsonl", [{"instruction": row["instruction"]} for row in rows])
    assert run_cli("infer", "--adapter", run, "--input", source, "--output", tmp_path / "out.jsonl").code == 0
    answers = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answers == [line["prediction"] for line in lines]


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_a_generation_metric_can_decide_on_the_best_adapter(models_dir: Path, tmp_path: Path, task: str) -> None:
    settings = {"metric_for_best_model": "chrf", "eval_steps": 5, "max_steps": 20, "learning_rate": 0.02}
    evaluation = {"generation_metrics": ["chrf"]}
    summary = train(recipe_of(models_dir, tmp_path, task, training=settings, evaluation=evaluation), tmp_path / "run")
    found = [line["metrics"]["chrf"] for line in lines_of(tmp_path / "run") if "metrics" in line]
    assert len(found) in (4, 5)  # the last one of the best adapter, where that is not the last
    assert summary["metrics"]["chrf"] == pytest.approx(max(found))


def test_sampled_answers_leave_training_as_it_is(models_dir: Path, tmp_path: Path) -> None:
    def losses(name: str, **sections: Any) -> list[float]:
        (tmp_path / name).mkdir()
        settings = {"max_steps": 6, "eval_steps": 2, "logging_steps": 1, "learning_rate": 0.01}
        adapter = ADAPTER | {"lora_dropout": 0.3}
        recipe = recipe_of(models_dir, tmp_path / name, training=settings, adapter=adapter, **sections)
        recipe.write_text(recipe.read_text().replace("max_new_tokens: 6", "max_new_tokens: 6\n  do_sample: true"))
        train(recipe, tmp_path / name / "run")
        return [line["loss"] for line in lines_of(tmp_path / name / "run") if "loss" in line]

    assert losses("with", evaluation={"samples": 2}) == losses("without", evaluation={"samples": 0})


def test_rows_whose_answers_cannot_be_compared_stop_the_run_before_the_model_is_loaded(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftkit.commands.train.load_base_model", lambda *arguments: pytest.fail("loaded"))
    recipe = recipe_of(models_dir, tmp_path, evaluation={"generation_metrics": ["answer"], "answer_pattern": "#### (.+)"})
    result = run_cli("train", recipe, "--output", tmp_path / "run")
    assert result.code == 3
    assert "rows.jsonl:1: the row's answer does not match evaluation.answer_pattern" in result.err


def test_rows_without_an_answer_are_named(models_dir: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "texts.jsonl", [{"text": row["instruction"]} for row in instruction_rows(12)])
    data = {"train": str(rows), "validation": 0.3}
    result = run_cli(
        "train", recipe_of(models_dir, tmp_path, data=data, evaluation={"samples": 1}), "--output", tmp_path / "run"
    )
    assert (result.code, "there is no answer to compare a generated one with" in result.err) == (3, True)


def test_processes_share_the_prompts_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkit.engine import questions
    from peftkit.engine.loaded import load_adapter
    from peftkit.tasks.generations import AnswerSettings
    from peftkit.tasks.generations_torch import AnswerScorer

    loaded, scorer = load_adapter(run), AnswerScorer(AnswerSettings(("chrf",)))
    rows = [
        (f"rows:{n}", {"prompt": row["instruction"], "completion": row["output"]}) for n, row in enumerate(instruction_rows(5))
    ]
    asked = questions.questions_of(rows, loaded.prompts, "rows", scorer)
    alone, parts = questions.answer_questions(loaded, asked, scorer, 2), []
    monkeypatch.setattr(questions.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(questions.torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(questions, "gather_object", lambda found: parts.extend(found) or parts)
    for rank in (0, 1):
        monkeypatch.setattr(questions.torch.distributed, "get_rank", lambda rank=rank: rank)
        together = questions.answer_questions(loaded, asked, scorer, 2)
    assert together == alone
