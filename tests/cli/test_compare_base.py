"""`peftkit evaluate --compare-base`, `--forgetting` and `--harness`: the base beside the adapter, on the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import label_rows, rows_of, write_jsonl
from tests.contracts.matrix import SETTINGS
from tests.runs import tiny_recipe, train

METHODS = {
    "lora": "SEQ_CLS",  # its head in `modules_to_save`
    "prompt_tuning": "SEQ_CLS",
    "trainable_tokens": "SEQ_CLS",  # its head among the base's own weights
    "full": "SEQ_CLS",
    "bitfit": "SEQ_CLS",
    "prefix_tuning": "CAUSAL_LM",
    "head": "CAUSAL_LM",
    "p_tuning": "SEQ_2_SEQ_LM",
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the cat sat on a mat and saw two red birds\nhow many apples are left\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("method", METHODS)
def test_the_base_is_the_one_that_training_began_with(models_dir: Path, tmp_path: Path, method: str) -> None:
    from peftkit.engine.loaded import load_adapter, without_adapter
    from peftkit.engine.model import load_base_model, set_pad_token

    adapter = {"method": method} | SETTINGS.get(method, {})
    train(tiny_recipe(METHODS[method], models_dir, tmp_path, adapter=adapter, training={"max_steps": 2}), tmp_path / "run")
    loaded = load_adapter(tmp_path / "run")
    fresh, _ = load_base_model(loaded.facts.untrained_base, loaded.runtime.settings)
    set_pad_token(fresh, loaded.runtime.tokenizer)
    batch = loaded.runtime.collate(loaded.runtime.encode({**probe_row(METHODS[method])}, "rows:1"))
    with torch.no_grad():
        expected, before = loaded.runtime.forward(fresh.eval(), batch), loaded.runtime.forward(loaded.model, batch)
        with without_adapter(loaded) as bare:
            assert torch.equal(loaded.runtime.forward(bare.model, batch), expected)
        assert torch.equal(loaded.runtime.forward(loaded.model, batch), before)
    assert not torch.equal(before, expected)


def probe_row(task: str) -> dict[str, Any]:
    return {"text": "the cat sat", "label": "pos"} if task == "SEQ_CLS" else {"prompt": "the cat", "completion": "sat"}


def test_adapter_and_base_stand_side_by_side(cli: Any, lm_run: Path) -> None:
    result = cli("evaluate", lm_run, "--compare-base", "--generation-metrics", "chrf,bleu", "--json").json
    assert result["metrics"]["loss"] < result["base_metrics"]["loss"]
    assert result["differences"].keys() == result["metrics"].keys()
    for name, found in result["differences"].items():
        assert found["difference"] == pytest.approx(result["metrics"][name] - result["base_metrics"][name])
        assert found["low"] <= found["difference"] <= found["high"]
    assert (result["better"], result["worse"], result["row_figure"]) == (6, 0, "loss")
    rows = lines(lm_run / "evaluations/test.comparison.jsonl")
    assert [row["row"] for row in rows] == [row["row"] for row in lines(lm_run / "evaluations/test.predictions.jsonl")]
    assert all(row["change"] == pytest.approx(row["base"] - row["adapter"]) for row in rows)
    assert {"reference", "generated", "base_generated"} <= rows[0].keys()
    assert json.loads((lm_run / "evaluations/test.comparison.json").read_text())["better"] == 6


def test_a_head_that_was_never_trained_is_said_to_be_so(cli: Any, cls_run: Path) -> None:
    result = cli("evaluate", cls_run, "--compare-base")
    assert "the base model's head was never trained (classifier)" in result.err
    assert all(word in result.out for word in ("95% from", "by right,", "rows got better", "got worse", "test.jsonl:"))


def test_the_text_for_forgetting_can_be_rows_and_is_measured_twice(cli: Any, lm_run: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": "the cat sat on a mat"}])
    found = cli("evaluate", lm_run / "adapter", "--forgetting", data, "--json").json
    forgetting = found["forgetting"]
    assert (found["num_rows"], forgetting["measure"]) == (0, "lm_loss")
    assert forgetting["rise"] == pytest.approx(forgetting["loss_after"] - forgetting["loss_before"])
    assert forgetting["loss_before"] == pytest.approx(plain_loss(lm_run, "the cat sat on a mat"), rel=1e-5)


def plain_loss(run: Path, text: str) -> float:
    """The base's loss per token, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = json.loads((run / "adapter/peftkit.json").read_text())["base"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    return float(AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=ids, labels=ids).loss.detach())


@pytest.mark.parametrize("with_head", [True, False])
def test_forgetting_of_an_encoder_is_named_as_what_it_is(models_dir: Path, tmp_path: Path, text: Path, with_head: bool) -> None:
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    model = models_dir / "bert"
    if with_head:
        model = tmp_path / "masked"
        tokenizer = AutoTokenizer.from_pretrained(models_dir / "bert")
        tokenizer.add_special_tokens({"mask_token": "<|im_start|>"})
        tokenizer.save_pretrained(model)
        BertForMaskedLM(BertConfig.from_pretrained(models_dir / "bert")).save_pretrained(model)
    sections = {"model": {"name_or_path": str(model)}, "evaluation": {"forgetting": str(text)}}
    summary = train(tiny_recipe("SEQ_CLS", models_dir, tmp_path, **sections), tmp_path / "run")
    found = summary["forgetting"]
    assert found["measure"] == ("masked_lm_loss" if with_head else "cosine_distance")
    assert found["rise"] == pytest.approx(found["loss_after"] - found["loss_before"])
    assert found["rise"] != 0.0
    assert json.loads((tmp_path / "run/status.json").read_text())["summary"]["forgetting"] == found


def test_what_an_adapter_of_no_effect_forgets_is_nothing(models_dir: Path, tmp_path: Path, text: Path) -> None:
    sections = {"evaluation": {"forgetting": str(text)}, "training": {"max_steps": 1, "learning_rate": 1e-30}}
    for task in ("CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"):
        folder = tmp_path / task
        folder.mkdir()
        found = train(tiny_recipe(task, models_dir, folder, **sections), folder / "run")["forgetting"]
        assert found["rise"] == pytest.approx(0.0, abs=1e-6), task


def test_forgetting_is_measured_by_one_process_of_several(lm_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkit.engine.forgetting import measure_forgetting
    from peftkit.engine.loaded import load_adapter

    texts, loaded = [("text:1", "the cat sat"), ("text:2", "two red birds in an old tree")], load_adapter(lm_run)
    alone = measure_forgetting(loaded, texts, 8)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert measure_forgetting(loaded, texts, 8) == alone


@pytest.mark.parametrize(
    ("run", "options", "code", "words"),
    [
        ("cls_run", ["--generation-metrics", "chrf"], 2, "--generation-metrics: no effect: this adapter is for SEQ_CLS"),
        ("cls_run", ["--harness", "arc_easy"], 2, "--harness: no effect"),
        ("lm_run", ["--generation-metrics", "meteor"], 2, "there is no `meteor`; there are rouge"),
        ("lm_run", ["--generation-metrics", "answer"], 2, "--answer-pattern: is missing"),
        ("lm_run", ["--answer-pattern", "(a)"], 2, "--answer-pattern: has no effect without `answer`"),
        ("lm_run", ["--generation-metrics", "answer", "--answer-pattern", "#### .+"], 2, "has 0 groups"),
        ("lm_run", ["--harness-include", "."], 2, "--harness-include: has no effect without --harness"),
        ("lm_run", ["--forgetting", "none.txt"], 3, "there is no file none.txt"),
        ("lm_run", ["--generation-metrics", "answer", "--answer-pattern", "#### (.+)"], 3, "test.jsonl:1: the row's answer"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    cli: Any, request: pytest.FixtureRequest, run: str, options: list[str], code: int, words: str
) -> None:
    result = cli("evaluate", request.getfixturevalue(run), *options)
    assert result.code == code, result.err
    assert words in result.err.replace("\n", " ")


def test_without_the_package_the_harness_says_how_to_get_it(cli: Any, lm_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftkit.engine.harness.importlib.util.find_spec", lambda name: None)
    result = cli("evaluate", lm_run / "adapter", "--harness", "arc_easy")
    assert (result.code, "pip install 'peftkit[harness]'" in result.err) == (2, True)


TASK = """\
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_the_harness_runs_a_task_of_a_folder_on_adapter_and_base(cli: Any, lm_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"question": row["instruction"], "choices": [row["output"], "zebra"], "gold": 0} for row in rows_of("CAUSAL_LM", 6)]
    (tmp_path / "letters.yaml").write_text(TASK.format(rows=write_jsonl(tmp_path / "rows.jsonl", rows)))
    result = cli("evaluate", lm_run / "adapter", "--harness", "letters", "--harness-include", tmp_path, "--json")
    assert result.code == 0, result.err
    figures = result.json["harness"]["letters"]["acc"]
    assert 0.0 <= figures["base"] <= 1.0
    assert figures["adapter"] > figures["base"]
    unknown = cli("evaluate", lm_run / "adapter", "--harness", "leters", "--harness-include", tmp_path)
    assert (unknown.code, "knows no task `leters`" in unknown.err) == (2, True)


def test_only_the_first_rows_are_taken_where_a_number_is_given(cli: Any, cls_run: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "mine.jsonl", label_rows(9))
    assert cli("evaluate", cls_run, "--data", data, "--max-rows", 4, "--json").json["num_rows"] == 4
