"""The tables of docs/coming_from.md are those in code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peftkit.migration import TOOLS
from peftkit.migration.base import OUTCOMES, Config
from peftkit.migration.convert import convert
from tests.unit.test_migration import SMALLEST

GUIDE = (Path(__file__).parents[2] / "docs/coming_from.md").read_text(encoding="utf-8")


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the table that begins with a row."""
    lines = GUIDE.split(heading, 1)[1].splitlines()[2:]
    table = lines[: next((number for number, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


WORDS = rows_of("| what | LLaMA-Factory | axolotl | TRL | peftkit |")
DEFAULTS = rows_of("| peftkit's key | LLaMA-Factory | axolotl | TRL | here |")


@pytest.mark.parametrize("row", WORDS, ids=[row[0] for row in WORDS])
def test_their_words_lead_to_ours(row: list[str]) -> None:
    ours = row[4].strip("`")
    for tool, cell in zip(TOOLS.values(), row[1:4], strict=True):
        for key in re.findall(r"`(\w+)`", cell):
            move = tool.moves.get(key) or tool.read[key]
            assert move.ours.startswith(ours) or (ours, key) == ("data.train", "dataset_dir"), (tool.name, key, move.ours)


@pytest.mark.parametrize("row", DEFAULTS, ids=[row[0] for row in DEFAULTS])
def test_defaults_that_differ_are_those_that_are_written(row: list[str]) -> None:
    ours, here = row[0].strip("`"), row[4]
    for name, told in zip(TOOLS, row[1:4], strict=True):
        values = SMALLEST[name] | ({"adapter": "lora"} if name == "axolotl" else {})
        entries = convert(Config(Path("c.yaml"), values), TOOLS[name], Path()).entries
        found = str(entries[ours].value).lower() if ours in entries else here
        assert {"2 r": "16", "": here}.get(told, told) == found, name


def test_the_releases_that_were_read_are_named() -> None:
    assert {tool.name for tool in TOOLS.values() if f"{tool.title} {tool.version}" not in GUIDE} == set()


def test_every_outcome_is_explained() -> None:
    assert [row[0] for row in rows_of("| outcome | |")] == [*OUTCOMES.values()]
