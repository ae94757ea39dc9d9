"""Errors end with the page and section of docs/ that tell more; every one of these exists."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from peftkit import guides
from peftkit.cli import app
from peftkit.errors import DataError, Problem, RecipeError
from peftkit.guides import SECTIONS, section_of
from peftkit.recipe.explain import all_keys
from tests.conftest import Result, write_jsonl
from tests.runs import tiny_recipe

ROOT = Path(__file__).parents[1]
NAMED = {name: value for name, value in vars(guides).items() if name.isupper() and isinstance(value, str)}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them: lower case, spaces as hyphens, no other marks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("guide", sorted({*NAMED.values(), *SECTIONS.values()}))
def test_every_guide_is_a_page_and_a_heading(guide: str) -> None:
    page, _, anchor = guide.partition("#")
    assert (ROOT / page).is_file()
    assert anchor in anchors(ROOT / page)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_every_guide_is_taken_by_some_error(name: str) -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "peftkit").rglob("*.py") if path.name != "guides.py")
    assert re.search(rf"\bguide(: str )?= ?[^\n]*\b{name}\b", code)


def test_sections_are_of_keys_and_options_that_there_are() -> None:
    keys = {info.path for info in all_keys()}
    commands: Any = typer.main.get_command(app)
    options = {name for command in commands.commands.values() for param in command.params for name in param.opts}
    assert {about for about in SECTIONS if about not in keys | options} == set()


def test_a_key_has_the_section_of_its_source_or_of_the_section_around_it() -> None:
    assert section_of("data.train.0.format") == section_of("data.validation.format") == "docs/data.md#formats"
    assert section_of("model.quantization.bits") == "docs/quantization.md#what-survives-which-layers"
    assert section_of("training.seed") == section_of("data.train.path") == section_of("data.labels") == ""


def test_an_error_says_it_in_its_last_line() -> None:
    assert DataError("is bad", guide=guides.FORMATS).told == "is bad\nsee docs/data.md#formats"
    assert DataError("is bad").told == "is bad"
    assert RecipeError("--resume: nothing to do").told.endswith("\nsee docs/reliability.md#resume")
    several = [Problem("r.yaml:1", "a", "b", guide="x"), Problem("r.yaml:2", "c", "d", guide="x"), Problem("", "e", "f")]
    assert RecipeError(several).told == "r.yaml:1: a: b\nr.yaml:2: c: d\ne: f\nsee x"


def test_the_command_line_prints_it_and_a_typing_error_has_none(
    cli: Callable[..., Result], write_recipe: Callable[..., Path], recipe: dict[str, Any]
) -> None:
    rule = cli("validate", write_recipe(recipe | {"data": recipe["data"] | {"truncation": "split", "packing": True}}),
               "--set", "adapter.method=prompt_tuning")  # fmt: skip
    assert rule.err.endswith("\nsee docs/data.md#packing-and-grouping\n")
    typing = cli("validate", write_recipe(recipe | {"data": recipe["data"] | {"max_length": "long"}}))
    assert (typing.code, "see docs" in typing.err) == (2, False)


def test_rows_of_no_format_lead_to_the_formats(cli: Callable[..., Result], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"n": number} for number in range(5)])
    assert cli("init", tmp_path / "r.yaml", "--data", "rows.jsonl").err.endswith("\nsee docs/data.md#formats\n")


def test_rows_that_are_too_long_lead_to_length(cli: Callable[..., Result], models_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("SEQ_CLS", models_dir, tmp_path, data={"max_length": 3, "cache": False})
    assert cli("data", recipe).err.endswith("\nsee docs/data.md#length\n")
