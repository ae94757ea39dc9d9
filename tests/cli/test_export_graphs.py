"""`peftkit export --target onnx,openvino`: files that ONNX Runtime and OpenVINO answer with as the adapter does, or nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest

from tests.conftest import instruction_rows, label_rows, pair_rows
from tests.runs import run_cli, tiny_recipe, train

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/exporting_onnx.md").read_text(encoding="utf-8")
CLIENTS = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
CLASSIFIER, EMBEDDER, WRITER, TRANSLATOR = CLIENTS


def export(adapter: Path, output: Path, *arguments: str) -> list[dict[str, Any]]:
    """What `peftkit export` says of each target."""
    result = run_cli("export", "--adapter", adapter, "--output", output, "--json", *arguments)
    assert result.code == 0, result.err
    exports: list[dict[str, Any]] = result.json["exports"]
    return exports


def answer(client: str, *arguments: object) -> Any:
    """What a client of the guide prints, in a process in which torch and transformers cannot be imported."""
    program = f"import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n{client}"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def asked(adapter: Path, prompt: str, *arguments: str) -> Any:
    """The prediction of `peftkit infer`."""
    return run_cli("infer", "--adapter", adapter, "--prompt", prompt, "--json", *arguments).json["prediction"]


def is_proven(record: dict[str, Any]) -> bool:
    numbers = record["check"]["numbers"]
    return bool(record["check"]["passed"] and numbers["max_abs_diff"] <= numbers["tolerance"] <= 1e-3)


@pytest.fixture(scope="module")
def embedding_run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FEATURE_EXTRACTION run on the tiny BERT."""
    folder = tmp_path_factory.mktemp("embedding")
    train(tiny_recipe("FEATURE_EXTRACTION", models_dir, folder), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def prompt_run(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CAUSAL_LM run of prompt tuning on the tiny Llama."""
    folder = tmp_path_factory.mktemp("prompt")
    adapter = {"method": "prompt_tuning", "num_virtual_tokens": 4}
    train(tiny_recipe("CAUSAL_LM", models_dir, folder, adapter=adapter, training={"learning_rate": 0.3}), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def classifier(cls_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classifier in 8 bits, with the metrics before and after."""
    output = tmp_path_factory.mktemp("classifier") / "out"
    rows = cls_run.parent / "test.jsonl"
    export(cls_run, output, "--target", "onnx", "--set", "quantization=int8", "--set", f"data={rows}")
    return output


def test_a_quantised_classifier_tells_what_it_costs(classifier: Path) -> None:
    numbers = json.loads((classifier / "export.json").read_text())["check"]["numbers"]
    assert 0 < numbers["max_abs_diff"] < 1
    assert "tolerance" not in numbers
    assert {"agreement", "accuracy_before", "accuracy_after", "loss_before", "loss_after"} <= set(numbers)
    assert numbers["loss_before"] != numbers["loss_after"]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_openvino_takes_weights_of_few_bits_and_reports_to_nobody(kind: str, cls_run: Path, tmp_path: Path) -> None:
    rows = cls_run.parent / "test.jsonl"
    settings = ("--set", f"quantization={kind}", "--set", f"data={rows}")
    (record,) = export(cls_run, tmp_path / "out", "--target", "openvino", *settings)
    assert {"max_abs_diff", "accuracy_before", "accuracy_after"} <= set(record["check"]["numbers"])
    assert f'element_type="{kind.replace("int", "u")}"' in (tmp_path / "out/openvino_model.xml").read_text()
    assert sys.modules["openvino_telemetry"] is None


def test_a_classifier_names_the_classes_without_torch(classifier: Path, cls_run: Path) -> None:
    texts = [row["text"] for row in label_rows(4)]
    assert answer(CLASSIFIER, classifier, *texts) == [asked(cls_run, text) for text in texts]


def test_embeddings_are_pooled_as_they_were_trained(embedding_run: Path, tmp_path: Path) -> None:
    (record,) = export(embedding_run, tmp_path / "out", "--target", "openvino")
    assert is_proven(record)
    texts = [row["anchor"] for row in pair_rows(3)]
    found = answer(EMBEDDER, tmp_path / "out", *texts)
    np.testing.assert_allclose(found, [asked(embedding_run, text) for text in texts], atol=1e-4)


def test_a_language_model_writes_with_its_cache_and_without_torch(
    monkeypatch: pytest.MonkeyPatch, lm_run: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("peftkit.engine.onnx_export._LARGEST_BYTES", 1000)  # so that weights lie beside the graph
    (record,) = export(lm_run, tmp_path / "out", "--target", "onnx")
    assert is_proven(record)
    assert record["check"]["numbers"]["agreement"] == 1
    assert (tmp_path / "out/model.onnx_data").stat().st_size > 90_000
    for row in instruction_rows(3):
        prompt = row["instruction"]
        assert answer(WRITER, tmp_path / "out", prompt, 8).strip() == asked(lm_run, prompt, "--max-new-tokens", "8")


def test_an_encoder_decoder_shares_its_weights_in_one_decoder(s2s_run: Path, tmp_path: Path) -> None:
    (record,) = export(s2s_run, tmp_path / "out", "--target", "onnx")
    assert is_proven(record)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.onnx")) == [
        "decoder_model_merged.onnx",
        "encoder_model.onnx",
    ]
    weights = (s2s_run.parent / "merged", tmp_path / "out/decoder_model_merged.onnx")
    assert run_cli("merge", "--adapter", s2s_run, "--output", weights[0]).code == 0
    assert weights[1].stat().st_size < (weights[0] / "model.safetensors").stat().st_size
    for row in instruction_rows(3):
        prompt = row["instruction"]
        assert answer(TRANSLATOR, tmp_path / "out", prompt, 8).strip() == asked(s2s_run, prompt, "--max-new-tokens", "8")


def test_virtual_tokens_become_constants_of_the_graph(prompt_run: Path, tmp_path: Path) -> None:
    (record,) = export(prompt_run, tmp_path / "out", "--target", "openvino", "--set", "form=adapter")
    assert is_proven(record)
    assert (record["form"], record["check"]["numbers"]["agreement"]) == ("adapter", 1)


@pytest.fixture
def traces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no model can be loaded."""

    def load(*arguments: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("peftkit.engine.exporting.load_adapter", load)


@pytest.mark.usefixtures("traces_nothing")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["dtype=float16", "quantization=int8"], "dtype=float16 would have no effect; leave one of the two out"),
        (["data=rows.jsonl"], "data has no effect without quantization"),
        (["quantization=int8", "data=nowhere.jsonl"], "there is no file `nowhere.jsonl`"),
        (["task_id=first"], "task_id has no effect"),
        (["quantization=int4"], "quantization: `int4` is not allowed"),
    ],
)
def test_settings_without_effect_are_refused_before_anything_is_loaded(
    cli: Callable[..., Any], cls_run: Path, tmp_path: Path, settings: list[str], words: str
) -> None:
    arguments = [part for setting in settings for part in ("--set", setting)]
    result = cli("export", "--adapter", cls_run, "--target", "onnx", "--output", tmp_path / "out", *arguments)
    assert (result.code, words in " ".join(result.err.split())) == (2, True), result.err


@pytest.mark.usefixtures("traces_nothing")
def test_an_adapter_that_cannot_be_merged_is_told_the_way(cli: Callable[..., Any], prompt_run: Path, tmp_path: Path) -> None:
    result = cli("export", "--adapter", prompt_run, "--target", "onnx", "--output", tmp_path / "out")
    assert result.code == 2
    assert "`--set form=adapter` writes base and adapter as one graph" in " ".join(result.err.split())


def test_files_that_answer_otherwise_are_not_left_behind(
    monkeypatch: pytest.MonkeyPatch, classifier: Path, cls_run: Path, tmp_path: Path
) -> None:
    """Here those in 8 bits, in place of the ones in float32."""
    monkeypatch.setattr("peftkit.engine.onnx_export.onnx_model", lambda graph: onnx_ir.load(classifier / "model.onnx"))
    result = run_cli("export", "--adapter", cls_run, "--target", "onnx", "--output", tmp_path / "out")
    assert result.code == 6, result.err
    assert "logits of 4 rows, alone and padded" in " ".join(result.err.split())
    assert not list(tmp_path.iterdir())
