"""The run directory: made once, written atomically, continued only by its own recipe, without secrets."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from peftkit.environment import environment
from peftkit.errors import LoadError, RecipeError, ResourceError
from peftkit.plan import Hardware, Plan, make_plan
from peftkit.recipe import LoadedRecipe
from peftkit.run import Run, new_folder, write_json, write_text
from tests.unit.conftest import Load

CPU = Hardware("cpu", "the CPU", True, 2**34)


@pytest.fixture
def loaded(load: Load, recipe: dict[str, Any], tmp_path: Path) -> LoadedRecipe:
    """The valid recipe, with its runs below the test's folder."""
    return load(recipe, f"output.dir={tmp_path}/runs")


@pytest.fixture
def plan(loaded: LoadedRecipe) -> Plan:
    """Its plan for a CPU."""
    return make_plan(loaded, CPU)


def test_a_new_run_holds_the_recipe_as_written_and_resolved(loaded: LoadedRecipe, plan: Plan, tmp_path: Path) -> None:
    run = Run.create(loaded, plan, None)
    assert run.dir.parent == tmp_path / "runs"
    assert run.dir.name.startswith("recipe-2")
    assert run.recipe_path.read_text() == loaded.text
    assert sorted(path.name for path in run.dir.iterdir()) == ["checkpoints", "recipe.yaml", "resolved.yaml"]


def test_two_runs_of_one_second_get_two_folders(loaded: LoadedRecipe, plan: Plan) -> None:
    assert len({Run.create(loaded, plan, None).dir for _ in range(5)}) == 5


def test_output_names_the_run_directory_itself(loaded: LoadedRecipe, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    assert Run.create(loaded, plan, tmp_path / "here").dir == tmp_path / "here"
    assert Run.open(tmp_path / "here").resolved_path.is_file()


@pytest.mark.parametrize("name", ["full", "file"])
def test_a_run_never_overwrites_what_is_there(loaded: LoadedRecipe, plan: Plan, tmp_path: Path, name: str) -> None:
    write_text(tmp_path / "full" / "notes.txt", "mine")
    write_text(tmp_path / "file", "mine")
    with pytest.raises(RecipeError, match="is not empty; name a new folder, or add `--resume`"):
        Run.create(loaded, plan, tmp_path / name)


def test_a_directory_that_cannot_be_made_is_no_bug_of_ours(loaded: LoadedRecipe, plan: Plan, tmp_path: Path) -> None:
    write_text(tmp_path / "file", "mine")
    with pytest.raises(ResourceError, match=r"the run directory .*file/run cannot be written: Not a directory"):
        Run.create(loaded, plan, tmp_path / "file" / "run")


def test_a_folder_without_a_recipe_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"is no run directory: it has no resolved\.yaml"):
        Run.open(tmp_path)


def test_resume_takes_the_newest_run_of_this_recipe_that_has_not_ended(
    loaded: LoadedRecipe, plan: Plan, tmp_path: Path
) -> None:
    names = ("recipe-20250101-000000", "recipe-20250101-000001", "recipe-20250101-000002", "recipe-large-20250101-000000")
    for time, (name, state) in enumerate(zip(names, ("stopped", "failed", "done", "stopped"), strict=True)):
        run = Run.create(loaded, plan, tmp_path / "runs" / name)
        run.write_status(state)
        os.utime(run.status_path, (time, time))
    assert Run.resume(plan, None).dir.name == "recipe-20250101-000001"


def test_resume_refuses_a_run_that_is_none_has_ended_or_had_another_recipe(
    loaded: LoadedRecipe, plan: Plan, load: Load, recipe: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="is no run to continue; leave --resume out"):
        Run.resume(plan, None)
    run = Run.create(loaded, plan, tmp_path / "run")
    other = make_plan(load(recipe, f"output.dir={tmp_path}/runs", "training.seed=7"), CPU)
    with pytest.raises(RecipeError, match=r"was another one:\n(.|\n)*-  seed: 0\n\+  seed: 7"):
        Run.resume(other, run.dir)
    run.write_status("done")
    with pytest.raises(RecipeError, match="has ended; nothing is left to do"):
        Run.resume(plan, run.dir)


def test_resume_takes_another_time_limit(loaded: LoadedRecipe, load: Load, recipe: dict[str, Any], tmp_path: Path) -> None:
    limited = make_plan(load(recipe, f"output.dir={tmp_path}/runs", "training.max_seconds=5"), CPU)
    run = Run.create(loaded, limited, tmp_path / "run")
    assert Run.resume(make_plan(load(recipe, f"output.dir={tmp_path}/runs"), CPU), run.dir).dir == run.dir


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    write_json(path, {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"step": 2})
    assert [(file.name, json.loads(file.read_text())) for file in tmp_path.iterdir()] == [("status.json", {"step": 1})]


def test_text_that_cannot_be_encoded_leaves_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "good\udc80")
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    write_text(target / "old.bin", "old")
    with new_folder(target) as folder:
        (folder / "new.bin").write_text("new")
        (folder / "new.bin").chmod(0o600)
        assert [path.name for path in target.iterdir()] == ["old.bin"]
    assert [path.name for path in target.iterdir()] == ["new.bin"]
    assert (target / "new.bin").stat().st_mode & 0o777 == (target.stat().st_mode & 0o666)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_new_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    write_text(target / "old.bin", "old")
    with contextlib.suppress(ValueError), new_folder(target) as folder:
        (folder / "new.bin").write_text("new")
        raise ValueError("half way")
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "old.bin"]


def test_the_rest_of_a_killed_replacement_is_no_hindrance(tmp_path: Path) -> None:
    write_text(tmp_path / "adapter" / "old.bin", "old")
    write_text(tmp_path / ".adapter.old" / "older.bin", "older")
    with new_folder(tmp_path / "adapter") as folder:
        (folder / "new.bin").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "new.bin"]


def test_metrics_after_a_checkpoint_are_dropped_with_a_line_cut_short(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.append_metrics({"step": 1, "loss": 1.0})
    run.append_metrics({"step": 2, "loss": float("nan")})
    num_bytes = run.sync_metrics()
    run.append_metrics({"step": 3, "loss": 1.0})
    with run.metrics_path.open("a") as handle:
        handle.write('{"step": 2, "lo')
    run.truncate_metrics(num_bytes)
    assert run.metrics_path.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": NaN}\n'


def test_the_status_is_read_as_written_and_empty_where_there_is_none(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.read_status() == {}
    run.write_status("training", step=3)
    status = run.read_status()
    assert (status["state"], status["step"], status["pid"]) == ("training", 3, os.getpid())


@pytest.mark.parametrize(
    ("argument", "stored"),
    [
        ("train", "train"),
        ("--set", "--set"),
        ("output.api_key=abc", "output.api_key=***"),
        ("HF_TOKEN=abc=def==", "HF_TOKEN=***"),
        ("--set=model.token=abc", "--set=model.token=***"),
        ("db_password = abc", "db_password =***"),
        ("some.SECRET_VALUE=a\nb", "some.SECRET_VALUE=***"),
        ("model.tokenizer_name_or_path=owner/name", "model.tokenizer_name_or_path=owner/name"),
        ("training.learning_rate=1e-4", "training.learning_rate=1e-4"),
    ],
)  # fmt: skip
def test_secrets_of_the_command_line_are_not_stored(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, argument: str, stored: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["peftkit", argument])
    assert environment(plan, {})["argv"] == ["peftkit", stored]


def test_the_environment_names_versions_machine_and_fingerprints(plan: Plan) -> None:
    facts = environment(plan, {"data.train": "abc"})
    assert facts["packages"].keys() >= {"peftkit", "torch", "transformers", "peft", "accelerate"}
    assert all(facts["packages"][name] for name in ("peftkit", "torch", "peft"))
    assert (facts["device"], facts["num_processes"], facts["fingerprints"]) == ("the CPU", 1, {"data.train": "abc"})
