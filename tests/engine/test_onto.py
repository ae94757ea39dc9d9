"""`merge --onto`: which weights of a quantised base an adapter is merged into, and that the best is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from tests.conftest import instruction_rows, write_jsonl
from tests.runs import run_cli, tiny_recipe, train

IDS = torch.arange(5, 45)[None, :]


def quantised_run(models_dir: Path, folder: Path, quantization: dict[str, Any], model: str = "llama") -> Path:
    """A LoRA on all linear layers of a quantised tiny Llama."""
    source = {"name_or_path": str(models_dir / model), "quantization": quantization or None}
    adapter = {"method": "lora", "r": 4, "target_modules": "all-linear"}
    train(tiny_recipe("CAUSAL_LM", models_dir, folder, model=source, adapter=adapter), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module", params=[4, 8])
def run(request: pytest.FixtureRequest, models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a base of so many bits."""
    return quantised_run(models_dir, tmp_path_factory.mktemp("quantised"), {"bits": request.param})


def merge(run: Path, output: Path, onto: str, *arguments: Any) -> dict[str, Any]:
    """What a merge that works says."""
    result = run_cli("merge", "--adapter", run, "--output", output, "--onto", onto, "--json", *arguments)
    assert result.code == 0, result.err
    found: dict[str, Any] = result.json
    return found


@torch.no_grad()
def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    """What transformers alone, or with PEFT, says of fixed tokens."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = peft.PeftModel.from_pretrained(model, adapter) if adapter else model
    result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def test_the_default_is_what_the_adapter_saw(run: Path, tmp_path: Path) -> None:
    assert merge(run, tmp_path / "merged", "dequantized")["distance"] < 5e-6
    assert run_cli("merge", "--adapter", run, "--output", tmp_path / "again").code == 0
    assert torch.equal(logits(tmp_path / "merged"), logits(tmp_path / "again"))


def test_onto_the_original_weights_is_the_adapter_on_them(run: Path, models_dir: Path, tmp_path: Path) -> None:
    found = merge(run, tmp_path / "merged", "original")
    assert found["max_abs_diff"] < 5e-6
    assert found["distance"] > 1e-4
    expected = logits(models_dir / "llama", run / "adapter")
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, rtol=0, atol=1e-5)


def test_onto_quantised_weights_is_a_quantised_model(run: Path, tmp_path: Path) -> None:
    found = merge(run, tmp_path / "merged", "quantized")
    assert found["max_abs_diff_saved"] < 1e-6
    assert 1e-4 < found["distance"] < 1
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    assert kinds == {"Linear4bit" if getattr(model, "is_loaded_in_4bit", False) else "Linear8bitLt"}
    assert type(model.lm_head) is torch.nn.Linear
    assert (tmp_path / "merged/chat_template.jinja").is_file()


def test_the_best_by_the_metric_is_kept(run: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", instruction_rows(9))
    found = merge(run, tmp_path / "merged", "best", "--data", data)
    losses = {row["onto"]: row["metrics"]["loss"] for row in found["choices"]}
    assert list(losses) == ["dequantized", "original", "quantized"]
    assert found["onto"] == min(losses, key=lambda name: losses[name])
    assert losses["dequantized"] == pytest.approx(found["adapter_metrics"]["loss"], abs=1e-3)
    assert found["metrics"]["loss"] == losses[found["onto"]]
    merge(run, tmp_path / "alone", found["onto"])
    assert torch.equal(logits(tmp_path / "merged"), logits(tmp_path / "alone"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "data.jsonl", "merged"]


def test_the_table_of_the_best_is_printed(run: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", instruction_rows(3))
    result = run_cli("merge", "--adapter", run, "--output", tmp_path / "merged", "--onto", "best", "--data", data)
    assert "3 rows, less is better; kept: " in result.out
    assert all(name in result.out for name in ("base and adapter", "dequantized", "original", "quantized"))


def test_a_stored_quantised_base_needs_its_original_by_name(models_dir: Path, tmp_path: Path) -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        models_dir / "llama", quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "stored")
    transformers.AutoTokenizer.from_pretrained(models_dir / "llama").save_pretrained(tmp_path / "stored")
    run = quantised_run(tmp_path, tmp_path, {}, "stored")
    refused = run_cli("merge", "--adapter", run, "--output", tmp_path / "merged", "--onto", "original")
    assert (refused.code, "name the model they were made of with --original-base" in refused.err) == (2, True)
    data = write_jsonl(tmp_path / "data.jsonl", instruction_rows(3))
    rows = merge(run, tmp_path / "best", "best", "--data", data)["choices"]
    assert ["refused" in row for row in rows] == [False, True, False]
    found = merge(run, tmp_path / "merged", "original", "--original-base", models_dir / "llama")
    assert found["max_abs_diff"] < 5e-6
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--onto", "base"], "`base` is not allowed; it takes dequantized | original | quantized | best"),
        (["--onto", "best"], "--onto best: needs rows to decide by; name a file with --data"),
        (["--data", "rows.jsonl"], "--data: has no effect without `--onto best`"),
        (["--onto", "quantized", "--original-base", "x"], "--original-base: has no effect without"),
    ],
)
def test_choices_that_say_nothing_are_refused(run: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    result = run_cli("merge", "--adapter", run, "--output", tmp_path / "merged", *arguments)
    assert (result.code, words in result.err) == (2, True), result.err


def test_a_plain_base_leaves_nothing_to_choose(models_dir: Path, tmp_path: Path) -> None:
    train(tiny_recipe("CAUSAL_LM", models_dir, tmp_path, training={"max_steps": 1}), tmp_path / "run")
    result = run_cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged", "--onto", "original")
    assert (result.code, "--onto: has no effect: the adapter was not trained on a quantised base" in result.err) == (2, True)


def test_hqq_weights_are_not_stored(models_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("hqq")
    run = quantised_run(models_dir, tmp_path, {"method": "hqq", "bits": 4, "group_size": 32})
    result = run_cli("merge", "--adapter", run, "--output", tmp_path / "merged", "--onto", "quantized")
    assert (result.code, "these are quantised by hqq" in result.err) == (2, True)
    assert merge(run, tmp_path / "merged", "original")["max_abs_diff"] < 5e-6
