"""What an export target is: the facts that answer without torch, and the writer behind them.

A target first looks at what is to be exported (`lint`, from JSON files and tensor headers alone), then its `write` makes the
folder, then its `check` has a program that reads such folders read it back.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from peftkit.exports.subject import Subject
from peftkit.methods.base import EVERY_TASK
from peftkit.recipe.quantization import Quantization
from peftkit.section import Section
from peftkit.tasks.example import Batch, Example, Runtime

Form = Literal["adapter", "merged"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Finding:
    """Something that a target's lint has to say.

    Attributes:
        refuses: whether the target would refuse what is exported, or answer wrongly with it.
        what: the sentence: what is found, and who says so (program and version).
        remedy: what to do; empty where nothing needs to be done.
    """

    refuses: bool
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what


@dataclass(frozen=True)
class Check:
    """How a real client took what was written.

    Attributes:
        client: program and version; None where no client could be asked.
        passed: whether it gave the adapter's answers; None where it was not asked.
        detail: what was compared and found, or why nothing was.
        numbers: measured numbers by name (`max_abs_diff`, `tolerance`, `tokens`).
    """

    client: str | None
    passed: bool | None
    detail: str
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def not_here(cls, why: str) -> Check:
        """No client could be asked on this machine."""
        return cls(None, None, f"not checked here: {why}")


class Material(Protocol):
    """What a writer works on; `peftkit.engine.exporting` makes one for all targets of a command."""

    subject: Subject
    work_dir: Path  # for files in between; removed at the end of the command

    @property
    def position_limit(self) -> int | None:
        """Longest input in tokens that the model has positions for."""
        ...

    def base_dir(self) -> Path | None:
        """Folder of the base model, with its weights; None where it is not on this machine."""
        ...

    @property
    def runtime(self) -> Runtime:
        """The task on tensors, with the tokenizer of the adapter."""
        ...

    def merged(self, dtype: Dtype) -> Path:
        """Folder of the merged model as plain transformers writes it, with the tokenizer; merged and proven once."""
        ...

    def open(self, folder: Path, quantization: Quantization | None = None) -> Any:
        """The task's model from a folder of plain transformers, on the CPU; its linear layers quantised as it is loaded."""
        ...

    def load(self, form: Form) -> Any:
        """The model that clients are compared with, on the CPU in float32, in evaluation mode."""
        ...

    def examples(self) -> list[Example]:
        """Fixed rows for comparing two models of the task."""
        ...

    def examples_of(self, path: Path) -> list[Example]:
        """The rows of a file in the format of the training rows.

        Raises:
            DataError: a row cannot be used.
        """
        ...

    def batches(self) -> list[Batch]:
        """The model inputs of each of these rows alone, without labels."""
        ...

    def logits(self, form: Form) -> list[Any]:
        """Tensors that the task's forward gives for these rows, in float32; kept."""
        ...

    def logits_of(self, folder: Path) -> list[Any]:
        """The same for an adapter folder that was written, on a fresh base."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Exporter:
    """One export target.

    Attributes:
        name: the value of `--target`.
        summary: one line for messages and help.
        section: its options (`--set option=value`). A field `form` says that it takes adapters beside their base, or merged.
        module: module with `write(material, options, folder)` and `check(material, options, folder) -> Check`, imported when
            a model is at hand.
        tasks: task types that it takes.
        lint: what the target would say of the subject under these options.
        unmerged: what to do where an adapter cannot be merged.
        launch: the words of the command that serves the folder, which they call `$here`; None where none is written.
        requires: Python packages that it needs beyond ours: import name -> what `pip install` calls it.
    """

    name: str
    summary: str
    section: type[Section]
    module: str
    tasks: Sequence[str] = EVERY_TASK
    lint: Callable[[Subject, Any], Iterator[Finding]] = lambda subject, options: iter(())
    unmerged: str = ""
    launch: Callable[[Subject, Any], list[str]] | None = None
    requires: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def form(self, options: Section) -> Form:
        """Whether an adapter is exported beside its base, or merged into it, under these options."""
        form: Form = getattr(options, "form", "merged")
        return form

    def findings(self, subject: Subject, options: Section) -> list[Finding]:
        """What is known before a weight is loaded, from what holds for every target to what this one says."""
        if subject.task not in self.tasks:
            allowed = ", ".join(self.tasks)
            return [Finding(True, f"{self.name} takes {allowed}; this adapter is for {subject.task}")]
        missing = [pip for name, pip in self.requires.items() if importlib.util.find_spec(name) is None]
        found = [Finding(True, f"{self.name} needs {name}", f"`pip install {name}` adds it") for name in missing]
        if self.form(options) == "merged":
            found += [Finding(True, f"it cannot be merged: {reason}", self.unmerged) for reason in subject.why_not_merged()]
        return found + list(self.lint(subject, options))

    def command(self, subject: Subject, options: Section) -> str:
        """The command that serves the folder, for a shell in which `here` is set; empty where there is none."""
        words = self.launch(subject, options) if self.launch else []
        return " ".join(f'"{word}"' if "$here" in word else shlex.quote(word) for word in words)

    def write(self, material: Material, options: Section, folder: Path) -> None:
        """Write what the target reads."""
        importlib.import_module(self.module).write(material, options, folder)

    def check(self, material: Material, options: Section, folder: Path) -> Check:
        """Have a real client read it back, where there is one on this machine."""
        check: Check = importlib.import_module(self.module).check(material, options, folder)
        return check
