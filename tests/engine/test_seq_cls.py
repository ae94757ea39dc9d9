"""SEQ_CLS: labels, pairs of texts, and metrics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn import metrics as sklearn_metrics
from transformers import AutoModelForSequenceClassification

from peftkit.formats.base import RowError
from peftkit.tasks import TASKS
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import IGNORE_INDEX, Runtime
from tests.conftest import tiny_tokenizer, write_jsonl
from tests.runs import run_cli, tiny_recipe, train


def runtime_of(labels: tuple[str, ...] = ("neg", "pos"), **settings: Any) -> Runtime:
    """With a tokenizer that tells the two texts of a pair apart, as BERT's does."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return TASKS["SEQ_CLS"].runtime(tokenizer, Encoding(**{"max_length": 48, "labels": labels} | settings))


def texts(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": f"the cat sat {number}", "label": label} for number, label in enumerate(labels)]


@pytest.mark.parametrize(
    "case",
    [
        (["pos", "neg", "pos"], None, ["neg", "pos"]),
        ([10, 9, 9], None, ["9", "10"]),
        (["pos", "neg", "pos"], ["pos", "neg", "neutral"], ["pos", "neg", "neutral"]),
    ],
    ids=["names are sorted", "numbers are sorted as numbers", "the recipe's order is kept"],
)
def test_classes_come_from_the_recipe_or_the_rows(
    cli: Any, write_recipe: Any, cls_recipe: Any, tmp_path: Path, case: tuple[list[Any], list[str] | None, list[str]]
) -> None:
    labels, named, order = case
    cls_recipe["data"] = {"train": str(write_jsonl(tmp_path / "rows.jsonl", texts(labels)))} | (
        {"labels": named} if named else {}
    )
    classes = cli("plan", write_recipe(cls_recipe), "--json").json["classes"]
    assert list(classes) == order
    assert classes == {name: sum(str(label) == name for label in labels) for name in order}


def test_a_label_that_train_has_not_is_named_with_its_row(cli: Any, write_recipe: Any, cls_recipe: Any, tmp_path: Path) -> None:
    cls_recipe["data"]["validation"] = str(write_jsonl(tmp_path / "validation.jsonl", texts(["pos", "neg", "neutral"])))
    result = cli("train", write_recipe(cls_recipe), "--output", tmp_path / "run")
    assert result.code == 3
    assert "validation.jsonl:3: the label 'neutral' is not among the classes: neg, pos" in result.err
    assert not (tmp_path / "run").exists()


def test_one_class_alone_is_refused(cli: Any, write_recipe: Any, cls_recipe: Any, tmp_path: Path) -> None:
    cls_recipe["data"]["train"] = str(write_jsonl(tmp_path / "rows.jsonl", texts(["pos", "pos"])))
    result = cli("plan", write_recipe(cls_recipe))
    assert result.code == 3
    assert "1 class(es) (pos); a classifier needs two" in result.err


def test_a_pair_of_texts_has_token_types() -> None:
    runtime = runtime_of()
    (example,) = runtime.encode({"text": "the cat", "text_pair": "two birds", "label": "pos"}, "rows:1")
    first, second = (len(runtime.tokenizer(text)["input_ids"]) for text in ("the cat", "two birds"))
    assert example.inputs["token_type_ids"] == [0] * first + [1] * second
    assert example.labels == 1


def test_token_types_reach_the_model(models_dir: Path) -> None:
    runtime = runtime_of()
    rows = [{"text": "the cat", "text_pair": "two birds", "label": "pos"}, {"text": "the cat sat on a mat", "label": "neg"}]
    batch = runtime.collate([example for row in rows for example in runtime.encode(row, "rows:1")])
    model = AutoModelForSequenceClassification.from_pretrained(models_dir / "bert", num_labels=2).eval()
    theirs = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}).logits
    assert torch.equal(runtime.forward(model, batch), theirs)
    without = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert not torch.allclose(theirs[0], without[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_texts_are_cut_at_the_side_that_is_named(side: str) -> None:
    runtime = runtime_of(max_length=3, truncation=side)
    (example,) = runtime.encode({"text": "the cat sat on a mat", "label": "pos"}, "rows:1")
    whole = runtime.tokenizer("the cat sat on a mat")["input_ids"]
    assert example.inputs["input_ids"] == (whole[-3:] if side == "left" else whole[:3])
    assert example.num_tokens == len(whole)


def test_an_unknown_label_is_refused_with_the_classes() -> None:
    with pytest.raises(RowError, match="the label 'great' is not among the classes: neg, pos"):
        runtime_of().encode({"text": "the cat", "label": "great"}, "rows:1")


def test_the_loss_is_a_sum_over_rows_that_have_a_label() -> None:
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]]), torch.tensor([0, 0, IGNORE_INDEX])
    expected = torch.log(1 + torch.exp(torch.tensor(-2.0))) + torch.log(1 + torch.exp(torch.tensor(1.0)))
    assert float(runtime_of().loss_sum(logits, labels)) == pytest.approx(float(expected), rel=1e-6)


def results_of(truth: list[str], guesses: list[str]) -> list[dict[str, Any]]:
    return [{"label": label, "prediction": guess, "loss_sum": 0.5} for label, guess in zip(truth, guesses, strict=True)]


def test_metrics_of_four_rows_are_those_worked_out_by_hand() -> None:
    found = runtime_of().summarise(results_of(["pos", "pos", "neg", "neg"], ["pos", "neg", "neg", "neg"]))
    # pos: precision 1, recall 1/2, F1 2/3; neg: precision 2/3, recall 1, F1 4/5. MCC = (1*2 - 0*1) / sqrt(1*2*2*3).
    assert found["loss"] == 0.5
    assert found["accuracy"] == 0.75
    assert found["f1_macro"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["f1_weighted"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["mcc"] == pytest.approx(2 / 12**0.5)
    assert found["by_class"]["pos"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "num_rows": 2}
    assert found["confusion"] == [[2, 0], [1, 1]]


def test_metrics_are_those_of_scikit_learn() -> None:
    names = ("a", "b", "c", "d")  # d never occurs and is never guessed
    truth = [names[number * 7 % 3] for number in range(40)]
    guesses = [names[number * 5 % 3 if number % 4 else number % 3] for number in range(40)]
    found = runtime_of(names).summarise(results_of(truth, guesses))
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, guesses))
    for average in ("macro", "weighted"):
        assert found[f"f1_{average}"] == pytest.approx(sklearn_metrics.f1_score(truth, guesses, average=average))
    assert found["mcc"] == pytest.approx(sklearn_metrics.matthews_corrcoef(truth, guesses))
    assert found["confusion"] == sklearn_metrics.confusion_matrix(truth, guesses, labels=names).tolist()


def test_the_run_reports_the_metrics_of_its_predictions(cli: Any, write_recipe: Any, cls_recipe: Any, tmp_path: Path) -> None:
    cls_recipe["data"]["validation"] = 0.25
    summary = cli("train", write_recipe(cls_recipe), "--output", tmp_path / "run", "--json").json
    lines = (tmp_path / "run/evaluations/validation.predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 6
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in rows)
    assert summary["metrics"]["accuracy"] == sum(row["label"] == row["prediction"] for row in rows) / 6


MULTI = {"problem_type": "multi_label_classification", "labels": ("a", "b", "c")}
NUMBER = {"problem_type": "regression", "labels": ()}


def settled(labels: list[Any], **stated: Any) -> Encoding:
    return TASKS["SEQ_CLS"].settle(Encoding(**{"max_length": 48, "problem_type": "auto"} | stated), texts(labels), None)


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        (["b", "a"], "single_label_classification", ("a", "b")),
        ([2, 10, 2], "single_label_classification", ("2", "10")),
        ([2.0, 10], "single_label_classification", ("2", "10")),
        (["0", "1"], "single_label_classification", ("0", "1")),
        ([["b"], [], ["a", "b"]], "multi_label_classification", ("a", "b")),
        ([0.5, 1], "regression", ()),
        (["0.5", "1"], "regression", ()),  # CSV
        (["b", "a", ["b"]], "single_label_classification", None),  # the odd row is named when it is encoded
    ],
)
def test_the_labels_decide_on_the_problem(labels: list[Any], kind: str, names: tuple[str, ...] | None) -> None:
    found = settled(labels)
    if names is None:
        assert found.problem_type == kind
        return
    assert (found.problem_type, found.labels, found.num_outputs) == (kind, names, len(names) or 1)


def test_fractions_and_names_are_not_taken_for_classes_in_silence() -> None:
    with pytest.raises(RowError, match=r"numbers with fractions, such as '0.5', and some no numbers, such as 'x'"):
        settled(["0.5", "x", "1"])
    assert settled(["0.5", "x"], problem_type="single_label_classification").labels == ("0.5", "x")


def test_a_whole_number_is_a_place_among_the_names_of_the_recipe() -> None:
    names = {"labels": ("bad", "good"), "problem_type": "single_label_classification"}
    row = {"text": "the cat", "label": 1}
    (example,) = runtime_of(numbered=True, **names).encode(row, "rows:1")
    assert (example.labels, example.details) == (1, {"classes": ["good"]})
    for settings in ({"numbered": False}, {"numbered": True, "labels": ("bad",)}):
        with pytest.raises(RowError, match="the label '1' is not among the classes"):
            runtime_of(**names | settings).encode(row, "rows:1")


def test_the_recipe_decides_where_it_names_the_problem() -> None:
    assert settled([1, 2, 3], problem_type="regression").num_outputs == 1


def test_every_class_of_a_row_has_its_own_loss() -> None:
    logits, labels = torch.tensor([[0.0, 2.0, -2.0], [9.0, 9.0, 9.0]]), torch.tensor([[0, 1, 0], [IGNORE_INDEX] * 3])
    softplus = torch.nn.functional.softplus
    expected = (softplus(torch.tensor(0.0)) + 2 * softplus(torch.tensor(-2.0))) / 3
    assert float(runtime_of(**MULTI).loss_sum(logits, labels)) == pytest.approx(float(expected), rel=1e-6)


def test_smoothing_moves_the_targets_of_every_class_towards_a_half() -> None:
    loss = runtime_of(**MULTI).loss_sum(torch.zeros(1, 3), torch.tensor([[1, 0, 0]]), 0.2)
    assert float(loss) == pytest.approx(0.693147, rel=1e-5)  # ln 2, whatever the targets
    tilted = runtime_of(**MULTI).loss_sum(torch.full((1, 3), 1.0), torch.tensor([[1, 1, 1]]), 0.2)
    assert float(tilted) == pytest.approx(0.313262 + 0.1, rel=1e-5)  # softplus(1) - 0.9


def test_numbers_are_learned_by_their_squared_error() -> None:
    logits, labels = torch.tensor([[1.5], [0.0], [7.0]]), torch.tensor([1.0, -2.0, float("nan")])
    assert float(runtime_of(**NUMBER).loss_sum(logits, labels)) == pytest.approx(0.25 + 4.0)


@pytest.mark.parametrize("settings", [{}, MULTI, NUMBER], ids=["class", "set", "number"])
def test_a_row_without_targets_has_no_loss(settings: dict[str, Any]) -> None:
    runtime = runtime_of(**settings)
    (example,) = runtime.encode(runtime.probe_rows()[0], "probe")
    batch = runtime.collate([example, example.without_targets()])
    logits = torch.rand(2, max(1, len(runtime.settings.labels)))
    assert float(runtime.loss_sum(logits, batch["labels"])) == pytest.approx(
        float(runtime.loss_sum(logits[:1], batch["labels"][:1]))
    )


def test_classes_from_a_half_on_are_predicted() -> None:
    runtime = runtime_of(**MULTI)
    examples = [example for row in texts([["a"]]) for example in runtime.encode(row, "rows:1")]
    (result,) = runtime.score(torch.tensor([[0.0, -0.1, 3.0]]), runtime.collate(examples), examples)
    assert (result["label"], result["prediction"]) == (["a"], ["a", "c"])
    assert result["probabilities"]["c"] == pytest.approx(0.952574)


def test_metrics_of_sets_are_those_worked_out_by_hand() -> None:
    truth, guess = [["a"], ["a", "b"], []], [["a"], ["b", "c"], []]
    found = runtime_of(**MULTI).summarise(results_of(truth, guess))  # type: ignore[arg-type]
    # a: 1 right, 1 missed; b: 1 right; c: 1 too many. F1: 2/3, 1, 0.
    assert found["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["f1_macro"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["f1_samples"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert found["by_class"]["a"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "num_rows": 2}


def test_metrics_of_numbers_are_those_worked_out_by_hand() -> None:
    found = runtime_of(**NUMBER).summarise(results_of([1.0, 2.0, 3.0], [1.0, 4.0, 3.0]))  # type: ignore[arg-type]
    assert (found["mse"], found["mae"]) == (pytest.approx(4 / 3), pytest.approx(2 / 3))
    assert found["spearman"] == pytest.approx(0.5)
    assert found["pearson"] == pytest.approx(2 / (2 * (4 + 2 / 3)) ** 0.5)
    assert runtime_of(**NUMBER).summarise(results_of([1.0, 2.0], [3.0, 3.0]))["pearson"] == 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "label", "words"),
    [
        (MULTI, "a", "the label is 'a', not a list of classes"),
        (MULTI, ["a", "z"], "the label 'z' is not among the classes: a, b, c"),
        ({}, ["pos"], r"the label is \['pos'\], not one class"),
        (NUMBER, "good", "the label is 'good', not a number"),
    ],
)
def test_labels_of_another_problem_are_refused(settings: dict[str, Any], label: Any, words: str) -> None:
    with pytest.raises(RowError, match=words):
        runtime_of(**settings).encode({"text": "the cat", "label": label}, "rows:1")


PROBLEMS: dict[str, list[Any]] = {
    "regression": [number / 10 for number in range(24)],
    "multi_label_classification": [["even"][number % 2 :] + ["third"][: number % 3 == 0] for number in range(24)],
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_other_problems_are_trained_certified_and_merged(
    cli: Any, write_recipe: Any, cls_recipe: Any, tmp_path: Path, kind: str
) -> None:
    cls_recipe["data"] |= {"train": str(write_jsonl(tmp_path / "rows.jsonl", texts(PROBLEMS[kind]))), "validation": 0.25}
    losses = []
    for size in (8, 4, 2):
        cls_recipe["training"]["micro_batch_size"] = size
        summary = cli("train", write_recipe(cls_recipe), "--output", tmp_path / f"run{size}", "--json").json
        losses.append(summary["train_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert set(summary["metrics"]) == set(TASKS["SEQ_CLS"].metrics_for(Encoding(8, problem_type=kind)))
    assert json.loads((tmp_path / "run2/adapter/peftkit.json").read_text())["encoding"]["problem_type"] == kind
    answer = cli("infer", "--adapter", tmp_path / "run2", "--prompt", "the cat sat 3", "--json").json
    assert isinstance(answer["prediction"], float if kind == "regression" else list)
    assert cli("merge", "--adapter", tmp_path / "run2", "--output", tmp_path / "merged").code == 0
    assert json.loads((tmp_path / "merged/config.json").read_text())["problem_type"] == kind


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"metric_for_best_model": "accuracy"}}, "`accuracy` does not go with these rows; there are loss, mse"),
        ({"training": {"label_smoothing_factor": 0.1}}, "training.label_smoothing_factor: has no effect for regression"),
        ({"data": {"labels": ["a", "b"]}}, "data.labels: has no effect for regression"),
    ],
)
def test_what_regression_has_not_is_refused_before_weights_are_loaded(
    cli: Any, write_recipe: Any, cls_recipe: Any, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", texts(PROBLEMS["regression"]))
    cls_recipe["data"] |= {"train": str(rows), "validation": 0.25}
    for section, values in changes.items():
        cls_recipe[section] |= values
    result = cli("plan", write_recipe(cls_recipe))
    assert result.code == 2
    assert words in result.err


def test_a_problem_type_is_for_classifiers_only(cli: Any, write_recipe: Any, lm_recipe: Any) -> None:
    lm_recipe["data"]["problem_type"] = "regression"
    result = cli("validate", write_recipe(lm_recipe))
    assert result.code == 2
    assert "data.problem_type: has no effect for CAUSAL_LM" in result.err


def test_a_text_for_a_model_that_pools_its_end_token_gets_one(models_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "t5"
    shutil.copytree(models_dir / "t5", model)
    tiny_tokenizer().save_pretrained(model)  # which ends no text
    data = {"max_length": 12, "truncation": "right"}
    recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path, model={"name_or_path": str(model)}, data=data)
    assert train(recipe, tmp_path / "run")["certificate"]["passed"]
    answered = run_cli("infer", "--adapter", tmp_path / "run", "--prompt", "a good film", "--json")
    assert answered.json["prediction"] in ("pos", "neg")
