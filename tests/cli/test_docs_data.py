"""The examples of docs/data.md are real ones: every recipe snippet with `data` goes through `peftkit data`.

The rows of a snippet are those of the ```json and ```jsonl blocks between it and the last snippet or heading, written to the
files that it names, in order; where it names more files than there are blocks, the rest get the last block's rows.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftkit.formats import FORMATS, detect_format
from peftkit.recipe.schema import DataSection, SourceSection
from peftkit.tasks import TASKS
from tests.conftest import Result, bert_like_tokenizer, tiny_tokenizer
from tests.docs.places import numbered, write_rows
from tests.templates import THINK, template_tokenizer
from tests.unit.test_foreign_layouts import AXOLOTL, Layout

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "data.md"
PARTS = re.compile(r"^(?:```(?P<kind>\w+)\n(?P<text>.*?)^```$|(?P<heading>#+ [^\n]*)$)", re.MULTILINE | re.DOTALL)
REPEATS = 20  # of the rows in front of a snippet: enough for a fraction
MODELS = {"CAUSAL_LM": "llama", "SEQ_2_SEQ_LM": "t5"}  # all others: bert

Row = dict[str, Any]


@dataclass(frozen=True)
class Snippet:
    """A recipe snippet of a document, with the blocks of rows in front of it."""

    place: str
    recipe: dict[str, Any]
    rows: list[list[Row]]


def snippets(path: Path) -> Iterator[Snippet]:
    """The ```yaml blocks of a document that have a top-level `data`."""
    text, rows = path.read_text(encoding="utf-8"), []
    for part in PARTS.finditer(text):
        if part["heading"]:
            rows = []
        elif part["kind"] in ("json", "jsonl"):
            rows.append([json.loads(line) for line in part["text"].splitlines()])
        elif part["kind"] == "yaml" and "data" in (recipe := yaml.safe_load(part["text"])):
            yield Snippet(f"{path.name}:{text.count(chr(10), 0, part.start()) + 1}", recipe, rows)
            rows = []


SNIPPETS = list(snippets(GUIDE))


@pytest.fixture(scope="module")
def roomy_models(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models without their weights, with room for thousands of tokens; the Llama's template has a variable."""
    root = tmp_path_factory.mktemp("roomy")
    tokenizers = {"llama": template_tokenizer(THINK), "t5": tiny_tokenizer(adds_end=True), "bert": bert_like_tokenizer()}
    for name, tokenizer in tokenizers.items():
        (root / name).mkdir()
        shutil.copy(models_dir / name / "config.json", root / name)
        config = json.loads((root / name / "config.json").read_text(encoding="utf-8"))
        roomy = config | ({"max_position_embeddings": 4096} if "max_position_embeddings" in config else {})
        (root / name / "config.json").write_text(json.dumps(roomy), encoding="utf-8")
        tokenizer.model_max_length = 4096
        tokenizer.save_pretrained(root / name)
    return root


def paths_of(data: dict[str, Any]) -> Iterator[str]:
    """The files that a `data` section names, in order."""
    for split in ("train", "validation", "test"):
        value = data.get(split)
        for source in value if isinstance(value, list) else [value]:
            if isinstance(source, str | dict):
                yield source if isinstance(source, str) else source["path"]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[snippet.place for snippet in SNIPPETS])
def test_a_snippet_goes_through_peftkit_data(
    snippet: Snippet, roomy_models: Path, tmp_path: Path, write_recipe: Callable[..., Path], cli: Callable[..., Result]
) -> None:
    data, task = snippet.recipe["data"], snippet.recipe.get("task", "CAUSAL_LM")
    paths = list(paths_of(data))
    assert 0 < len(snippet.rows) <= len(paths), "every snippet has rows in front of it, and a file for each block of them"
    for number, path in enumerate(paths):
        rows = snippet.rows[min(number, len(snippet.rows) - 1)]
        write_rows(tmp_path / path.replace("*", "1"), [numbered(row, turn) for turn in range(REPEATS) for row in rows])
    rest = {"task": task, "adapter": {"method": "lora"}} | snippet.recipe
    recipe = write_recipe(rest | {"model": {"name_or_path": str(roomy_models / MODELS.get(task, "bert"))}})
    result = cli("data", recipe, "--json", "--rows", "1", "--set", "data.cache=false")
    assert result.code == 0, result.err
    shown = result.json
    assert set(shown["splits"]) == {split for split in ("train", "validation", "test") if split in data}
    assert shown["splits"]["train"]["targets"] > 0
    assert shown["rows"]


def test_the_dropped_rows_of_the_guide_are_found_by_the_audit(
    roomy_models: Path, tmp_path: Path, write_recipe: Callable[..., Path], cli: Callable[..., Result]
) -> None:
    (snippet,) = [snippet for snippet in SNIPPETS if snippet.recipe["data"].get("on_bad_row") == "drop"]
    write_rows(tmp_path / "reviews.csv", snippet.rows[0])
    model = {"name_or_path": str(roomy_models / "bert")}
    recipe = write_recipe({"model": model, "adapter": {"method": "lora"}} | snippet.recipe)
    overrides = ("--set", "data.cache=false")
    assert cli("data", recipe, "--json", *overrides).json["splits"]["train"]["findings"] == {"bad_row": 1}
    refused = cli("data", recipe, *overrides, "--set", "data.on_bad_row=error")
    assert refused.code == 3
    assert "reviews.csv:4" in refused.err


@pytest.mark.parametrize("name", list(FORMATS))
def test_the_guide_shows_each_format_with_its_example(name: str) -> None:
    section = GUIDE.read_text(encoding="utf-8").partition(f"**`{name}`**")[2]
    shown = json.loads(section.partition("```json\n")[2].partition("\n```")[0])
    assert shown == FORMATS[name].example
    tasks = [task.name for task in TASKS.values() if task.can_read(FORMATS[name].yields)]
    assert all(task in section.partition("):")[0] for task in tasks), f"it is for {', '.join(tasks)}"
    assert detect_format(frozenset(shown)) == FORMATS[name]


@pytest.mark.parametrize("key", [*SourceSection.model_fields, *DataSection.model_fields])
def test_the_guide_mentions_every_key_of_data_as_code(key: str) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    code = "\n".join([*re.findall(r"^```\w*\n.*?^```$", text, re.MULTILINE | re.DOTALL), *re.findall(r"`[^`\n]+`", text)])
    assert re.search(rf"\b{key}\b", code)


def test_the_guide_names_every_value_of_the_keys_that_have_few() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for key in ("truncation", "train_on", "stopping_strategy", "on_bad_row"):
        for value in DataSection.model_json_schema()["properties"][key]["enum"]:
            assert f"`{value}`" in text or f"{key}: {value}" in text, f"{key}: {value}"


def test_the_guide_names_every_kind_of_finding() -> None:
    table = GUIDE.read_text(encoding="utf-8").partition("## The audit")[2]
    engine = ROOT / "peftkit" / "engine"
    source = "".join((engine / name).read_text(encoding="utf-8") for name in ("prepare.py", "audit.py"))
    kinds = set(re.findall(r"audit\.add\([\w\"]+, \"(\w+)\"", source))
    assert kinds == set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))


CHANGED = [layout for layout in AXOLOTL if layout.columns or layout.template or layout.format != "auto"]


@pytest.mark.parametrize("layout", AXOLOTL, ids=[layout.name for layout in AXOLOTL])
def test_the_table_of_foreign_types_says_what_their_test_proves(layout: Layout) -> None:
    section = GUIDE.read_text(encoding="utf-8").partition("| axolotl |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines()[2:]]
    if layout in CHANGED:
        (stated,) = [text for names, text in rows if names == layout.name]
        source = SourceSection(path="rows.jsonl", **yaml.safe_load(stated.strip("`")))
        assert source.columns == layout.columns
        assert source.template == layout.template
        assert source.format == layout.format
    else:
        names = {name for names, text in rows if text == "nothing" for name in names.split(", ")}
        assert re.split(r"( with |: )", layout.name)[0] in names
