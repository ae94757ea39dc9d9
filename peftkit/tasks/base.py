"""What a task is: the facts that answer questions without torch, and the runtime behind them.

Everything that differs between task types lives in `tasks/`: the facts here and in one module per task, the work on tensors
in its sibling `*_torch.py`, which is imported only when a model is at hand.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from peftkit.tasks.encoding import Encoding

if TYPE_CHECKING:
    import torch

__all__ = ["IGNORE_INDEX", "Batch", "Encoding", "Example", "Runtime", "Task", "TooLong", "fit_length", "labels_of"]

IGNORE_INDEX = -100  # label of positions without a target, as in torch.nn.functional.cross_entropy

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
        reads: the alternatives of canonical columns it can learn from.
        metrics: metric name -> whether more of it is better.
        default_metric: what decides on the best adapter.
        generates: whether its answers are generated text.
        uses_chat_template: whether messages are rendered by the tokenizer's chat template.
        has_head: whether the modules outside the backbone are new and trained with every method.
        has_labels: whether it maps names of classes to numbers.
        train_on: allowed values of `data.train_on`; empty where it would have no effect.
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
    """

    name: str
    summary: str
    auto_class: str
    reads: tuple[tuple[str, ...], ...]
    metrics: Mapping[str, bool]
    default_metric: str
    generates: bool
    uses_chat_template: bool
    has_head: bool
    has_labels: bool
    train_on: tuple[str, ...]
    runtime_module: str
    num_outputs: int = 0
    other_default_metrics: tuple[str, ...] = ()
    own_keys: tuple[str, ...] = ()
    settle: Callable[[Encoding, Rows, str | None], Encoding] = _as_stated
    idle_keys: Callable[[Encoding], Mapping[str, str]] = lambda settings: {}
    metrics_under: Callable[[Encoding], tuple[str, ...]] | None = None
    encoder_auto_class: str = ""
    only_hidden_states: bool = False

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


@dataclass
class Example:
    """One encoded row.

    Attributes:
        inputs: model inputs as lists of token ids and the like, without padding; lists of such lists where the row is several
            windows or texts.
        labels: what the task learns: target ids (IGNORE_INDEX where there is none), one number, or one list per sequence; a
            float that is not known is NaN.
        num_targets: how many targets the loss of this row sums over.
        origin: `file:row`, for messages.
        num_tokens: length before truncation, in tokens; of the longest text where there are several.
        task_id: number of the row's task, for methods that learn from several tasks.
        details: what turns outputs into an answer again; the model never sees it.
    """

    inputs: dict[str, Any]
    labels: Any
    num_targets: int
    origin: str
    num_tokens: int
    task_id: int | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def sequences(self) -> list[list[int]]:
        """Token ids of every window or text."""
        ids = self.inputs["input_ids"]
        return ids if ids and isinstance(ids[0], list) else [ids]

    @property
    def length(self) -> int:
        """Tokens of the longest window or text."""
        return max(map(len, self.sequences))

    @property
    def num_input_tokens(self) -> int:
        """Tokens that the model reads, all windows and texts together."""
        return sum(map(len, self.sequences))

    def without_targets(self) -> Example:
        """The same inputs with nothing to learn, for a process that has no rows left."""
        return dataclasses.replace(self, labels=_ignored(self.labels), num_targets=0)


def _ignored(labels: Any) -> Any:
    if isinstance(labels, list):
        return [_ignored(part) for part in labels]
    return math.nan if isinstance(labels, float) else IGNORE_INDEX


class TooLong(ValueError):  # noqa: N818 - with `drop` it is no error
    """An example longer than max_length under `truncation: error`; holds its length in tokens."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"{num_tokens} tokens")
        self.num_tokens = num_tokens


def fit_length(num_tokens: int, settings: Encoding) -> slice | None:
    """What of `num_tokens` tokens is kept under max_length; None where `truncation: drop` drops the row.

    Raises:
        TooLong: they are too many under `truncation: error`.
    """
    limit = settings.max_length
    if num_tokens <= limit:
        return slice(None)
    if settings.truncation == "error":
        raise TooLong(num_tokens)
    if settings.truncation == "drop":
        return None
    return slice(-limit, None) if settings.truncation == "left" else slice(limit)


Batch = dict[str, "torch.Tensor"]


class Runtime(Protocol):
    """The torch side of a task; `peftkit.tasks.runtime_torch` has what most of them share.

    Attributes:
        settings: how rows become token ids.
        tokenizer: the model's.
        couples_rows: whether the loss of a row depends on the other rows of its step (in-batch negatives).
    """

    settings: Encoding
    tokenizer: Any
    couples_rows: bool

    def encode(self, row: Mapping[str, Any], origin: str, *, target: bool = True) -> Example | None:
        """A canonical row as token ids; None when `truncation: drop` drops it.

        Raises:
            RowError: the row cannot be used. TooLong: over max_length under `truncation: error`.
        """
        ...

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples to one batch.

        Model inputs of shape (N, T), where N counts windows or texts (B where each row is one sequence), `task_ids` (N,) where
        rows have tasks, and `labels`, whose shape is the task's own.
        """
        ...

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Outputs of a batch: logits (B, T, V), (N, T, C) or (B, C), or vectors (N, D)."""
        ...

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum (not mean) of the loss over the batch's targets, in float32; shape ()."""
        ...

    def join_labels(self, labels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Labels of several batches as those of one, in order; for losses that couple rows."""
        ...

    def score(self, logits: torch.Tensor, batch: Batch, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """One small result per row: what `summarise`, `answer` and the predictions file are made of.

        Keys that begin with an underscore are for `summarise` alone and are not written.
        """
        ...

    def answer(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """What `infer` adds to a row: `prediction` and the task's own keys, from a result of `score`."""
        ...

    def prompt_row(self, text: str) -> dict[str, Any]:
        """What a user typed as a canonical row; for tasks that generate no text.

        Raises:
            RowError: it is not what this task takes.
        """
        ...

    def probe_rows(self) -> list[dict[str, Any]]:
        """Four fixed canonical rows, for comparing two models."""
        ...

    def generation_batch(self, examples: Sequence[Example]) -> Batch:
        """Inputs for `generate`, padded where the model expects it; for tasks that generate."""
        ...

    def new_tokens(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The answer's part of what `generate` returned, (B, T)."""
        ...

    def summarise(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Metrics over the results of all rows."""
        ...
