"""The cache's key: everything that rows depend on changes it, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftkit.engine.cache import cache_key
from peftkit.engine.prepare import Model
from peftkit.plan import Hardware, make_plan
from peftkit.recipe import load_recipe
from tests.conftest import tiny_tokenizer, write_jsonl
from tests.runs import tiny_recipe

CPU = Hardware("cpu", "the CPU", True, 2**30)


@pytest.fixture
def key(models_dir: Path, tmp_path: Path) -> Any:
    """The key of the tiny recipe with some changes."""
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path)

    def found(*changes: str, tokenizer: Any = None, **facts: Any) -> str | None:
        return cache_key(make_plan(load_recipe(recipe, changes), CPU), Model(tokenizer or tiny_tokenizer(), **facts))

    return found


@pytest.mark.parametrize(
    "changes",
    [
        ["data.max_length=59"],
        ["data.train_on=all"],
        ["data.system_prompt=hi"],
        ["data.validation=0.5"],
        ["data.on_bad_row=drop"],
        ["data.train.max_rows=3"],
    ],
)
def test_what_decides_on_rows_changes_the_key(key: Any, changes: list[str]) -> None:
    assert key(*changes) != key()


@pytest.mark.parametrize(
    "changes",
    [
        ["adapter.method=ia3"],
        ["training.seed=7"],
        ["training.batch_size=4", "training.micro_batch_size=2"],
        ["data.packing=true"],
        ["data.cache=false"],
        ["generation.max_new_tokens=3"],
    ],
)
def test_what_does_not_decide_on_rows_leaves_the_key(key: Any, changes: list[str]) -> None:
    assert key(*changes) == key()


def test_the_seed_counts_where_rows_are_drawn_by_it(key: Any) -> None:
    assert key("data.validation=0.5") != key("data.validation=0.5", "training.seed=7")


def test_the_content_counts_and_not_the_date(key: Any, tmp_path: Path) -> None:
    first, path = key(), tmp_path / "rows.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("the", "The", 1), encoding="utf-8")
    second = key()
    path.write_text(text, encoding="utf-8")
    assert [first == second, first == key()] == [False, True]


def test_the_tokenizer_and_the_model_count(key: Any, tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.chat_template += " "
    added = tiny_tokenizer()
    added.add_special_tokens({"additional_special_tokens": ["<x>"]})
    keys = {key(), key(tokenizer=other), key(tokenizer=added), key(max_positions=50), key(template_date="2026-01-01")}
    assert len(keys) == 5


def test_a_stream_has_no_key(key: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}])
    assert key("data.train.streaming=true", "training.max_steps=3") is None
