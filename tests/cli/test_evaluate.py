"""`peftkit evaluate`, and what plain PEFT makes of the same adapter folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import instruction_rows, label_rows, write_jsonl

RUNS = ["lm_run", "cls_run", "s2s_run"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("run", RUNS)
def test_without_data_the_runs_own_test_rows_are_evaluated(cli: Any, request: pytest.FixtureRequest, run: str) -> None:
    folder = request.getfixturevalue(run)
    trained = json.loads((folder / "status.json").read_text())["summary"]["metrics_by_split"]["test"]
    result = cli("evaluate", folder, "--json")
    assert result.code == 0, result.err
    assert (result.json["split"], result.json["num_rows"]) == ("test", 6)
    for name, value in trained.items():
        assert result.json["metrics"][name] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("run", RUNS)
def test_metrics_do_not_depend_on_the_batch_size(cli: Any, request: pytest.FixtureRequest, run: str, batch_size: int) -> None:
    folder = request.getfixturevalue(run)
    one, many = (cli("evaluate", folder, "--json", "--batch-size", size).json["metrics"] for size in (16, batch_size))
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_named_rows_are_evaluated_and_written_down(cli: Any, cls_run: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "mine.jsonl", label_rows(9))
    result = cli("evaluate", cls_run, "--data", data, "--predictions", tmp_path / "predictions.jsonl", "--json")
    assert result.json["num_rows"] == 9
    rows = lines(tmp_path / "predictions.jsonl")
    assert [row["label"] for row in rows] == [row["label"] for row in label_rows(9)]
    assert [row["row"] for row in rows] == [f"{data}:{number}" for number in range(1, 10)]
    assert result.json["metrics"]["accuracy"] == sum(row["label"] == row["prediction"] for row in rows) / 9
    assert lines(cls_run / "evaluations/mine.predictions.jsonl") == rows
    written = json.loads((cls_run / "evaluations/mine.json").read_text())
    assert (written["num_rows"], written["metrics"]) == (9, result.json["metrics"])


def test_a_table_is_printed_for_people(cli: Any, cls_run: Path) -> None:
    result = cli("evaluate", cls_run)
    assert all(word in result.out for word in ("6 rows", "accuracy", "f1_macro", "by class", "neg", "pos"))
    assert "written: " in result.err


def test_an_adapter_folder_needs_data(cli: Any, cls_run: Path, tmp_path: Path) -> None:
    result = cli("evaluate", cls_run / "adapter")
    assert result.code == 2
    assert "--data is needed" in result.err
    data = write_jsonl(tmp_path / "mine.jsonl", label_rows(4))
    assert cli("evaluate", cls_run / "adapter", "--data", data, "--json").json["num_rows"] == 4


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"text": "the cat", "label": "pos"}, {"text": "the cat", "label": "neutral"}],
            ":2: the label 'neutral' is not among",
        ),
        ([{"text": "the cat"}], "column `label`"),
    ],
)
def test_rows_that_cannot_be_evaluated_are_named(cli: Any, cls_run: Path, tmp_path: Path, rows: Any, words: str) -> None:
    result = cli("evaluate", cls_run, "--data", write_jsonl(tmp_path / "mine.jsonl", rows))
    assert result.code == 3
    assert words in result.err


def test_what_is_no_run_is_refused(cli: Any, tmp_path: Path) -> None:
    result = cli("evaluate", tmp_path / "none", "--data", write_jsonl(tmp_path / "mine.jsonl", label_rows(2)))
    assert result.code == 7
    assert "there is no run directory or adapter folder" in result.err


PLAIN_CLASSIFIER = """
import json, sys
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
print(json.dumps([model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).tolist() for text in texts]))
assert not any(name.startswith("peftkit") for name in sys.modules)
"""
PLAIN_LANGUAGE_MODEL = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
folder, rows = sys.argv[1], json.loads(sys.argv[2])
model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
losses = []
for row in rows:
    user, answer = {"role": "user", "content": row["instruction"]}, row["output"] + "<|im_end|>"
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    logits = model(input_ids=torch.tensor([before + after])).logits[0]
    chosen = logits.log_softmax(-1)[len(before) - 1 : -1].gather(1, torch.tensor(after)[:, None])
    losses.append(-float(chosen.sum()))
print(json.dumps(losses))
assert not any(name.startswith("peftkit") for name in sys.modules)
"""


def plain(program: str, folder: Path, rows: list[Any]) -> list[Any]:
    """What a process that knows nothing of peftkit prints."""
    command = [sys.executable, "-c", program, str(folder), json.dumps(rows)]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    found: list[Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_peft_alone_gives_the_probabilities_of_a_classifier(cli: Any, cls_run: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "mine.jsonl", label_rows(5))
    cli("evaluate", cls_run, "--data", data, "--predictions", tmp_path / "predictions.jsonl", "--json")
    ours = [list(row["probabilities"].values()) for row in lines(tmp_path / "predictions.jsonl")]
    for found, expected in zip(
        plain(PLAIN_CLASSIFIER, cls_run / "adapter", [row["text"] for row in label_rows(5)]), ours, strict=True
    ):
        assert found == pytest.approx(expected, abs=2e-6)


def test_peft_alone_gives_the_losses_of_a_language_model(cli: Any, lm_run: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "mine.jsonl", instruction_rows(5))
    cli("evaluate", lm_run, "--data", data, "--predictions", tmp_path / "predictions.jsonl", "--json")
    ours = [row["loss_sum"] for row in lines(tmp_path / "predictions.jsonl")]
    assert plain(PLAIN_LANGUAGE_MODEL, lm_run / "adapter", instruction_rows(5)) == pytest.approx(ours, rel=1e-4)
