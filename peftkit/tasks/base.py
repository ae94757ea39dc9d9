"""What a task is: the facts that answer questions without torch, and the runtime behind them.

Everything that differs between task types lives in `tasks/`: the facts here and in one module per task, the work on tensors
in its sibling `*_torch.py`, which is imported only when a model is at hand.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100  # label of positions without a target, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
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
        has_labels: whether it maps names of classes to numbers.
        train_on: allowed values of `data.train_on`; empty where it would have no effect.
        runtime_module: module with `Runtime`, imported when tensors are needed.
    """

    name: str
    summary: str
    auto_class: str
    reads: tuple[tuple[str, ...], ...]
    metrics: Mapping[str, bool]
    default_metric: str
    generates: bool
    uses_chat_template: bool
    has_labels: bool
    train_on: tuple[str, ...]
    runtime_module: str

    def can_read(self, columns: Sequence[str]) -> bool:
        """Whether a format that yields these canonical columns feeds this task, with none of them left over."""
        return any(set(wanted) == set(columns) for wanted in self.reads)

    def runtime(self, tokenizer: Any, settings: Encoding) -> Runtime:
        """The torch side of this task."""
        runtime: Runtime = importlib.import_module(self.runtime_module).Runtime(tokenizer, settings)
        return runtime


@dataclass(frozen=True)
class Encoding:
    """How rows become token ids; stored with the adapter, so that inference repeats it.

    Attributes:
        max_length: tokens per example.
        truncation: `error`, `left`, `right` or `drop`.
        train_on: which tokens are targets.
        labels: names of the classes in order, for tasks that have them.
    """

    max_length: int
    truncation: str = "error"
    train_on: str = "completion"
    labels: tuple[str, ...] = ()


@dataclass
class Example:
    """One encoded row.

    Attributes:
        inputs: model inputs as lists of token ids and the like, without padding.
        labels: target ids for language tasks (IGNORE_INDEX where there is none), one number for classification.
        num_targets: how many targets the loss of this row sums over.
        origin: `file:row`, for messages.
        num_tokens: length before truncation, in tokens.
    """

    inputs: dict[str, list[int]]
    labels: list[int] | int
    num_targets: int
    origin: str
    num_tokens: int


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
    """The torch side of a task."""

    settings: Encoding
    tokenizer: Any

    def encode(self, row: Mapping[str, Any], origin: str, *, target: bool = True) -> Example | None:
        """A canonical row as token ids; None when `truncation: drop` drops it.

        Raises:
            RowError: the row cannot be used. TooLong: over max_length under `truncation: error`.
        """
        ...

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples to one batch: tensors of shape (B, T), `labels` of shape (B, T) or (B,)."""
        ...

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits of a batch: (B, T, V) for language tasks, (B, C) for classification."""
        ...

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum (not mean) of the loss over the batch's targets, in float32; shape ()."""
        ...

    def score(self, logits: torch.Tensor, batch: Batch, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """One small result per row (loss, counts, prediction): what `summarise` and the predictions file are made of."""
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
