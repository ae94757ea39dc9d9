"""SEQ_CLS: labels, pairs of texts, and metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn import metrics as sklearn_metrics
from transformers import AutoModelForSequenceClassification

from peftkit.formats.base import RowError
from peftkit.tasks import TASKS
from peftkit.tasks.base import IGNORE_INDEX, Encoding, Runtime
from tests.conftest import tiny_tokenizer, write_jsonl


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
    example = runtime.encode({"text": "the cat", "text_pair": "two birds", "label": "pos"}, "rows:1")
    assert example is not None
    first, second = (len(runtime.tokenizer(text)["input_ids"]) for text in ("the cat", "two birds"))
    assert example.inputs["token_type_ids"] == [0] * first + [1] * second
    assert example.labels == 1


def test_token_types_reach_the_model(models_dir: Path) -> None:
    runtime = runtime_of()
    rows = [{"text": "the cat", "text_pair": "two birds", "label": "pos"}, {"text": "the cat sat on a mat", "label": "neg"}]
    batch = runtime.collate([example for row in rows if (example := runtime.encode(row, "rows:1")) is not None])
    model = AutoModelForSequenceClassification.from_pretrained(models_dir / "bert", num_labels=2).eval()
    theirs = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}).logits
    assert torch.equal(runtime.forward(model, batch), theirs)
    without = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert not torch.allclose(theirs[0], without[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_texts_are_cut_at_the_side_that_is_named(side: str) -> None:
    runtime = runtime_of(max_length=3, truncation=side)
    example = runtime.encode({"text": "the cat sat on a mat", "label": "pos"}, "rows:1")
    whole = runtime.tokenizer("the cat sat on a mat")["input_ids"]
    assert example is not None
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
