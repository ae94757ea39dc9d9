"""`peftkit runs`: what a folder of runs says of each of them, damaged and half-written ones too."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftkit.lock import lock
from peftkit.report.listing import Entry, list_runs, read_entry
from peftkit.run import Run
from tests.conftest import Result, write_jsonl

RESOLVED = """\
name: r
task: SEQ_CLS
model:
  name_or_path: owner/name
  revision: null
adapter:
  method: ia3
data:
  labels:
  - 'no'
training:
  metric_for_best_model: {metric}
"""
SCORES = [
    {"step": step, "split": "validation", "metrics": {"accuracy": value}} for step, value in ((2, 0.5), (4, 0.75), (6, 0.6))
]
DONE = {
    "global_step": 6,
    "train_seconds": 12.5,
    "metrics_by_split": {"validation": {"accuracy": 0.75}, "test": {"accuracy": 0.7}},
}


def write_run(folder: Path, status: dict[str, Any] | str, metric: str = "null", lines: list[dict[str, Any]] = SCORES) -> Path:
    """A run directory as `train` leaves it."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "resolved.yaml").write_text(RESOLVED.format(metric=metric), encoding="utf-8")
    (folder / "status.json").write_text(status if isinstance(status, str) else json.dumps(status), encoding="utf-8")
    (folder / "train.log").write_text("2026-11-27 10:00:00 step 6/10  loss 0.1  lr 1\n", encoding="utf-8")
    write_jsonl(folder / "metrics.jsonl", [*lines, {"step": 6, "loss": 0.1, "seconds": 9.5}])
    return folder


def entry_of(folder: Path, status: dict[str, Any] | str, **how: Any) -> Entry:
    """The line of a run of this status."""
    found = read_entry(write_run(folder, status, **how))
    assert found is not None
    return found


def test_a_run_that_is_done_tells_what_it_kept(tmp_path: Path) -> None:
    found = entry_of(tmp_path / "run", {"state": "done", "time": 5.0, "summary": DONE})
    assert (found.kind, found.state, found.task, found.method, found.model) == (
        "run",
        "finished",
        "SEQ_CLS",
        "ia3",
        "owner/name",
    )
    assert (found.split, found.metric, found.value) == ("validation", "accuracy", 0.75)
    assert (found.step, found.num_steps, found.seconds, found.time, found.note) == (6, 6, 12.5, 5.0, "")


def test_a_stopped_run_tells_its_best_so_far_and_how_it_goes_on(tmp_path: Path) -> None:
    error = "stopped by SIGTERM at step 6. To go on:\n  peftkit train a.yaml --output b --resume"
    found = entry_of(tmp_path / "run", {"state": "stopped", "step": 6, "error": error, "exit_code": 75})
    assert (found.state, found.note) == ("stopped", "stopped by SIGTERM at step 6")
    assert found.go_on == "peftkit train a.yaml --output b --resume"
    assert (found.value, found.step, found.num_steps, found.seconds) == (0.75, 6, 10, 9.5)


def test_the_metric_that_the_recipe_names_decides_and_less_may_be_better(tmp_path: Path) -> None:
    lines = [{"step": step, "split": "validation", "metrics": {"loss": loss}} for step, loss in ((2, 0.5), (4, 0.25), (6, 0.4))]
    found = entry_of(tmp_path / "run", {"state": "stopped", "error": "why"}, metric="loss", lines=lines)
    assert (found.metric, found.value) == ("loss", 0.25)


def test_a_run_whose_process_is_gone_was_killed_and_goes_on_from_its_own_recipe(tmp_path: Path) -> None:
    run = tmp_path / "run"
    found = entry_of(run, {"state": "training", "step": 0})
    assert found.state == "stopped"
    assert "it was killed" in found.note
    assert found.go_on == f"peftkit train {run}/resolved.yaml --output {run} --resume"


def test_a_run_that_is_locked_by_a_live_process_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"state": "training", "step": 0})
    with lock(Run(run), print, force=False):
        found = read_entry(run)
    assert found is not None
    assert (found.state, found.go_on, found.step) == ("running", "", 6)
    assert found.note.startswith("by process ")
    (run / "run.lock").write_text(json.dumps({"host": "elsewhere", "pid": 5}))
    assert "process 5 on elsewhere, which cannot be seen from here" in str(read_entry(run))


@pytest.mark.parametrize(
    ("code", "error", "state", "note"),
    [
        (3, "rows.jsonl:4: is bad\nmore", "failed", "exit code 3: rows.jsonl:4: is bad"),
        (6, "logits differ by 0.2", "certificate failed", "exit code 6: logits differ by 0.2"),
    ],
)
def test_a_failed_run_tells_why(tmp_path: Path, code: int, error: str, state: str, note: str) -> None:
    found = entry_of(tmp_path / "run", {"state": "failed", "exit_code": code, "error": error})
    assert (found.state, found.note, found.go_on) == (state, note, "")


def break_status(run: Path) -> None:
    """As after a power cut."""
    (run / "status.json").write_text('{"state": "do')


def break_recipe(run: Path) -> None:
    """Half a recipe."""
    (run / "resolved.yaml").write_bytes(b"task: SEQ_CLS\nmodel:\n  name_or_path: \xff")


def lose_weights(run: Path) -> None:
    """Somebody has cleaned up."""
    (run / "adapter" / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_status, "status.json cannot be read"),
        (lambda run: (run / "status.json").unlink(), "status.json cannot be read: No such file"),
        (lambda run: (run / "status.json").write_text("[]"), "status.json holds no mapping"),
        (break_recipe, "resolved.yaml cannot be read"),
        (lambda run: (run / "resolved.yaml").write_text("- a list"), "resolved.yaml cannot be read"),
        (lose_weights, "adapter/ has no weights"),
    ],
)
def test_damage_is_told_and_ends_nothing(tmp_path: Path, damage: Callable[[Path], Any], words: str) -> None:
    run = write_run(tmp_path / "run", {"state": "done", "summary": DONE})
    damage(run)
    found = read_entry(run)
    assert found is not None
    assert found.state == "damaged"
    assert words in found.note


def test_lines_that_a_crash_cut_short_are_passed_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"state": "training"})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "split": "validation", "metrics": {"accur')
    found = read_entry(run)
    assert found is not None
    assert found.value == 0.75


def comparison(folder: Path) -> None:
    """A folder of `compare`, two trials of which are done."""
    trials = [{"state": state, "run_dir": f"trials/{number}"} for number, state in enumerate(("done", "done", "pending"))]
    variant = {"name": "lora", "trials": trials, "summary": {"accuracy": {"mean": 0.8}}}
    facts = {"kind": "compare", "task": "SEQ_CLS", "metric": "accuracy", "greater_is_better": True, "variants": [variant]}
    (folder / "compare.json").write_text(json.dumps(facts))


def test_a_comparison_is_one_line_with_its_counts(tmp_path: Path) -> None:
    (tmp_path / "cmp").mkdir()
    comparison(tmp_path / "cmp")
    found = read_entry(tmp_path / "cmp")
    assert found is not None
    assert (found.kind, found.state, found.value) == ("compare", "stopped", 0.8)
    assert found.note == "1 variant, 3 runs: 2 done, 1 pending"


def test_adapters_of_other_tools_and_folders_of_runs_are_called_so_and_all_else_is_left_out(tmp_path: Path) -> None:
    for name in ("other", "empty", ".hidden"):
        (tmp_path / name).mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "owner/base"}
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config))
    write_run(tmp_path / "group" / "run", {"state": "done", "summary": DONE})
    (tmp_path / "a_file").write_text("")
    found = {entry.path: entry for entry in list_runs(tmp_path)}
    assert {*found} == {str(tmp_path / "other"), str(tmp_path / "group")}
    other = found[str(tmp_path / "other")]
    assert (other.kind, other.method, other.model) == ("adapter", "lora", "owner/base")
    assert found[str(tmp_path / "group")].note == "1 run in it"


def test_the_newest_comes_first_and_a_run_itself_is_listed_alone(tmp_path: Path) -> None:
    for name, when in (("old", 1.0), ("new", 3.0), ("middle", 2.0)):
        write_run(tmp_path / name, {"state": "done", "time": when, "summary": DONE})
    assert [Path(entry.path).name for entry in list_runs(tmp_path)] == ["new", "middle", "old"]
    assert [entry.path for entry in list_runs(tmp_path / "old")] == [str(tmp_path / "old")]


def test_a_thousand_runs_take_a_second_or_two(tmp_path: Path) -> None:
    for number in range(200):
        write_run(tmp_path / str(number), {"state": "training"})
    start = time.process_time()
    assert len(list_runs(tmp_path)) == 200
    assert time.process_time() - start < 0.6, "200 of them take a fifth of that"


def test_the_command_prints_a_table_and_how_runs_go_on(cli: Callable[..., Result], tmp_path: Path) -> None:
    write_run(tmp_path / "one", {"state": "done", "time": time.time() - 7200, "summary": DONE})
    write_run(tmp_path / "two", {"state": "training"})
    shown = cli("runs", tmp_path)
    assert shown.code == 0
    for words in ("finished", "accuracy 0.75 (validation)", "6/6", "2 h ago", f"to go on: peftkit train {tmp_path / 'two'}"):
        assert words in shown.out
    listed = cli("runs", tmp_path, "--json").json
    assert [(Path(entry["path"]).name, entry["state"]) for entry in listed] == [("two", "stopped"), ("one", "finished")]
    assert (cli("runs", tmp_path / "gone").code, cli("runs", tmp_path / "one" / "adapter").code) == (7, 0)
