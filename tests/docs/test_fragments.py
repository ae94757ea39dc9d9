"""What documents show is valid: YAML by the recipe's schema, JSON, links, the table of commands; both READMEs show the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from peftkit.cli import COMMANDS, app
from peftkit.comparison.file import Comparison
from peftkit.recipe.schema import Recipe
from peftkit.recipe.yaml_file import read_yaml
from tests.docs.documents import CHINESE, FENCE, PAGES, README, ROOT, Block, blocks, commands

_EVERY_RECIPE: dict[str, Any] = {
    "task": "CAUSAL_LM",
    "model": {"name_or_path": "owner/name"},
    "adapter": {"method": "lora"},
    "data": {"train": "rows.jsonl"},
}
ALL = [block for page in PAGES for block in blocks(page)]
YAML = [block for block in ALL if block.kind == "yaml"]
JSON = [block for block in ALL if block.kind in ("json", "jsonl")]
by_place = {"ids": lambda block: block.place}


def completed(fragment: dict[str, Any]) -> dict[str, Any]:
    """A recipe that a fragment is a part of."""
    parts = {
        name: _EVERY_RECIPE.get(name, {}) | value if isinstance(value, dict) else value for name, value in fragment.items()
    }
    return _EVERY_RECIPE | parts


@pytest.mark.parametrize("block", YAML, **by_place)
def test_a_fragment_of_yaml_is_part_of_a_valid_recipe(block: Block, tmp_path: Path) -> None:
    (tmp_path / "fragment.yaml").write_text(block.text, encoding="utf-8")
    fragment = read_yaml(tmp_path / "fragment.yaml")[0]
    if "compare" in fragment:
        Comparison.model_validate(fragment["compare"])
    else:
        Recipe.model_validate(completed(fragment) | {"name": "recipe"})


@pytest.mark.parametrize("block", JSON, **by_place)
def test_lines_of_json_can_be_read(block: Block) -> None:
    assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    assert not missing


def test_the_table_of_commands_has_every_command_with_options_that_it_takes() -> None:
    text = (ROOT / "docs" / "overview.md").read_text(encoding="utf-8").partition("## Commands")[2]
    rows = dict(re.findall(r"^\| (`[^|]+`) \| (.+) \|$", text, re.MULTILINE))
    program: Any = typer.main.get_command(app)
    listed = {name for first in rows for name in re.findall(r"`(\w+)", first)}
    assert listed >= {command.__name__ for command in COMMANDS}
    for first, rest in rows.items():
        name = re.match(r"`(\w+)", first)[1]  # type: ignore[index]
        if name in program.commands:
            taken = {option for parameter in program.commands[name].params for option in parameter.opts}
            missing = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", first + rest)) - taken
            assert not missing, name


def without_comments(block: Block) -> list[str]:
    """The lines of a block as a program reads them."""
    lines = (re.sub(r"\s+# .*", "", line) for line in block.text.splitlines())
    return [line for line in lines if line.strip()]


def test_both_readmes_show_the_same_blocks_and_commands() -> None:
    for ours, theirs in zip(blocks(README), blocks(CHINESE), strict=True):
        assert (ours.kind, without_comments(ours)) == (theirs.kind, without_comments(theirs)), theirs.place
    assert [command.words for command in commands(README)] == [command.words for command in commands(CHINESE)]
    pictures = [re.findall(r"\]\((\S+\.png)\)", page.read_text(encoding="utf-8")) for page in (README, CHINESE)]
    assert pictures[0] == pictures[1]
