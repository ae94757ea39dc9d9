"""`peftkit runs`: the runs in a folder, how each stands, and how those that have not ended go on."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.report.listing import Entry, list_runs
from peftkit.report.show import show_seconds

_COLUMNS = ["run", "state", "task", "method", "model", "metric", "steps", "time", "age"]


def runs(folder: Path) -> list[dict[str, Any]]:
    """What `--json` prints: an object for each run, the newest first.

    Raises:
        LoadError: the folder cannot be looked into.
    """
    return [asdict(entry) for entry in list_runs(folder)]


def print_runs(folder: Path) -> None:
    """A table, and a line for everything that a table has no room for.

    Raises:
        LoadError: the folder cannot be looked into.
    """
    entries = list_runs(folder)
    if not entries:
        console.print_text(f"{folder} has no runs; `peftkit train RECIPE` makes one")
        return
    console.print_figures("", _COLUMNS, [_cells(entry) for entry in entries])
    for entry in entries:
        if entry.note:
            console.print_text(f"{entry.path}: {entry.note}")
        if entry.go_on:
            console.print_text(f"  to go on: {entry.go_on}")


def _cells(entry: Entry) -> list[str]:
    value = "" if entry.value is None else f" {entry.value:.4g}"
    metric = f"{entry.metric}{value} ({entry.split})" if entry.metric and value else ""
    # A local folder by its last name: the whole path is in `--json` and in the run.
    model = Path(entry.model).name if entry.model and Path(entry.model).is_absolute() else entry.model or ""
    return [
        Path(entry.path).name,
        entry.state or entry.kind,
        entry.task or "",
        entry.method or (entry.kind if entry.kind in ("compare", "sweep") else ""),
        model,
        metric,
        _steps(entry),
        "" if entry.seconds is None else show_seconds(entry.seconds),
        _age(time.time() - entry.time),
    ]


def _age(seconds: float) -> str:
    """How long ago something was, in its largest unit."""
    units = ((86400, "d"), (3600, "h"), (60, "min"))
    size, unit = next(((size, unit) for size, unit in units if seconds >= size), (1, "s"))
    return f"{max(0, seconds) // size:.0f} {unit} ago"


def _steps(entry: Entry) -> str:
    return "" if entry.step is None else f"{entry.step:,}" if entry.num_steps is None else f"{entry.step:,}/{entry.num_steps:,}"
