"""Mixtures, streams and the cache of rows through the command line."""

from __future__ import annotations

import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from peftkit.engine.cache import cache_dir
from tests.conftest import CHATML, instruction_rows, tiny_tokenizer, write_jsonl
from tests.engine.test_resume import interrupt, numbers_of
from tests.runs import curve, peftkit_process, run_cli, tiny_recipe, train

Row = dict[str, Any]
STEPS = 60


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, for processes that it starts too."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))


def kept() -> list[str]:
    """The entries of the cache."""
    return sorted(path.name for path in cache_dir().glob("*") if path.is_dir())


def shown(recipe: Path, *overrides: str) -> Row:
    """What `peftkit data --json` says of a recipe, with up to 2,000 rows."""
    sets = [part for override in overrides for part in ("--set", override)]
    result = run_cli("data", recipe, "--json", "--rows", 2000, *sets)
    assert result.code == 0, result.err
    answer: Row = result.json
    return answer


def origins(report: Row) -> list[str]:
    """`a 3`: file and number of every row."""
    return [Path(row["row"]).name.replace(".jsonl:", " ") for row in report["rows"]]


@pytest.fixture
def mixture(models_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """A recipe on the rows of `a` (90 rows, weight 3) and `b` (60 rows, weight 1)."""

    def write(**more: dict[str, Any]) -> Path:
        for name, number, place in (("a", 90, 0), ("b", 60, 200)):
            rows = [{"text": f"{row['instruction']} {place + index}"} for index, row in enumerate(instruction_rows(number))]
            write_jsonl(tmp_path / f"{name}.jsonl", rows)
        sources = [{"path": "a.jsonl", "weight": 3}, {"path": "b.jsonl", "weight": 1}]
        more["data"] = {"train": sources} | more.get("data", {})
        return tiny_recipe("CAUSAL_LM", models_dir, tmp_path, **more)

    return write


def test_a_mixture_ends_with_the_first_source_that_has_no_more_rows(mixture: Any) -> None:
    found = origins(shown(mixture(data={"stopping_strategy": "first_exhausted"})))
    counts = Counter(name[0] for name in found)
    assert len(set(found)) == len(found)
    assert counts["a"] == 90
    assert counts["a"] / len(found) == pytest.approx(0.75, abs=0.08)


def test_a_mixture_starts_sources_over_until_all_have_ended(mixture: Any) -> None:
    found = origins(shown(mixture(data={"stopping_strategy": "all_exhausted"})))
    counts = Counter(found)
    assert {name for name in counts if name[0] == "b"} == {f"b {number}" for number in range(1, 61)}
    assert {count for name, count in counts.items() if name[0] == "b"} == {1}
    assert min(count for name, count in counts.items() if name[0] == "a") >= 1
    assert max(counts.values()) > 1
    assert sum(name[0] == "a" for name in found) / len(found) == pytest.approx(0.75, abs=0.08)


def test_a_mixture_is_drawn_by_the_seed(mixture: Any) -> None:
    recipe = mixture(data={"cache": False})
    first, again, other = (origins(shown(recipe, f"training.seed={seed}")) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.fixture
def stream(mixture: Any) -> Path:
    """A recipe whose mixture streams: buffers far smaller than the sources, several passes, checkpoints between lines."""
    sources = [{"path": f"{name}.jsonl", "weight": weight, "streaming": True} for name, weight in (("a", 3), ("b", 1))]
    training = {"max_steps": STEPS, "save_steps": 5, "logging_steps": 4}
    adapter = {"method": "lora", "r": 4, "lora_dropout": 0.2}
    recipe: Path = mixture(
        data={"train": sources, "shuffle_buffer_size": 16, "audit_rows": 40}, training=training, adapter=adapter
    )
    return recipe


def test_a_stream_trains_alike_whenever_it_runs(stream: Path, tmp_path: Path) -> None:
    runs = tmp_path / "first", tmp_path / "second"
    assert {train(stream, run)["global_step"] for run in runs} == {STEPS}
    assert numbers_of(runs[0]) == numbers_of(runs[1])
    assert len({line["loss"] for line in numbers_of(runs[0])}) == STEPS // 4
    assert kept() == []  # the rows of a stream are not kept


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stream_goes_on_with_the_rows_that_come_next(stream: Path, tmp_path: Path, number: signal.Signals) -> None:
    train(stream, tmp_path / "whole")
    code, message = interrupt(stream, tmp_path / "run", number)
    assert code == (75 if number == signal.SIGTERM else -number), message
    assert train(stream, tmp_path / "run", "--resume")["global_step"] == STEPS
    assert numbers_of(tmp_path / "run") == numbers_of(tmp_path / "whole")


def test_a_stream_checks_its_first_rows_alone(stream: Path, tmp_path: Path) -> None:
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:60], '{"text": " "}', *lines[60:]]))
    assert shown(stream)["splits"]["train"]["rows"] == 40
    result = run_cli("train", stream, "--output", tmp_path / "run")
    assert (result.code, f"{tmp_path / 'a.jsonl'}:61: column `text` is blank" in result.err) == (3, True)
    assert train(stream, tmp_path / "dropped", "--set", "data.on_bad_row=drop")["global_step"] == STEPS


@pytest.fixture
def cached(models_dir: Path, tmp_path: Path) -> Path:
    """A recipe on 21 rows."""
    return tiny_recipe("CAUSAL_LM", models_dir, tmp_path, data={"validation": 0.2, "max_length": 100})


def test_the_second_start_reads_the_rows_of_the_first(cached: Path, tmp_path: Path) -> None:
    first, second = shown(cached), shown(cached)
    assert (first.pop("cached"), second.pop("cached")) == (False, True)
    assert first == second
    result = run_cli("train", cached, "--output", tmp_path / "run")
    assert "rows from the cache: train 17, validation 4" in result.err
    assert len(kept()) == 1


def test_a_run_from_the_cache_trains_as_one_without(cached: Path, tmp_path: Path) -> None:
    shown(cached)
    runs = tmp_path / "kept", tmp_path / "read"
    train(cached, runs[0])
    train(cached, runs[1], "--set", "data.cache=false")
    assert numbers_of(runs[0]) == numbers_of(runs[1])


def change_a_byte(folder: Path) -> list[str]:
    """Another letter in the last row."""
    file = folder / "rows.jsonl"
    content = bytearray(file.read_bytes())
    place = content.rindex(b'"}') - 1
    content[place] = ord("z") if content[place] != ord("z") else ord("y")
    file.write_bytes(content)
    return []


def change_the_template(folder: Path) -> list[str]:
    """Another chat template."""
    (folder / "other.jinja").write_text(CHATML.replace("<|im_start|>", "<s>"))
    return [f"model.chat_template={folder / 'other.jinja'}"]


def change_the_tokenizer(folder: Path) -> list[str]:
    """A tokenizer that differs in one piece."""
    tiny_tokenizer().save_pretrained(folder / "other")
    file = folder / "other/tokenizer.json"
    pieces = json.loads(file.read_text())
    pieces["model"]["merges"].pop()
    file.write_text(json.dumps(pieces))
    return [f"model.tokenizer_name_or_path={folder / 'other'}"]


CHANGES: dict[str, Callable[[Path], list[str]]] = {
    "a byte": change_a_byte,
    "the chat template": change_the_template,
    "the tokenizer": change_the_tokenizer,
    "max_length": lambda folder: ["data.max_length=99"],
    "train_on": lambda folder: ["data.train_on=all"],
    "the system prompt": lambda folder: ["data.system_prompt=hello"],
    "the seed, which draws the validation rows": lambda folder: ["training.seed=1"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_rows_depend_on_makes_another_entry(cached: Path, tmp_path: Path, change: str) -> None:
    shown(cached)
    original = (tmp_path / "rows.jsonl").read_bytes()
    overrides = CHANGES[change](tmp_path)
    assert [shown(cached, *overrides)["cached"] for _ in range(2)] == [False, True]
    assert len(kept()) == 2
    (tmp_path / "rows.jsonl").write_bytes(original)
    assert shown(cached)["cached"]


def test_what_rows_do_not_depend_on_leaves_the_entry(cached: Path) -> None:
    shown(cached)
    assert shown(cached, "training.learning_rate=0.5", "adapter.r=2", "data.packing=true")["cached"]


def test_nothing_is_kept_where_the_recipe_says_so(cached: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert not shown(cached, "data.cache=false")["cached"]
    train(cached, tmp_path / "run", "--set", "data.cache=false")
    assert not cache_dir().exists()


def test_two_processes_share_an_entry_and_train_like_one(cached: Path, tmp_path: Path) -> None:
    process = peftkit_process("train", cached, "--output", tmp_path / "two", "--processes", 2)
    _, message = process.communicate(timeout=180)
    assert process.returncode == 0, message
    assert len(kept()) == 1
    train(cached, tmp_path / "one")
    assert len(kept()) == 1
    one, two = (torch.tensor(curve(tmp_path / name, "loss", "grad_norm")) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_an_entry_that_was_not_finished_is_made_again(cached: Path) -> None:
    expected = shown(cached)
    (entry,) = kept()
    (cache_dir() / entry / "summary.json").unlink()
    found = shown(cached)
    assert (found, kept()) == (expected, [entry])
    shutil.rmtree(cache_dir() / entry)
    assert shown(cached) == expected
