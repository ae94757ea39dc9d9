"""What a command line asks for: targets, their options, folders, and what their lint says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftkit.errors import Problem, RecipeError
from peftkit.exports import EXPORTS
from peftkit.exports.base import Exporter, Finding
from peftkit.exports.subject import Subject
from peftkit.guides import LINT
from peftkit.recipe.load import did_you_mean
from peftkit.recipe.yaml_file import parse_scalar
from peftkit.run import Run
from peftkit.section import Section

LAUNCH = "serve.sh"  # where a target is served by a command: that command
RECORD = "export.json"  # in every exported folder: what it is, and how it was checked


@dataclass(frozen=True)
class Job:
    """One target of a command.

    Attributes:
        exporter: the target.
        options: its options.
        output: folder to write.
        findings: what its lint says.
    """

    exporter: Exporter
    options: Section
    output: Path
    findings: Sequence[Finding]


def make_jobs(subject: Subject, targets: Sequence[str], settings: Iterable[str], output: Path | None) -> list[Job]:
    """The jobs of a command, each looked at by its target's lint.

    Args:
        subject: what is exported.
        targets: names of targets.
        settings: `option=value` for every target that knows it, `target.option=value` for one.
        output: folder to write; of several targets each gets one of its name in it. None: exports/ of the run.

    Raises:
        RecipeError: a target or setting is not known, or there is no run to write to.
    """
    exporters = [_exporter(name) for name in dict.fromkeys(targets)]
    if not exporters:
        raise RecipeError(f"--target: name one or several of {', '.join(EXPORTS)}, with commas between them")
    if output is None and subject.run is None:
        raise RecipeError(f"--output: {subject.folder} belongs to no run directory; name a folder to write")
    jobs = []
    for exporter, options in zip(exporters, read_options(exporters, settings), strict=True):
        several = output / exporter.name if output and len(exporters) > 1 else output
        folder = several or Run(subject.run or Path()).export_dir(exporter.name)
        jobs.append(Job(exporter, options, folder, exporter.findings(subject, options)))
    return jobs


def refuse(jobs: Sequence[Job]) -> None:
    """Stop where a target would not take what it is to get.

    Raises:
        RecipeError: with every such finding.
    """
    problems = [Problem("", job.exporter.name, str(item)) for job in jobs for item in job.findings if item.refuses]
    if problems:
        raise RecipeError(problems, guide=LINT)


def require_new(jobs: Sequence[Job]) -> None:
    """Refuse folders that hold something else than an export, which is replaced.

    Raises:
        RecipeError: one does.
    """
    for job in jobs:
        folder = job.output
        if folder.exists() and not (folder / RECORD).is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise RecipeError(f"--output {folder}: is not empty, and no export of ours; name a new folder")


def _exporter(name: str) -> Exporter:
    if name not in EXPORTS:
        raise RecipeError(
            f"--target {name}: there is no such target; there are: {', '.join(EXPORTS)}" + did_you_mean(name, EXPORTS)
        )
    return EXPORTS[name]


def read_options(exporters: Sequence[Exporter], settings: Iterable[str]) -> list[Section]:
    """The options of each target.

    Raises:
        RecipeError: a setting is none, no target knows it, or its value is not allowed.
    """
    values: list[dict[str, Any]] = [{} for _ in exporters]
    for text in settings:
        key, equals, value = text.partition("=")
        target, _, name = key.strip().rpartition(".")
        if not equals or not name:
            raise RecipeError(f"--set {text}: an option is OPTION=VALUE or TARGET.OPTION=VALUE, such as `--set dtype=float16`")
        knowing = [
            place
            for place, exporter in enumerate(exporters)
            if name in exporter.section.model_fields and target in ("", exporter.name)
        ]
        if not knowing:
            raise RecipeError(f"--set {text}: {_unknown(exporters, target, name)}")
        for place in knowing:
            values[place][name] = parse_scalar(value.strip())
    return [_validated(exporter, given) for exporter, given in zip(exporters, values, strict=True)]


def _unknown(exporters: Sequence[Exporter], target: str, name: str) -> str:
    names = [exporter.name for exporter in exporters]
    if target and target not in names:
        return f"`{target}` is none of the targets of this command: {', '.join(names)}"
    if name == "form":
        return f"has no effect: {' and '.join(names)} always get a merged model"
    able = [exporter for exporter in exporters if target in ("", exporter.name)]
    fields = sorted({field for exporter in able for field in exporter.section.model_fields})
    known = f"there are: {', '.join(fields)}" if fields else "there are none"
    return f"no option of {' or '.join(exporter.name for exporter in able)} is called `{name}`; {known}" + did_you_mean(
        name, fields
    )


def _validated(exporter: Exporter, values: dict[str, Any]) -> Section:
    try:
        return exporter.section.model_validate(values)
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        name = ".".join(map(str, item["loc"]))
        what = f"`{item['input']}` is not allowed: {item['msg'].lower()}"
        raise RecipeError(f"--set {name}: {what}") from None
