"""QUESTION_ANS: windows over the whole context, and the best span over all of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from peftkit.formats.base import RowError
from peftkit.tasks import TASKS, squad
from peftkit.tasks.encoding import Encoding, SpanSettings
from peftkit.tasks.example import IGNORE_INDEX, Example, Runtime
from tests.conftest import bert_like_tokenizer, question_rows, tiny_tokenizer, write_jsonl
from tests.runs import curve, run_cli, tiny_recipe, train

CONTEXT = "the cat sat on a mat and saw two red birds in an old tree while seven small dogs ran home"
ROW = {
    "question": "who ran?",
    "context": CONTEXT,
    "answers": {"text": ["small dogs"], "answer_start": [CONTEXT.index("small")]},
}
NO_ANSWER = ROW | {"answers": {"text": [], "answer_start": []}}


def runtime_of(tokenizer: Any = None, max_length: int = 40, **span: Any) -> Runtime:
    settings = Encoding(max_length, span=SpanSettings(**{"doc_stride": 6} | span))
    return TASKS["QUESTION_ANS"].runtime(tokenizer or bert_like_tokenizer(), settings)


def encoded(runtime: Runtime, row: dict[str, Any] = ROW, *, target: bool = True) -> Example:
    (example,) = runtime.encode(row, "rows:1", target=target)
    return example


@pytest.mark.parametrize("max_length", [24, 40, 300])
@pytest.mark.parametrize("tokenizer", [bert_like_tokenizer, tiny_tokenizer], ids=["special tokens", "byte level"])
def test_windows_cover_the_whole_context_and_keep_to_the_length(tokenizer: Any, max_length: int) -> None:
    example = encoded(runtime_of(tokenizer(), max_length))
    covered = {place for window in example.details["windows"] for a, b in window.offsets for place in range(a, b)}
    assert {place for place, letter in enumerate(CONTEXT) if letter != " "} <= covered
    assert all(len(ids) <= max_length for ids in example.inputs["input_ids"])
    assert (len(example.sequences) == 1) == (max_length == 300)
    assert example.num_targets == len(example.sequences)


def test_neighbouring_windows_share_the_stride() -> None:
    first, second, *_ = encoded(runtime_of(max_length=40)).details["windows"]
    assert len(set(first.offsets) & set(second.offsets)) == 6


def test_labels_point_at_the_answer_in_windows_that_hold_it_and_at_cls_in_others() -> None:
    runtime = runtime_of()
    example = encoded(runtime)
    found = []
    for ids, (start, end, length) in zip(example.inputs["input_ids"], example.labels, strict=True):
        assert length == len(ids)
        if (start, end) != (0, 0):
            found.append(runtime.tokenizer.decode(ids[start : end + 1]).replace(" ", ""))
    assert found
    assert set(found) == {"smalldogs"}
    assert len(found) < len(example.sequences)
    assert runtime.tokenizer.convert_ids_to_tokens(example.inputs["input_ids"][0][0]) == "[CLS]"


def test_a_question_without_answer_points_at_cls_everywhere() -> None:
    assert all(label[:2] == [0, 0] for label in encoded(runtime_of(), NO_ANSWER).labels)


def test_an_answer_that_no_window_holds_is_refused() -> None:
    long = CONTEXT[4:60]
    with pytest.raises(RowError, match="no window of 24 tokens holds the whole answer"):
        runtime_of(max_length=24).encode(ROW | {"answers": {"text": [long], "answer_start": [4]}}, "rows:1")


def test_a_question_that_fills_the_window_is_refused() -> None:
    with pytest.raises(RowError, match="leaves no room for the context in 24"):
        runtime_of(max_length=24).encode(ROW | {"question": CONTEXT}, "rows:1")


def test_the_parts_of_a_pair_are_told_apart_and_reach_the_model(models_dir: Path) -> None:
    runtime = runtime_of()
    batch = runtime.collate([encoded(runtime)])
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert batch["token_type_ids"].sum() > 0
    model = AutoModelForQuestionAnswering.from_pretrained(models_dir / "bert").eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    assert torch.equal(runtime.forward(model, batch)[..., 0], model(**inputs).start_logits)
    del inputs["token_type_ids"]
    assert not torch.allclose(runtime.forward(model, batch)[..., 0], model(**inputs).start_logits)


def test_the_loss_of_a_window_is_the_mean_of_start_and_end_without_padding() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [50.0, 50.0]], [[0.0, 0.0]] * 3, [[7.0, 7.0]] * 3])
    labels = torch.tensor([[0, 1, 2], [1, 2, 3], [IGNORE_INDEX] * 3])
    first = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    assert float(runtime_of().loss_sum(logits, labels)) == pytest.approx(first + math.log(3), rel=1e-6)


def logits_for(example: Example, spans: dict[tuple[int, int, int], float]) -> torch.Tensor:
    """Logits that score (window, start, end) as given, half at either end; all else is 0."""
    logits = torch.zeros(len(example.sequences), example.length, 2)
    for (window, start, end), score in spans.items():
        logits[window, start, 0] = logits[window, end, 1] = score / 2
    return logits


def best(runtime: Runtime, example: Example, spans: dict[tuple[int, int, int], float]) -> dict[str, Any]:
    (result,) = runtime.score(logits_for(example, spans), runtime.collate([example]), [example])
    return result


def test_the_best_span_of_all_windows_wins() -> None:
    runtime = runtime_of()
    example = encoded(runtime)
    window = next(number for number, label in enumerate(example.labels) if label[:2] != [0, 0])
    start, end, _ = example.labels[window]
    other = example.details["windows"][0].first
    result = best(runtime, example, {(window, start, end): 9.0, (0, other, other): 8.0})
    assert (result["prediction"], result["exact_match"], result["f1"]) == ("small dogs", 1.0, 1.0)
    assert CONTEXT[result["start"] : result["end"]] == "small dogs"
    assert 0 < result["score"] < 1


def test_no_span_reaches_into_the_question_or_beyond_the_longest_answer() -> None:
    runtime = runtime_of(max_answer_length=1)
    example = encoded(runtime)
    first = example.details["windows"][0].first
    result = best(runtime, example, {(0, 1, 2): 90.0, (0, first, first + 5): 80.0, (1, first + 1, first + 1): 20.0})
    assert result["end"] - result["start"] <= 5  # one token
    assert result["prediction"] in CONTEXT


def test_the_score_of_a_span_is_its_share_of_all_allowed_spans() -> None:
    runtime = runtime_of(bert_like_tokenizer(), 300, max_answer_length=2)
    example = encoded(runtime)
    num_tokens = len(example.details["windows"][0].offsets)
    first = example.details["windows"][0].first
    result = best(runtime, example, {(0, first, first): 2.0})
    # One span scores 2; that of two tokens from the same start and that to the same end share a half; all others are 0.
    others = 2 * num_tokens - 1 - 2
    assert result["score"] == pytest.approx(math.exp(2) / (math.exp(2) + math.e + others), rel=1e-5)


@pytest.mark.parametrize(("threshold", "answer"), [(0.0, ""), (5.0, "cat")])
def test_no_answer_wins_where_its_score_is_beyond_the_threshold(threshold: float, answer: str) -> None:
    runtime = runtime_of(bert_like_tokenizer(), 300, unanswerable=True, null_score_threshold=threshold, max_answer_length=3)
    example = encoded(runtime, NO_ANSWER)
    window = example.details["windows"][0]
    start, end = window.place(4, 7)
    result = best(runtime, example, {(0, 0, 0): 6.0, (0, start, end): 4.0})
    assert result["prediction"] == answer
    assert result["exact_match"] == float(answer == "")
    assert (result["start"] is None) == (answer == "")


def test_without_unanswerable_rows_in_train_there_is_always_an_answer() -> None:
    runtime = runtime_of(unanswerable=False)
    assert best(runtime, encoded(runtime), {(0, 0, 0): 60.0})["prediction"]


@pytest.mark.parametrize(
    ("guess", "answers", "exact", "f1"),
    [
        ("The cat!", ["cat"], 1.0, 1.0),
        ("red birds", ["two red birds"], 0.0, 0.8),
        ("two", ["red", "two red"], 0.0, 2 / 3),
        ("", [], 1.0, 1.0),
        ("cat", [], 0.0, 0.0),
        ("", ["cat"], 0.0, 0.0),
    ],
)
def test_answers_are_compared_as_squad_does(guess: str, answers: list[str], exact: float, f1: float) -> None:
    assert (squad.exact_match(guess, answers), squad.f1(guess, answers)) == (exact, pytest.approx(f1))


def test_metrics_are_also_given_apart_for_questions_without_answer() -> None:
    known = {"answers": ["a"], "exact_match": 0.0, "f1": 0.5, "loss_sum": 3.0, "num_targets": 2}
    found = runtime_of().summarise([known, {"answers": [], "exact_match": 1.0, "f1": 1.0, "loss_sum": 1.0, "num_targets": 2}])
    assert (found["loss"], found["exact_match"], found["f1"]) == (1.0, 0.5, 0.75)
    assert (found["has_answer_f1"], found["no_answer_exact_match"]) == (0.5, 1.0)
    assert "no_answer_f1" not in runtime_of().summarise([known])


@pytest.fixture(scope="module")
def runs(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of six steps by the size of their micro-batches."""
    folders = {}
    for size in (8, 4, 2):
        folder = tmp_path_factory.mktemp(f"answers{size}")
        test = write_jsonl(folder / "test.jsonl", question_rows(24)[-6:])
        recipe = tiny_recipe("QUESTION_ANS", models_dir, folder, training={"micro_batch_size": size}, data={"test": str(test)})
        train(recipe, folder / "run")
        folders[size] = folder / "run"
    return folders


def test_losses_are_the_same_for_every_micro_batch(runs: dict[int, Path]) -> None:
    curves = [[value for line in curve(run, "loss", "grad_norm") for value in line] for run in runs.values()]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)


def test_the_run_reports_the_metrics_of_its_predictions(runs: dict[int, Path]) -> None:
    result = run_cli("evaluate", runs[8], "--json").json
    lines = [json.loads(line) for line in (runs[8] / "evaluations/test.predictions.jsonl").read_text().splitlines()]
    assert result["metrics"]["exact_match"] == sum(line["exact_match"] for line in lines) / 6
    assert all(line["loss_sum"] >= 0 for line in lines)


def test_a_prompt_is_a_json_object(runs: dict[int, Path]) -> None:
    prompt = json.dumps({"question": "who ran?", "context": CONTEXT})
    result = run_cli("infer", "--adapter", runs[8], "--prompt", prompt, "--json").json
    assert set(result) == {"prompt", "prediction", "score", "start", "end"}
    assert result["prediction"] == ("" if result["start"] is None else CONTEXT[result["start"] : result["end"]])
    refused = run_cli("infer", "--adapter", runs[8], "--prompt", "who ran?")
    assert refused.code == 3
    assert "must be a JSON object" in refused.err


@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_file_of_questions_is_answered(runs: dict[int, Path], tmp_path: Path, batch_size: int) -> None:
    rows = [
        {"question": row["question"], "context": row["context"] * (1 + number)} for number, row in enumerate(question_rows(3))
    ]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    arguments = ("--input", source, "--output", tmp_path / "out.jsonl", "--batch-size", batch_size)
    assert run_cli("infer", "--adapter", runs[8], *arguments).code == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["context"] for row in found] == [row["context"] for row in rows]
    assert all({"prediction", "score"} <= set(row) for row in found)


def test_wrong_rows_are_named_with_their_file(models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("QUESTION_ANS", models_dir, tmp_path)
    with (tmp_path / "rows.jsonl").open("a") as handle:
        handle.write(json.dumps(ROW | {"answers": {"text": ["cat"], "answer_start": [5]}}) + "\n")
    result = run_cli("plan", recipe)
    assert result.code == 3
    assert "rows.jsonl:22: the answer 'cat' is not in the context at `answer_start` 5: there is 'at '" in result.err


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"evaluation": {"null_score_threshold": 1.0}}, "evaluation.null_score_threshold"),
        ({"data": {"truncation": "right"}}, "data.truncation"),
    ],
)
def test_settings_without_effect_are_refused(models_dir: Path, tmp_path: Path, sections: dict[str, Any], key: str) -> None:
    recipe = tiny_recipe("QUESTION_ANS", models_dir, tmp_path, **sections)
    rows = [row for row in question_rows(21) if row["answers"]["text"]]
    test = write_jsonl(tmp_path / "test.jsonl", rows)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    result = run_cli("plan", recipe, "--set", f"data.test={test}")
    assert result.code == 2
    assert f"{key}: has no effect" in result.err
