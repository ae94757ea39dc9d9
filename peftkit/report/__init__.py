"""One HTML file that tells what runs and comparisons came to; it needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peftkit.report.comparison import Comparison, is_comparison, read_comparison
from peftkit.report.facts import RunFacts, read_runs
from peftkit.report.page import render
from peftkit.run import write_text


@dataclass(frozen=True)
class Sources:
    """What a report is about: runs, and folders of comparisons."""

    runs: list[RunFacts]
    comparisons: list[Comparison]


def read_sources(folders: Sequence[Path]) -> Sources:
    """Runs and comparisons, each recognised by what its folder holds.

    Raises:
        LoadError: a folder is neither.
        RecipeError: a run is named twice.
    """
    compared = [folder for folder in folders if is_comparison(folder)]
    runs = read_runs([folder for folder in folders if folder not in compared])
    comparisons = [read_comparison(folder, f"c{number}-") for number, folder in enumerate(compared)]
    return Sources(runs, comparisons)


def write_report(sources: Sequence[Path], output: Path) -> Path:
    """Write the report of run directories, or folders of comparisons, to an HTML file; returns its path.

    Raises:
        LoadError: a folder is neither.
        RecipeError: a run is named twice.
    """
    found = read_sources(sources)
    write_text(output, render(found.runs, found.comparisons))
    return output
