"""`peftkit export`: an adapter in the form that other engines read, looked at before and read back after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit import console
from peftkit.exports.jobs import LAUNCH, Job, make_jobs, refuse, require_new
from peftkit.exports.subject import read_subject


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        adapter: run directory or adapter folder.
        targets: names of targets.
        settings: `option=value` texts.
        output: folder to write; None: exports/ of the run.
        base: base model, where the one that the adapter names cannot be found.
    """

    adapter: Path
    targets: Sequence[str]
    settings: Sequence[str] = ()
    output: Path | None = None
    base: str | None = None


def lint(request: Request, *, as_json: bool) -> None:
    """Print what the targets would say, without loading a weight.

    Raises:
        RecipeError: a target would refuse the adapter.
    """
    jobs = make_jobs(read_subject(request.adapter, request.base), request.targets, request.settings, request.output)
    if as_json:
        found = [{"target": job.exporter.name, "findings": [vars(item) for item in job.findings]} for job in jobs]
        console.print_json({"targets": found})
    else:
        _print_findings(jobs)
    refuse(jobs)


def export(request: Request) -> dict[str, Any]:
    """Look, write, have it read back; returns what `--json` prints."""
    subject = read_subject(request.adapter, request.base)
    jobs = make_jobs(subject, request.targets, request.settings, request.output)
    refuse(jobs)
    require_new(jobs)

    from peftkit.engine.exporting import export_job, shared_material
    from peftkit.engine.guard import explain_exhaustion, rebuilding_text

    records = []
    exhaustion = explain_exhaustion(lambda: rebuilding_text("while exporting"))
    with exhaustion, shared_material(subject, request.adapter, request.base) as material:
        for job in jobs:
            records.append(export_job(job, material))
    return {"exports": records}


def print_exports(result: dict[str, Any]) -> None:
    """The result for people."""
    for record in result["exports"]:
        console.print_text(f"{record['target']} ({record['form']}): {record['output']}")
        for finding in record["findings"]:
            console.print_text(f"  note: {finding['what']}" + (f"; {finding['remedy']}" if finding["remedy"] else ""))
        check = record["check"]
        console.print_text(f"  {check['client']}: {check['detail']}" if check["client"] else f"  {check['detail']}")
        if record["launch"]:
            console.print_text(f"  sh {record['output']}/{LAUNCH}: {record['launch'].replace('$here', record['output'])}")


def _print_findings(jobs: Sequence[Job]) -> None:
    for job in jobs:
        notes = [item for item in job.findings if not item.refuses]
        verdict = "would refuse it" if len(notes) < len(job.findings) else "would take it"
        console.print_text(f"{job.exporter.name} ({job.exporter.form(job.options)}): {verdict}")
        for item in notes:
            console.print_text(f"  note: {item}")
