"""What is published: the adapter of a run, an adapter folder, or a model that `merge` wrote; read without trust."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peftkit.adapters import CONFIG, FACTS, MERGED, adapter_folder, read_mapping
from peftkit.errors import CertificateError, LoadError, RecipeError
from peftkit.hub import cached_file
from peftkit.methods import METHODS
from peftkit.methods.base import Method
from peftkit.recipe.paths import EMBEDDED_MODELS, HUB_NAMES
from peftkit.report.facts import RunFacts, is_run, mapping, read_run
from peftkit.tasks import TASKS
from peftkit.tasks.base import Task

Json = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """A folder that is to be published, and what is known of it.

    Attributes:
        folder: the adapter folder, or that of the merged model.
        facts: peftkit.json of the adapter; of an adapter of plain PEFT what its config says.
        run: the run that it is from, where it is known and still there.
        merged: merge.json of a merged model; empty for adapters.
        base: the hub id of the base model.
    """

    folder: Path
    facts: Json
    run: RunFacts | None
    merged: Json
    base: str

    @property
    def task(self) -> Task:
        """The task that it was trained for."""
        return TASKS[self.facts["task"]]

    @property
    def method(self) -> Method | None:
        """Its method; None for one of plain PEFT that is not known here."""
        return METHODS.get(self.facts["method"])

    @property
    def is_model(self) -> bool:
        """Whether it is a whole model: merged, or of a method whose result stands alone."""
        return bool(self.merged) or (self.method is not None and self.method.stands_alone)

    @property
    def revision(self) -> str | None:
        """The commit of the base model where it is known, else the revision that the recipe names."""
        fingerprint = str(mapping(self.run.environment.get("fingerprints")).get("model", "")) if self.run else ""
        return fingerprint.removeprefix("commit ") if fingerprint.startswith("commit ") else self.facts.get("revision")

    @cached_property
    def certificate(self) -> Json:
        """What the run proved of its adapter; empty where nothing is known."""
        return mapping(self.run.summary.get("certificate")) if self.run else {}

    @cached_property
    def base_card(self) -> Json:
        """The front matter of the base model's card, where that is on this machine; else empty."""
        from huggingface_hub import ModelCard

        path = cached_file(str(self.facts["base"]), self.facts.get("revision"), "README.md")
        if path is None:
            return {}
        try:
            found: Json = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
            return found
        except ValueError:  # a card that is none
            return {}


def read_published(path: Path, base: str | None, *, force: bool) -> Published:
    """What `push PATH` is about.

    Args:
        path: a run directory, an adapter folder, or a folder that `merge` wrote.
        base: hub id of the base model, where it was trained on a folder.
        force: publish it although nothing proves that its adapter is what was trained.

    Raises:
        LoadError: it is none of them, or the run has not ended.
        RecipeError: its base is a folder of this machine.
        CertificateError: there is no passed certificate.
    """
    if (path / MERGED).is_file():
        merged = read_mapping(path / MERGED)
        run = _run_of(Path(str(merged.get("adapter", ""))))
        found = Published(path, merged, run, merged, "")
    else:
        if not path.is_dir():
            raise LoadError(f"there is no run directory, adapter folder or merged model `{path}`")
        run = _run_of(path)
        if run is not None and run.state != "done" and run.status.get("exit_code") != CertificateError.exit_code:
            raise LoadError(
                f"the run {path} has not ended well (it is `{run.state}`); `peftkit train --resume --output {path}` ends it"
            )
        folder = adapter_folder(path)
        found = Published(folder, _adapter_facts(folder), run, {}, "")
    if found.facts["task"] not in TASKS:
        raise LoadError(f"{found.folder} is for the task {found.facts['task']}; those known here are {', '.join(TASKS)}")
    _require_certificate(found, path, force)
    return Published(found.folder, found.facts, found.run, found.merged, _public_base(found, base))


def _run_of(path: Path) -> RunFacts | None:
    """The run of a run directory, or of the `adapter` folder in one."""
    folder = path.parent if path.name == "adapter" else path
    return read_run(folder) if is_run(folder) else None


def _adapter_facts(folder: Path) -> Json:
    if (folder / FACTS).is_file():
        return read_mapping(folder / FACTS)
    if not (folder / CONFIG).is_file():
        raise LoadError(
            f"{folder} is no adapter and no model that `merge` wrote: it has neither {FACTS}, {CONFIG} nor {MERGED}"
        )
    config = read_mapping(folder / CONFIG)
    known = {"base": config.get("base_model_name_or_path") or "", "revision": config.get("revision")}
    return known | {"task": str(config.get("task_type")), "method": str(config.get("peft_type")).lower()}


def _require_certificate(found: Published, path: Path, force: bool) -> None:
    if force or found.certificate.get("passed"):
        return
    why = (
        "its certificate did not pass"
        if found.run
        else "the adapter is from no run that is here: nothing proves that it is what was trained"
    )
    raise CertificateError(f"{path}: {why}; `--force` publishes it all the same, and the card says so")


def _public_base(found: Published, base: str | None) -> str:
    """The base model by a name that others can load it by."""
    written = mapping(found.run.written.get("model")).get("name_or_path") if found.run else None
    name = str(base or (written if written in EMBEDDED_MODELS else found.facts["base"]))
    name = HUB_NAMES.get(name, name)
    if name and not Path(name).is_absolute() and not Path(name).is_dir() and name.count("/") <= 1:
        return name
    if found.is_model and base is None:
        return ""  # nobody needs it to load this
    raise RecipeError(
        f"the base model is the folder `{Path(name).name}` on this machine, which others have not: name its hub id with "
        "--base, or publish a merged model (`peftkit merge`)"
    )
