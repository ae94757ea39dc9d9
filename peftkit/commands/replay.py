"""`peftkit replay`: the first steps of a run once more, and where they differ from what it has written."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.commands.train import build_trainer, environment_of
from peftkit.engine.guard import explain_exhaustion, training_memory_text
from peftkit.engine.hardware import process_index
from peftkit.engine.survey import survey
from peftkit.environment import differences
from peftkit.errors import RecipeError
from peftkit.recipe import load_recipe
from peftkit.run import Run

# What a step's line must say again; times and memory differ from run to run.
_COMPARED = ("rows", "loss", "grad_norm", "learning_rate")
_FACTS = ("packages", "python", "platform", "device", "num_processes", "fingerprints")


def replay(directory: Path, steps: int) -> dict[str, Any]:
    """Train the first steps in a temporary folder, from the run's resolved.yaml; how they compare.

    Raises:
        RecipeError: the run has logged none of these steps.
        LoadError: `directory` is no run.
    """
    run = Run.open(directory)
    logged = [line for line in run.read_training_lines() if line["step"] <= steps]
    if not logged:
        first = next((f"; its first line is at step {line['step']}" for line in run.read_training_lines()), "")
        raise RecipeError(f"--steps {steps}: {run.dir} has no line that far{first}")
    # Trackers have had these numbers; a clock must not end the replay.
    changes = ["output.report_to=[]", "training.max_seconds=null", "training.save_steps=null"]
    loaded = load_recipe(run.resolved_path, changes)
    found = survey(loaded, date=run.template_date)
    with tempfile.TemporaryDirectory(prefix="peftkit-replay-") as folder:
        again = Run.create(loaded, found.plan, Path(folder) / "run")
        reporter = console.LineReporter(again.log, speaks=process_index() == 0)
        with explain_exhaustion(lambda: training_memory_text(found.plan, found.data)):
            trainer, _ = build_trainer(again, found, reporter)
            trainer.fit(last_step=logged[-1]["step"])
        was, now = run.read_environment(), environment_of(found) | again.read_environment()
        return compare(was, now, logged, again.read_training_lines())


def compare(
    was: dict[str, Any], now: dict[str, Any], logged: list[dict[str, Any]], replayed: list[dict[str, Any]]
) -> dict[str, Any]:
    """What `replay --json` prints: the first difference of each kind, the largest of the losses, and what else has changed."""
    first = {name: _first_difference(name, logged, replayed) for name in _COMPARED}
    weights = differences(was, now, "initial_weights")
    found: dict[str, Any] = weights | {name: place for name, place in first.items() if place}
    gaps = [abs(old["loss"] - new["loss"]) for old, new in zip(logged, replayed, strict=False)]
    return {
        "equal": not found and len(logged) == len(replayed),
        "steps": [line["step"] for line in logged],
        "differences": found,
        "max_loss_difference": max(gaps, default=math.nan),
        "environment": differences(was, now, *_FACTS),
    }


def _first_difference(name: str, logged: list[dict[str, Any]], replayed: list[dict[str, Any]]) -> str | None:
    for old, new in zip(logged, replayed, strict=False):
        if name in old and old[name] != new[name]:  # runs of older versions have no `rows`
            return f"step {old['step']}: was {old[name]}, is {new[name]}"
    return None


def print_replay(result: dict[str, Any]) -> None:
    """The result in words."""
    for name, text in result["differences"].items():
        console.print_text(f"{name}: {text}")
    for name, text in result["environment"].items():
        console.print_text(f"since then: {name} {text}")
    lines = f"the lines of {len(result['steps'])} steps up to {result['steps'][-1]}"
    if result["equal"]:
        console.print_text(f"equal: {lines}, bit for bit")
    else:
        console.print_text(f"different; losses of {lines} differ by at most {result['max_loss_difference']:.3g}")
