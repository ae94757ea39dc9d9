"""Options and findings that `onnx` and `openvino` have in common."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from peftkit.exports.base import Finding, Form
from peftkit.exports.subject import Subject
from peftkit.section import Section

UNMERGED = "`--set form=adapter` writes base and adapter as one graph"


class GraphOptions(Section):
    """Options of targets that are traced."""

    form: Form = Field("merged", description="merged: folded into the base; adapter: base and adapter as one graph.")
    dtype: Literal["float32", "float16"] = Field("float32", description="Dtype of the written weights.")
    quantization: str = "none"
    data: str | None = Field(None, description="File of rows to measure the task's metrics on, before and after quantisation.")
    task_id: str | None = Field(None, description="The task, of an adapter that has learned several.")


def task_number(subject: Subject, task_id: str | None) -> int | None:
    """The number of the task that is exported; None for an adapter that knows no tasks."""
    names = task_names(subject)
    return (names.index(task_id) if task_id in names else 0) if names else None


def task_names(subject: Subject) -> list[str]:
    """The tasks that an adapter has learned from a column `task_id`."""
    encoding = subject.facts.get("encoding") or {}
    return list(encoding.get("task_names") or ())


def lint_graph(subject: Subject, options: GraphOptions) -> Iterator[Finding]:
    """What is known of every traced target without torch."""
    names = task_names(subject)
    if names and options.task_id not in names:
        asked = "" if options.task_id is None else f" and not `{options.task_id}`"
        yield Finding(
            True, f"a graph is for one task, and the adapter knows {', '.join(names)}{asked}", f"add `--set task_id={names[0]}`"
        )
    if not names and options.task_id is not None:
        yield Finding(True, "task_id has no effect: the adapter has not learned several tasks", "leave it out")
    yield from _lint_quantization(options)
    method = subject.known_method
    if options.form == "adapter" and method is not None and method.not_one_graph:
        yield Finding(True, f"{method.name} cannot be one graph with its base: {method.not_one_graph}")


def _lint_quantization(options: GraphOptions) -> Iterator[Finding]:
    kind = options.quantization
    if kind != "none" and options.dtype == "float16":
        yield Finding(
            True, f"{kind} is made from float32 weights: dtype=float16 would have no effect", "leave one of the two out"
        )
    if options.data is not None and kind == "none":
        yield Finding(True, "data has no effect without quantization: the numbers are those of `evaluate`", "leave it out")
    if options.data is not None and not Path(options.data).is_file():
        yield Finding(True, f"data: there is no file `{options.data}`", "name one with rows as for `evaluate --data`")
