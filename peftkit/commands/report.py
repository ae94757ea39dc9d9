"""`peftkit report`: one HTML file of runs and comparisons, and their curves as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.errors import ResourceError
from peftkit.report import Sources, read_sources
from peftkit.report.page import charts_of, render
from peftkit.report.pictures import write_pictures
from peftkit.report.verdict import verdict
from peftkit.run import Run, require_place, write_text


def report(folders: Sequence[Path], output: Path | None, pictures: Path | None) -> dict[str, Any]:
    """Write the report; returns what `--json` prints.

    Args:
        folders: run directories, and folders of comparisons.
        output: the HTML file; default: `report.html` in the folder, or in the current one for several.
        pictures: folder for the curves as PNG files; None: none are drawn.

    Raises:
        LoadError, RecipeError: see `read_sources`.
        ResourceError: the file or the pictures cannot be written.
    """
    path = output or Run(folders[0] if len(folders) == 1 else Path()).report_path
    require_place(path, "--output")
    found = read_sources(folders)
    drawn = write_pictures(charts_of(found.runs, found.comparisons), pictures) if pictures is not None else []
    try:
        write_text(path, render(found.runs, found.comparisons))
    except OSError as error:
        raise ResourceError(f"--output {path}: cannot be written: {error.strerror}; name another place") from error
    return {"report": str(path), "bytes": path.stat().st_size, "pictures": [str(picture) for picture in drawn]} | _facts(found)


def _facts(found: Sources) -> dict[str, Any]:
    runs = [
        {
            "run_dir": str(facts.run.dir),
            "state": facts.state,
            "step": facts.num_steps,
            "metrics": facts.last_scores,
            "remarks": [asdict(remark) for remark in verdict(facts)],
        }
        for facts in found.runs
    ]
    compared = [
        {"folder": str(part.folder), "variants": [variant.name for variant in part.variants]} for part in found.comparisons
    ]
    return {"runs": runs, "comparisons": compared}


def print_report(result: dict[str, Any]) -> None:
    """Where it is, and what there is to say of each run."""
    for run in result["runs"]:
        console.print_text(run["run_dir"])
        for remark in run["remarks"]:
            console.print_text(f"  {remark['level']}: {remark['text']}")
    for compared in result["comparisons"]:
        console.print_text(f"{compared['folder']}: {', '.join(compared['variants'])}")
    for picture in result["pictures"]:
        console.print_text(f"picture: {picture}")
    console.print_text(f"report: {result['report']} ({console.show_bytes(result['bytes'])})")
