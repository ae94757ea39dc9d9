"""What a task is: the facts that answer questions without torch, and the runtime behind them.

Everything that differs between task types lives in `tasks/`: the facts here and in one module per task, the work on tensors
in its sibling `*_torch.py`, which is imported only when a model is at hand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftkit.tasks.encoding import Encoding

if TYPE_CHECKING:
    from peftkit.tasks.example import Runtime

Rows = Sequence[Mapping[str, Any]]  # canonical rows


def _as_stated(stated: Encoding, rows: Rows, model_kind: str | None) -> Encoding:
    return stated


@dataclass(frozen=True, eq=False, repr=False)  # one of a kind each; what is not generated starts faster
class Task:
    """One task type.

    Attributes:
        name: PEFT's task type, the value of `task`.
        summary: one line for messages and help.
        auto_class: the transformers class that loads its models.
        pipeline_tag: what the hub calls it.
        reads: the alternatives of canonical columns it can learn from.
        metrics: metric name -> whether more of it is better.
        default_metric: what decides on the best adapter.
        generates: whether its answers are generated text.
        uses_chat_template: whether messages are rendered by the tokenizer's chat template.
        has_head: whether the modules outside the backbone are new and trained with every method.
        has_labels: whether it maps names of classes to numbers.
        train_on: allowed values of `data.train_on`; empty where it would have no effect.
        truncations: allowed values of `data.truncation`.
        learns_tokens: whether its labels are tokens, of which a share is learned.
        packs: whether its rows can be laid end to end (`data.packing`).
        peft_type: the task type that PEFT knows it as, where that is not its name.
        runtime_module: module with `Runtime`, imported when tensors are needed.
        num_outputs: outputs of the head, where rows do not decide on them.
        other_default_metrics: what decides under settings that have not the default metric, in order of preference.
        own_keys: recipe keys and sections that were made for this task: without effect for those that do not list them.
        settle: what the recipe states, with everything that the training rows and the kind of the model decide.
            Raises RowError where the rows do not go together.
        idle_keys: recipe keys that have no effect under these settings, each with the reason.
        metrics_under: those of the metrics that there are under these settings.
        only_hidden_states: whether a pooler of the base model, trained or not, is of no use to it.
        encoder_auto_class: the class for models with encoder and decoder, where only their encoder is of use.
        plain_note: what is different where PEFT alone loads an adapter of it, for model cards.
    """

    name: str
    summary: str
    auto_class: str
    pipeline_tag: str
    reads: tuple[tuple[str, ...], ...]
    metrics: Mapping[str, bool]
    default_metric: str
    generates: bool
    uses_chat_template: bool
    has_head: bool
    has_labels: bool
    train_on: tuple[str, ...]
    runtime_module: str
    truncations: tuple[str, ...] = ("error", "left", "right", "drop")
    learns_tokens: bool = False
    packs: bool = False
    num_outputs: int = 0
    other_default_metrics: tuple[str, ...] = ()
    own_keys: tuple[str, ...] = ()
    settle: Callable[[Encoding, Rows, str | None], Encoding] = _as_stated
    idle_keys: Callable[[Encoding], Mapping[str, str]] = lambda settings: {}
    metrics_under: Callable[[Encoding], tuple[str, ...]] | None = None
    encoder_auto_class: str = ""
    plain_note: str = ""
    only_hidden_states: bool = False
    peft_type: str = ""

    @property
    def task_type(self) -> str:
        """What its adapters' configs say to PEFT, which takes no names but its own."""
        return self.peft_type or self.name

    def can_read(self, columns: Sequence[str]) -> bool:
        """Whether a format that yields these canonical columns feeds this task, with none of them left over."""
        return any(set(wanted) == set(columns) for wanted in self.reads)

    def metrics_for(self, settings: Encoding) -> tuple[str, ...]:
        """Names of the metrics under these settings."""
        return self.metrics_under(settings) if self.metrics_under else tuple(self.metrics)

    def default_metric_for(self, settings: Encoding) -> str:
        """What decides on the best adapter under these settings."""
        names = self.metrics_for(settings)
        return next(name for name in (self.default_metric, *self.other_default_metrics) if name in names)

    def runtime(self, tokenizer: Any, settings: Encoding) -> Runtime:
        """The torch side of this task."""
        runtime: Runtime = importlib.import_module(self.runtime_module).Runtime(tokenizer, settings)
        return runtime


def labels_of(names: set[str]) -> tuple[str, ...]:
    """Names of classes in order: numbers in numeric order, then names in alphabetical order."""
    return tuple(sorted(names, key=lambda name: (0, int(name), "") if name.lstrip("-").isdigit() else (1, 0, name)))
