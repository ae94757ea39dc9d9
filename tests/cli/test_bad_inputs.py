"""Every bad file through the real command line: exit code 3 and one message that names file and row."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml

from peftkit.engine.cache import cache_dir
from peftkit.tasks import TASKS
from tests.conftest import Result, write_jsonl
from tests.unit.bad_files import BadFile, good_rows
from tests.unit.bad_rows import BAD_FILES

_MODELS = {"CAUSAL_LM": "llama", "SEQ_2_SEQ_LM": "t5"}  # all others: bert
# One row among others: what is wrong with it leaves the rest of the file readable.
_DROPPABLE = [bad for bad in BAD_FILES if bad.file.endswith(".jsonl") and re.search(r":(?!1$)\d+$", bad.words[0])]
_FIRST_OF_TASKS = [next(bad for bad in BAD_FILES if bad.task == task and not bad.by_reader) for task in TASKS]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    return cache_dir()


@pytest.fixture
def recipe_for(tmp_path: Path, models_dir: Path) -> Callable[..., Path]:
    """A recipe on a tiny model whose rows, or validation rows, are a bad file."""

    def write(bad: BadFile, **more: Any) -> Path:
        (tmp_path / bad.file).write_bytes(bad.bytes())
        data = {bad.split: {"path": bad.file} | bad.source, "max_length": 64} | bad.data | more
        if bad.split != "train":
            data["train"] = write_jsonl(tmp_path / "good.jsonl", good_rows(bad.task)).name
        model = {"name_or_path": str(models_dir / _MODELS.get(bad.task, "bert"))}
        content = {"task": bad.task, "model": model, "adapter": {"method": "lora", "r": 2}, "data": data}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "recipe.yaml"

    return write


def assert_refused(result: Result, bad: BadFile) -> None:
    """Exit code 3, the same single problem on stdout and stderr, and nothing but it."""
    assert result.code == 3, result.err
    (problem,) = result.json["problems"]
    message = ": ".join(problem[name] for name in ("where", "key", "what") if problem[name])
    assert result.err.partition("\nsee docs/")[0].strip() == f"peftkit: error (exit 3):\n{message}"
    assert bad.file in message
    assert [word for word in bad.words if word not in message] == []


def named(values: list[BadFile]) -> Any:
    """A parameter `bad` of these files."""
    return pytest.mark.parametrize("bad", values, ids=[f"{bad.task} {bad.name}" for bad in values])


@named(BAD_FILES)
def test_data_refuses_a_bad_file_in_one_message(cli: Any, recipe_for: Any, cache: Path, bad: BadFile) -> None:
    assert_refused(cli("data", recipe_for(bad), "--json"), bad)
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []


@named(BAD_FILES)
def test_validate_knows_a_bad_file_or_lets_it_pass(cli: Any, recipe_for: Any, bad: BadFile) -> None:
    result = cli("validate", recipe_for(bad), "--json")
    assert result.code in (0, 3), result.err
    assert (result.err == "") == (result.code == 0)


@named(_FIRST_OF_TASKS)
@pytest.mark.parametrize("command", ["plan", "train"])
def test_plan_and_train_refuse_it_before_anything_is_written(
    cli: Any, recipe_for: Any, tmp_path: Path, command: str, bad: BadFile
) -> None:
    result = cli(command, recipe_for(bad), "--json", "--set", f"output.dir={tmp_path / 'runs'}")
    assert (result.code, len(result.json["problems"])) == (3, 1)
    assert result.err.startswith("peftkit: error (exit 3):\n")
    assert [word for word in bad.words if word not in result.err] == []
    assert not (tmp_path / "runs").exists()


@named(_DROPPABLE)
def test_a_bad_row_is_dropped_where_the_recipe_says_so(cli: Any, recipe_for: Any, bad: BadFile) -> None:
    recipe = recipe_for(bad, on_bad_row="drop")
    result = cli("data", recipe, "--json")
    assert (result.code, result.err) == (0, "")
    (finding,) = [item for item in result.json["findings"] if item["kind"] in ("bad_row", "too_long")]
    assert finding["split"] == "train"
    told = f"{finding['row']}: {finding['reason']}"
    assert [word for word in bad.words if word not in told] == []
    report = result.json["splits"]["train"]
    assert report["findings"][finding["kind"]] == 1
    assert report["examples"] == (recipe.parent / bad.file).read_bytes().count(b"\n") - 1


def test_enough_bad_rows_can_be_dropped_to_prove_it() -> None:
    assert len(_DROPPABLE) > 60
    assert {bad.task for bad in _DROPPABLE} == {*TASKS}
