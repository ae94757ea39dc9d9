"""`peftkit combine`: what the arithmetic gives, that nothing is lost, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.utils.save_and_load import load_peft_weights

from peftkit.combination import COMBINATIONS, MOST, Combination, grid, prunes
from peftkit.engine.loaded import load_adapter
from tests.conftest import Result, instruction_rows, label_rows, write_jsonl
from tests.runs import run_cli, tiny_recipe, train

Cli = Callable[..., Result]
Adapters = dict[str, Path]
# Adapters of the tiny Llama that differ in rank, scale, layers and kind.
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"method": "lora", "r": 4, "lora_alpha": 8},
    "other": {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "wide": {"method": "lora", "r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "up_proj"],
             "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 5}},
    "whole": {"method": "lora", "r": 4, "target_modules": ["v_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    "dora": {"method": "lora", "r": 4, "use_dora": True},
    "tokens": {"method": "lora", "r": 4, "trainable_token_indices": [5]},
    "biased": {"method": "lora", "r": 4, "lora_bias": True},
    "ia3": {"method": "ia3"},
    "ia3_two": {"method": "ia3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def adapters(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Trained runs by the names in ADAPTERS."""
    found = {}
    for seed, (name, adapter) in enumerate(ADAPTERS.items()):
        folder = tmp_path_factory.mktemp(name)
        training = {"learning_rate": 0.05, "max_steps": 2, "seed": seed}
        recipe = tiny_recipe("CAUSAL_LM", models_dir, folder, adapter=adapter, training=training)
        train(recipe, folder / name)
        found[name] = folder / name
    return found


@pytest.fixture(scope="module")
def classifiers(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Trained runs on the tiny BERT: two with the classes neg and pos, one with others."""
    found = {}
    for seed, name in enumerate(("first", "second", "others")):
        folder = tmp_path_factory.mktemp(name)
        recipe = tiny_recipe("SEQ_CLS", models_dir, folder, training={"seed": seed, "learning_rate": 0.03})
        rows = label_rows(21) if name != "others" else [row | {"label": row["label"] * 2} for row in label_rows(21)]
        write_jsonl(folder / "rows.jsonl", rows)
        train(recipe, folder / name)
        found[name] = folder / name
    return found


def combine(output: Path, *arguments: Any) -> dict[str, Any]:
    """The result of a combination that must succeed."""
    result = run_cli("combine", *arguments, "--output", output, "--json")
    assert result.code == 0, result.err
    found: dict[str, Any] = result.json
    assert found["certificate"]["passed"]
    return found


def refused(tmp_path: Path, *arguments: Any) -> str:
    """The message of a combination that must be refused, before anything is written."""
    result = run_cli("combine", *arguments, "--output", tmp_path / "refused")
    assert (result.code, (tmp_path / "refused").exists()) == (2, False), result.err
    return " ".join(result.err.split())


def logits(adapter: Path) -> torch.Tensor:
    """Of one fixed text, by our own loading."""
    loaded = load_adapter(adapter)
    with torch.inference_mode():
        return loaded.model(input_ids=torch.arange(20, 60)[None]).logits


def deltas(folder: Path, models_dir: Path) -> dict[str, torch.Tensor]:
    """The weight updates of a LoRA folder, layer by layer, by PEFT alone."""
    base = transformers.AutoModelForCausalLM.from_pretrained(models_dir / "llama")
    model = peft.PeftModel.from_pretrained(base, folder)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    return {name: module.get_delta_weight("default").detach() for name, module in layers.items()}


def test_cat_is_the_weighted_sum_whatever_ranks_scales_and_layers(adapters: Adapters, models_dir: Path, tmp_path: Path) -> None:
    names, weights = ("plain", "wide", "whole"), (0.5, -0.25, 1.5)
    found = combine(tmp_path / "out", *(adapters[name] for name in names), "--weights", "0.5,-0.25,1.5")
    assert (found["rank"], found["relative_error"] < 1e-6) == (10, True)  # of q_proj, the widest
    parts = [deltas(adapters[name] / "adapter", models_dir) for name in names]
    combined = deltas(tmp_path / "out", models_dir)
    assert combined.keys() == {layer for part in parts for layer in part}
    for layer, update in combined.items():
        exact = sum(part[layer] * weight for part, weight in zip(parts, weights, strict=True) if layer in part)
        torch.testing.assert_close(update, exact)


def test_a_module_that_one_adapter_has_trained_whole_moves_by_its_weight(
    adapters: Adapters, models_dir: Path, tmp_path: Path
) -> None:
    combine(tmp_path / "out", adapters["plain"], adapters["whole"], "--weights", "1,0.5")
    key = "base_model.model.lm_head.weight"
    base = transformers.AutoModelForCausalLM.from_pretrained(models_dir / "llama").lm_head.weight
    trained = load_peft_weights(adapters["whole"] / "adapter", device="cpu")[key]
    torch.testing.assert_close(load_peft_weights(tmp_path / "out", device="cpu")[key], base + 0.5 * (trained - base))


@pytest.mark.parametrize("method", COMBINATIONS)
def test_every_method_gives_what_peft_gives_where_peft_is_right(
    adapters: Adapters, models_dir: Path, tmp_path: Path, method: str
) -> None:
    density = {"density": 0.5} if prunes(method) else {}
    folders = [adapters["plain"], adapters["other"]]
    options = ["--density", "0.5"] if density else []
    found = combine(tmp_path / "out", *folders, "--method", method, "--weights", "0.7,0.3", *options)
    if method.startswith("dare"):  # drawn at random, layer by layer
        assert 0 < found["relative_error"] < 3
        return
    base = transformers.AutoModelForCausalLM.from_pretrained(models_dir / "llama")
    model = peft.PeftModel.from_pretrained(base, folders[0] / "adapter", "a")
    model.load_adapter(folders[1] / "adapter", "b")
    model.base_model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "default", combination_type=method, **density)
    ours = deltas(tmp_path / "out", models_dir)
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            torch.testing.assert_close(ours[name], module.get_delta_weight("default").detach(), atol=1e-5, rtol=1e-4)


def test_what_dare_drops_is_a_matter_of_the_seed(adapters: Adapters, tmp_path: Path) -> None:
    options = [adapters["plain"], adapters["wide"], "--method", "dare_ties_svd", "--density", "0.4", "--seed"]
    errors = [combine(tmp_path / f"{n}", *options, seed)["relative_error"] for n, seed in enumerate((1, 1, 2))]
    assert errors[0] == errors[1] != errors[2]


def test_svd_is_exact_at_the_sum_of_the_ranks_and_told_where_it_is_not(adapters: Adapters, tmp_path: Path) -> None:
    pair = [adapters["plain"], adapters["wide"], "--method", "svd"]
    found = {rank: combine(tmp_path / str(rank), *pair, "--svd-rank", rank) for rank in (1, 4, 10)}
    errors = [line["relative_error"] for line in found.values()]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6
    assert found[1]["num_params"] < found[4]["num_params"]


def test_ia3_adapters_are_combined_as_peft_does_and_absent_layers_stay(
    adapters: Adapters, models_dir: Path, tmp_path: Path
) -> None:
    combine(tmp_path / "out", adapters["ia3"], adapters["ia3_two"], "--method", "linear", "--weights", "0.25,0.75")
    found = load_peft_weights(tmp_path / "out", device="cpu")
    one, two = (load_peft_weights(adapters[name] / "adapter", device="cpu") for name in ("ia3", "ia3_two"))
    assert found.keys() == one.keys() | two.keys()
    for key, vector in found.items():
        parts = [0.25 * one.get(key, torch.ones_like(vector)), 0.75 * two.get(key, torch.ones_like(vector))]
        torch.testing.assert_close(vector, sum(parts))


def test_weights_of_one_and_nothing_give_the_first_adapter_head_included(classifiers: Adapters, tmp_path: Path) -> None:
    combine(tmp_path / "out", classifiers["first"], classifiers["second"], "--weights", "1,0")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(classifiers["first"]), atol=1e-5, rtol=1e-5)
    key = "base_model.model.classifier.weight"
    combine(tmp_path / "mean", classifiers["first"], classifiers["second"])
    heads = [load_peft_weights(classifiers[name] / "adapter", device="cpu")[key] for name in ("first", "second")]
    torch.testing.assert_close(load_peft_weights(tmp_path / "mean", device="cpu")[key], (heads[0] + heads[1]) / 2)


def test_a_combination_is_an_adapter_like_any_other(cli: Cli, adapters: Adapters, tmp_path: Path) -> None:
    combine(tmp_path / "one", adapters["plain"], adapters["wide"])
    combine(tmp_path / "two", tmp_path / "one", adapters["other"], "--method", "svd")
    rows = write_jsonl(tmp_path / "rows.jsonl", instruction_rows(4))
    assert cli("evaluate", tmp_path / "two", "--data", rows, "--json").json["num_rows"] == 4
    assert cli("infer", "--adapter", tmp_path / "two", "--prompt", "the cat", "--json").code == 0
    assert cli("merge", "--adapter", tmp_path / "two", "--output", tmp_path / "merged", "--json").code == 0
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert {"peftkit.json", "tokenizer.json", "renderings.json", "README.md", "combination.json"} <= names
    assert json.loads((tmp_path / "two" / "combination.json").read_text())["certificate"]["passed"]


def test_each_adapter_the_base_and_the_combination_are_measured_on_all_rows(classifiers: Adapters, tmp_path: Path) -> None:
    rows = [write_jsonl(tmp_path / f"{name}.jsonl", label_rows(12)) for name in "ab"]
    pair = [classifiers["first"], f"b={classifiers['second']}"]
    found = combine(tmp_path / "out", *pair, "--data", rows[0], "--data", rows[1], "--weights", "1,0")["evaluation"]
    first = found["data"]["first"]["metrics"]
    assert list(first) == ["base", "first", "b", "combination"]
    assert first["first"] == pytest.approx(first["combination"], abs=1e-5)
    alone = run_cli("evaluate", classifiers["second"], "--data", rows[1], "--json").json["metrics"]
    assert found["data"]["b"]["metrics"]["b"]["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert found["normalized"]["combination"] == pytest.approx(found["normalized"]["first"])


def test_a_search_takes_the_best_of_what_it_lists(adapters: Adapters, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", instruction_rows(4))
    pair = [adapters["plain"], adapters["other"], "--data", rows, "--data", rows, "--search"]
    result = run_cli("combine", *pair, "--output", tmp_path / "out", "--json")
    assert "searching: 16 combinations, each on 8 rows" in result.err
    found = result.json
    tried, best = found["search"]["tried"], found["search"]["best"]
    assert (len(tried), tried[best]["normalized"]) == (16, max(line["normalized"] for line in tried))
    assert list(found["weights"].values()) == tried[best]["weights"]
    assert found["evaluation"]["normalized"]["combination"] == pytest.approx(tried[best]["normalized"])


@pytest.mark.parametrize("number", [2, 3, 4, 6, 7, 20])
@pytest.mark.parametrize("method", ["cat", "ties"])
def test_a_search_stays_within_what_it_promises(number: int, method: str) -> None:
    tried = grid(Combination(method, (1.0,) * number), number)
    assert 4 <= len(tried) <= MOST
    assert len({(how.weights, how.density) for how in tried}) == len(tried)
    assert {how.density for how in tried} == ({None} if method == "cat" else {0.2, 0.5, 0.8})


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["plain"], [], "name at least 2 adapters to combine, there is 1"),
        (["plain", "plain"], [], "each adapter needs a name of its own"),
        (["plain", "wide"], ["--method", "tiez"], "--method: there is no `tiez`; there are cat, svd, linear, ties"),
        (["plain", "wide"], ["--weights", "1,2,3"], "--weights: 3 for 2 adapters"),
        (["plain", "wide"], ["--weights", "a,b"], "--weights: `a,b` is no list of numbers"),
        (["plain", "wide"], ["--weights", "0,0"], "not all of them 0"),
        (["plain", "wide"], ["--method", "ties"], "--density: is needed by `ties`"),
        (["plain", "wide"], ["--method", "ties", "--density", "1.5"], "--density: 1.5 is not above 0 and at most 1"),
        (["plain", "wide"], ["--density", "0.5"], "--density: has no effect with `--method cat`"),
        (["plain", "wide"], ["--svd-rank", "4"], "--svd-rank: has no effect with `--method cat`"),
        (["plain", "wide"], ["--seed", "4"], "--seed: has no effect with `--method cat`"),
        (["plain", "wide"], ["--majority-sign-method", "total"], "--majority-sign-method: has no effect"),
        (["plain", "wide"], ["--search"], "--search: needs --data"),
        (["plain", "wide"], ["--max-rows", "3"], "--max-rows: has no effect without --data"),
        (["plain", "wide"], ["--data", "a"], "--data: 1 files for 2 adapters"),
        (["plain", "wide"], ["--data", "plain=a", "--data", "b"], "or NAME=FILE for some; the names are plain, wide"),
        (["plain", "wide"], ["--method", "linear"], "`plain` has 4 where `wide` has 6; `cat` (exact) and `svd` take any"),
        (["plain", "wide"], ["--method", "svd", "--svd-rank", "11"], "the result is exact at 10"),
        (["plain", "dora"], [], "`dora` cannot be combined: it is DoRA, whose magnitudes do not add up"),
        (["tokens", "biased"], [], "trains embeddings of single tokens"),
        (["plain", "biased"], [], "has biases of its own"),
        (["plain", "ia3"], [], "are of two methods, lora and ia3"),
        (["ia3", "ia3_two"], ["--method", "cat"], "IA3 has no matrices to do this with; it takes `linear`"),
    ],
)
def test_what_cannot_be_combined_is_refused_before_a_base_is_loaded(
    adapters: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], options: list[str], words: str
) -> None:
    monkeypatch.setattr("peftkit.engine.loaded.load_base_model", None)
    assert words in refused(tmp_path, *(adapters[name] for name in names), *options)


def test_heads_for_other_answers_are_refused(classifiers: Adapters, adapters: Adapters, tmp_path: Path) -> None:
    text = refused(tmp_path, classifiers["first"], classifiers["others"])
    assert "heads for different answers: 2 classes (neg, pos), and 2 classes (negneg, pospos)" in text
    assert "are for two tasks, SEQ_CLS and CAUSAL_LM" in refused(tmp_path, classifiers["first"], adapters["plain"])
    pair = [classifiers["first"], classifiers["second"]]
    assert "--weights: add up to 0, and the head" in refused(tmp_path, *pair, "--weights", "1,-1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": "owner/other"}, "are for different bases, "),
        ({"revision": "v2"}, "different bases: their `revision` is None and v2"),
        ({"config_overrides": {"num_hidden_layers": 1}}, "different bases: their `config_overrides` is "),
        ({"method": "bottleneck"}, "is a bottleneck adapter; only lora and ia3 can be combined"),
    ],
)
def test_other_bases_and_methods_are_refused(adapters: Adapters, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    shutil.copytree(adapters["other"] / "adapter", tmp_path / "copy")
    facts = json.loads((tmp_path / "copy" / "peftkit.json").read_text()) | changes
    (tmp_path / "copy" / "peftkit.json").write_text(json.dumps(facts))
    assert words in refused(tmp_path, adapters["plain"], tmp_path / "copy")


def test_two_models_of_one_shape_are_told_apart_by_their_weights(adapters: Adapters, models_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(models_dir / "llama", tmp_path / "llama")
    config = transformers.AutoConfig.from_pretrained(models_dir / "llama")
    torch.manual_seed(9)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, model={"name_or_path": str(tmp_path / "llama")})
    train(recipe, tmp_path / "run")
    assert "are for different bases" in refused(tmp_path, adapters["plain"], tmp_path / "run")


def test_what_adapters_differ_in_is_noted_and_their_rows_can_all_be_read(adapters: Adapters, tmp_path: Path) -> None:
    shutil.copytree(adapters["other"] / "adapter", tmp_path / "copy")
    facts = json.loads((tmp_path / "copy" / "peftkit.json").read_text())
    facts |= {"format": "chat", "system_prompt": "Be brief.", "encoding": facts["encoding"] | {"max_length": 50}}
    (tmp_path / "copy" / "peftkit.json").write_text(json.dumps(facts))
    (tmp_path / "copy" / "renderings.json").unlink()
    found = combine(tmp_path / "out", adapters["plain"], tmp_path / "copy")
    assert found["notes"] == ["as `plain` was trained, and `copy` otherwise: `system_prompt`, `max_length`"]
    kept = json.loads((tmp_path / "out" / "peftkit.json").read_text())
    assert (kept["format"], kept["system_prompt"], kept["encoding"]["max_length"]) == ("auto", None, 60)


def test_adapters_that_peft_alone_has_trained_are_combined(adapters: Adapters, tmp_path: Path) -> None:
    for name in ("plain", "wide"):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(adapters[name] / "adapter" / file, folder / file)
    combine(tmp_path / "out", tmp_path / "plain", tmp_path / "wide")
    combine(tmp_path / "same", adapters["plain"], adapters["wide"])
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "same"))


def test_a_tensor_that_is_no_part_of_lora_is_never_lost_in_silence(adapters: Adapters, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(adapters["other"] / "adapter", tmp_path / "copy")
    state = load_peft_weights(tmp_path / "copy", device="cpu")
    save_file(state | {"base_model.model.odd.weight": torch.ones(2)}, tmp_path / "copy" / "adapter_model.safetensors")
    text = refused(tmp_path, adapters["plain"], tmp_path / "copy")
    assert "`copy` holds what is no part of LoRA or IA3 and would be lost: base_model.model.odd.weight" in text
