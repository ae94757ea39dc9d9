"""One encoded row, how long rows become examples, and the torch side of a task, which makes the one of the other and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from peftkit.tasks.encoding import Encoding

if TYPE_CHECKING:
    import torch

    from peftkit.tasks.resampling_torch import Resampler

IGNORE_INDEX = -100  # label of positions without a target, as in torch.nn.functional.cross_entropy


@dataclass
class Example:
    """One encoded row.

    Attributes:
        inputs: model inputs as lists of token ids and the like, without padding; lists of such lists where the row is several
            windows or texts.
        labels: what the task learns: target ids (IGNORE_INDEX where there is none), one number, or one list per sequence; a
            float that is not known is NaN.
        num_targets: how many targets the loss of this row sums over; the sum of their weights, where they have any.
        origin: `file:row`, for messages.
        num_tokens: length before truncation, in tokens; of the longest text where there are several.
        task_id: number of the row's task, for methods that learn from several tasks.
        weights: of every token of `labels`, where they are not all 1; only for tasks whose labels are tokens.
        details: what turns outputs into an answer again, as plain data; the model never sees it.
        notes: what the audit should tell of the row; not kept.
    """

    inputs: dict[str, Any]
    labels: Any
    num_targets: float
    origin: str
    num_tokens: int
    task_id: int | None = None
    weights: list[float] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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

    @property
    def num_target_tokens(self) -> int:
        """How many targets there are, whatever their weights."""
        return int(self.num_targets) if self.weights is None else sum(weight > 0 for weight in self.weights[1:])

    def without_targets(self) -> Example:
        """The same inputs with nothing to learn, for a process that has no rows left."""
        return dataclasses.replace(self, labels=_ignored(self.labels), num_targets=0, weights=None)


def _ignored(labels: Any) -> Any:
    if isinstance(labels, list):
        return [_ignored(part) for part in labels]
    return math.nan if isinstance(labels, float) else IGNORE_INDEX


class TooLong(ValueError):  # noqa: N818 - with `drop` it is no error
    """An example longer than max_length under `truncation: error`; holds its length in tokens."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"{num_tokens} tokens")
        self.num_tokens = num_tokens


def fit_length(num_tokens: int, settings: Encoding) -> list[slice]:
    """What of `num_tokens` tokens is kept under max_length, for each example that they become; none where the row is dropped.

    Raises:
        TooLong: they are too many under `truncation: error`.
    """
    limit = settings.max_length
    if num_tokens <= limit:
        return [slice(None)]
    if settings.truncation == "error":
        raise TooLong(num_tokens)
    if settings.truncation == "split":
        return [slice(start, start + limit) for start in range(0, num_tokens, limit)]
    return {"drop": [], "left": [slice(-limit, None)], "right": [slice(limit)]}[settings.truncation]


@dataclass(frozen=True)
class View:
    """A sequence of an example, to be looked at.

    Attributes:
        title: what it is, and what is learned of it as a whole.
        ids: its tokens.
        weights: of each token, where tokens are learned; 0: not learned.
    """

    title: str
    ids: list[int]
    weights: list[float]


Batch = dict[str, "torch.Tensor"]
LogitsOf = Callable[["torch.Tensor"], "torch.Tensor"]


class Runtime(Protocol):
    """The torch side of a task; `peftkit.tasks.runtime_torch` has what most of them share.

    Attributes:
        settings: how rows become token ids.
        tokenizer: the model's.
        couples_rows: whether the loss of a row depends on the other rows of its step (in-batch negatives).
        row_figure: name of the number that says how well one row was answered, and whether more of it is better.
    """

    settings: Encoding
    tokenizer: Any
    couples_rows: bool
    row_figure: tuple[str, bool]

    def encode(self, row: Mapping[str, Any], origin: str, *, target: bool = True) -> list[Example]:
        """A canonical row as token ids; none when `truncation: drop` drops it, several when `split` splits it.

        Raises:
            RowError: the row cannot be used. TooLong: over max_length under `truncation: error`.
        """
        ...

    def rendering(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the tokenizer makes of a canonical row: its token ids and, for conversations, what the template writes."""
        ...

    def views(self, example: Example) -> list[View]:
        """What the model reads of an example and what it learns there, for people to look at."""
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

    def graph_outputs(self, model: Any, inputs: Batch) -> dict[str, torch.Tensor]:
        """What an exported graph gives for model inputs, by name, in float32; for tasks that generate no text."""
        ...

    def inputs(self, model: Any, batch: Batch) -> dict[str, Any]:
        """The model's arguments for a batch, none of which makes it compute a loss; for tasks that learn tokens."""
        ...

    def align(self, outputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs (B, T, ...) and the labels (B, T) or (B, T, 2) that they predict; for tasks that learn tokens."""
        ...

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum (not mean) of the loss over the batch's targets, in float32; shape ()."""
        ...

    def join_labels(self, labels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Labels of several batches as those of one, in order; for losses that couple rows."""
        ...

    def score_states(self, states: torch.Tensor, batch: Batch, logits_of: LogitsOf) -> list[dict[str, Any]]:
        """`score` from hidden states (B, T, D) and what makes logits (N, V) of (N, D); for tasks that learn tokens."""
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

    def resampler(self, results: Sequence[Mapping[str, Any]]) -> Resampler:
        """What gives the metrics that are one number for many resamples of these rows at once."""
        ...

    def row_figures(self, results: Sequence[Mapping[str, Any]]) -> list[float]:
        """`row_figure` of every row."""
        ...
