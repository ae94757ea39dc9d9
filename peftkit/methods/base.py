"""What an adapter method is: a section of the recipe and the facts that answer questions without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peftkit.section import Section


@dataclass(frozen=True)
class Method:
    """One adapter method.

    Attributes:
        name: the value of `adapter.method`.
        summary: one line for `peftkit methods`, with the paper.
        section: the recipe section; its fields are PEFT's own.
        kind: `peft` is injected by PEFT; `head` and `full` train parameters of the base model itself.
        peft_config: class name in `peft`, for kind `peft`.
        learning_rate: what `training.learning_rate: auto` becomes.
        learning_rate_source: where that figure comes from.
        task_learning_rates: task -> (rate, source) where a task wants another one.
        left_out: PEFT fields that a recipe cannot state, each with the reason.
        other_defaults: fields whose default differs from PEFT's, each with the reason.
        check: yields (field, sentence) for settings that cannot work together.
        not_mergeable_with: reason why this section (or PEFT config: the fields are the same) in particular cannot be merged, or
            an empty string.
        changes_base: whether the initialisation of this section changes base weights.
    """

    name: str
    summary: str
    section: type[Section]
    kind: Literal["peft", "head", "full"]
    learning_rate: float
    learning_rate_source: str
    peft_config: str = ""
    task_learning_rates: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    other_defaults: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Any], Iterator[tuple[str, str]]] = lambda section: iter(())
    not_mergeable: str = ""
    not_mergeable_with: Callable[[Any], str] = lambda section: ""
    changes_base: Callable[[Any], bool] = lambda section: False

    def learning_rate_for(self, task: str) -> tuple[float, str]:
        """The default learning rate for a task, and its source."""
        return self.task_learning_rates.get(task, (self.learning_rate, self.learning_rate_source))

    def peft_fields(self, section: Section) -> dict[str, Any]:
        """The keyword arguments for the PEFT config class, plain values only."""
        return section.model_dump(exclude={"method"})
