"""Several adapters on one base: each answers as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.engine.generate import answer_rows, generation_config, prompt_row
from peftkit.engine.loaded import load_adapter, without_adapter
from peftkit.engine.several import BASE, Several, parse_names
from peftkit.errors import LoadError, RecipeError
from tests.conftest import label_rows, rows_of, write_jsonl
from tests.runs import tiny_recipe, train
from tests.serving import LANGUAGE, PROMPTS, answers_of


@pytest.fixture(scope="module")
def several(language_adapters: dict[str, Path]) -> Several:
    """All of LANGUAGE on one base."""
    held = Several()
    for name, path in language_adapters.items():
        held.load(name, path)
    return held


@pytest.mark.parametrize("name", LANGUAGE)
def test_each_adapter_answers_as_if_it_were_alone(name: str, several: Several, answers_alone: dict[str, list[str]]) -> None:
    with several[name].chosen() as loaded:
        assert answers_of(loaded, PROMPTS) == answers_alone[name]


def test_the_adapters_say_different_things(answers_alone: dict[str, list[str]]) -> None:
    assert len({tuple(answers) for answers in answers_alone.values()}) == len(answers_alone)


def test_the_base_answers_as_without_any_adapter(
    several: Several, language_adapters: dict[str, Path], answers_alone: dict[str, list[str]]
) -> None:
    with several[BASE].chosen() as loaded:
        assert answers_of(loaded, PROMPTS) == answers_alone[BASE]
    with several["lora"].chosen() as loaded:
        assert answers_of(loaded, PROMPTS) == answers_alone["lora"]


@pytest.mark.parametrize("first", ["ia3", "prefix", "dora", "full"])
def test_the_base_is_the_same_whoever_comes_first(
    first: str, language_adapters: dict[str, Path], answers_alone: dict[str, list[str]]
) -> None:
    several = Several()
    several.load(first, language_adapters[first])
    for name in (first, BASE, first):
        with several[name].chosen() as loaded:
            assert answers_of(loaded, PROMPTS) == answers_alone[name]


def test_rows_of_one_batch_have_their_own_adapters(several: Several, answers_alone: dict[str, list[str]]) -> None:
    names = ["wide", "lora", BASE, "lora", "wide"]
    loaded, host = several["lora"].loaded, several["lora"].host
    assert host is several["wide"].host
    examples = [example for text in PROMPTS for example in loaded.prompts.encode(prompt_row(loaded, text), "x", target=False)]
    batch = loaded.runtime.generation_batch(examples)
    # By transformers' own loop, which no row leaves: each keeps its place.
    with host.using([several[name].key for name in names]), loaded.inference():
        output = host.model.generate(**batch, generation_config=generation_config(loaded, {}))
    found = loaded.runtime.tokenizer.batch_decode(loaded.runtime.new_tokens(output, batch), skip_special_tokens=True)
    assert [text.strip() for text in found] == [answers_alone[name][number] for number, name in enumerate(names)]


def test_the_base_is_held_once(several: Several) -> None:
    models = [several[name].loaded.model for name in ("lora", "ia3", "prefix", "dora")]
    embeddings = {model.get_input_embeddings().weight.data_ptr() for model in models}  # type: ignore[operator]
    assert len(embeddings) == 1
    assert several["full"].loaded.model.get_input_embeddings().weight.data_ptr() not in embeddings  # type: ignore[operator]


def test_an_adapter_takes_the_place_of_another_and_goes(
    language_adapters: dict[str, Path], answers_alone: dict[str, list[str]]
) -> None:
    several = Several()
    for name in ("lora", "wide"):
        several.load(name, language_adapters[name])
    old = several["lora"]
    several.load("lora", language_adapters["ia3"])
    with old.chosen() as loaded:
        assert answers_of(loaded, PROMPTS) == answers_alone["lora"]
    several.release(old)
    for name, same_as in (("lora", "ia3"), ("wide", "wide"), (BASE, BASE)):
        with several[name].chosen() as loaded:
            assert answers_of(loaded, PROMPTS) == answers_alone[same_as]
    several.release(several.remove("wide"))
    assert several.names == ["lora", BASE]


@pytest.fixture(scope="module")
def classifiers(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Heads of two, three and three other labels by methods that train the base's own tensors, and vectors."""
    root = tmp_path_factory.mktemp("classifiers")
    wanted: dict[str, tuple[str, dict[str, Any], Callable[[int], str]]] = {
        "two": ("SEQ_CLS", {"method": "lora", "r": 4}, lambda number: "ab"[number % 2]),
        "three": ("SEQ_CLS", {"method": "bitfit"}, lambda number: "abc"[number % 3]),
        "others": ("SEQ_CLS", {"method": "head"}, lambda number: "xyz"[number % 3]),
        "vectors": ("FEATURE_EXTRACTION", {"method": "lora", "r": 4}, lambda number: ""),
    }
    for name, (task, section, label) in wanted.items():
        folder = root / name
        folder.mkdir()
        recipe = tiny_recipe(task, models_dir, folder, adapter=section)
        rows = rows_of(task, 21)
        write_jsonl(folder / "rows.jsonl", [row | {"label": label(n)} if "label" in row else row for n, row in enumerate(rows)])
        train(recipe, folder / "run")
    return {name: root / name / "run" for name in wanted}


def test_heads_of_different_labels_are_right(classifiers: dict[str, Path]) -> None:
    several = Several()
    for name, path in classifiers.items():
        several.load(name, path)
    texts = [row["text"] for row in label_rows(4)]
    for name, path in classifiers.items():
        with several[name].chosen() as loaded:
            found = [next(answer_rows(loaded, [("x", prompt_row(loaded, text))], {}, 1)) for text in texts]
        by_itself = load_adapter(path)
        wanted = [next(answer_rows(by_itself, [("x", prompt_row(by_itself, text))], {}, 1)) for text in texts]
        assert found == wanted
    backbones = {several[name].loaded.model.get_input_embeddings().weight.data_ptr() for name in classifiers}  # type: ignore[operator]
    assert len(backbones) == 1
    with several[BASE].chosen() as loaded, without_adapter(load_adapter(classifiers["vectors"])) as base:
        assert loaded.task.name == "FEATURE_EXTRACTION"  # the classifiers' base has no head
        row = ("x", prompt_row(loaded, texts[0]))
        assert next(answer_rows(loaded, [row], {}, 1)) == next(answer_rows(base, [row], {}, 1))


def test_adapters_on_different_bases_are_refused_with_their_names(
    language_adapters: dict[str, Path], classifiers: dict[str, Path]
) -> None:
    several = Several()
    several.load("chat", language_adapters["lora"])
    with pytest.raises(LoadError, match=r"chat: .*llama; labels \(new\): .*bert"):
        several.load("labels", classifiers["two"])


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["a=x", "y"], "several adapters need names"),
        (["a=x", "a=y"], "given twice"),
        (["base=x"], "`base` is the model without adapter"),
        (["a/b=x"], "cannot name an adapter"),
    ],
)
def test_names_that_cannot_be_are_refused(texts: list[str], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        parse_names(texts)
