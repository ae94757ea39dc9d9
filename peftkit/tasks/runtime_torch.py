"""What the tasks' runtimes share: padding, tasks of rows, the forward pass."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peftkit.errors import LoadError
from peftkit.formats.base import RowError
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import Batch, Example, LogitsOf, View

# Any text will do: what counts is that both models see the same.
PROBE_TEXTS = (
    "The parcel came on Tuesday, but the lamp in it was broken.",
    "How many apples are left?",
    "yes",
    "12 + 30 = 42, so it is.",
)


class BaseRuntime:
    """See `peftkit.tasks.example.Runtime`; a task adds `encode_row`, `labels_tensor`, `loss_sum`, `score` and its metrics."""

    couples_rows = False
    row_figure = ("loss", False)

    def __init__(self, tokenizer: Any, settings: Encoding) -> None:
        self.tokenizer, self.settings = tokenizer, settings

    def encode(self, row: Mapping[str, Any], origin: str, *, target: bool = True) -> list[Example]:
        """A canonical row as token ids, with the number of its task where rows have tasks."""
        examples = self.encode_row(row, origin, target)
        for example in examples if self.settings.task_names else ():
            example.task_id = task_number(row, self.settings.task_names)
        return examples

    def encode_row(self, row: Mapping[str, Any], origin: str, target: bool) -> list[Example]:
        """The task's own part of `encode`."""
        raise NotImplementedError

    def rendering(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Its token ids, however many."""
        settings = dataclasses.replace(self.settings, max_length=sys.maxsize)
        examples = type(self)(self.tokenizer, settings).encode(row, "a row of training")
        return {"input_ids": [ids for example in examples for ids in example.sequences]}

    def views(self, example: Example) -> list[View]:
        """Its sequences, no token of which is learned by itself."""
        titles = self.view_titles(example)
        return [View(title, ids, [0.0] * len(ids)) for title, ids in zip(titles, example.sequences, strict=True)]

    def view_titles(self, example: Example) -> list[str]:
        """A title for each sequence."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Right-padded inputs (N, T) with `attention_mask`, and the task's labels."""
        return pad_inputs(self.tokenizer, examples) | {"labels": self.labels_tensor(examples)}

    def labels_tensor(self, examples: Sequence[Example]) -> torch.Tensor:
        """Labels of a batch; where rows have one label each, (B,)."""
        return torch.tensor([example.labels for example in examples])

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """The model's logits."""
        logits: torch.Tensor = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        return logits

    def graph_outputs(self, model: Any, inputs: Batch) -> dict[str, torch.Tensor]:
        """The model's logits."""
        return {"logits": model(**inputs).logits.float()}

    def inputs(self, model: Any, batch: Batch) -> dict[str, Any]:
        """Most tasks learn no tokens."""
        raise TypeError("this task learns no tokens")

    def align(self, outputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Most tasks learn no tokens."""
        raise TypeError("this task learns no tokens")

    def score_states(self, states: torch.Tensor, batch: Batch, logits_of: LogitsOf) -> list[dict[str, Any]]:
        """Most tasks learn no tokens."""
        raise TypeError("this task learns no tokens")

    def join_labels(self, labels: Sequence[torch.Tensor]) -> torch.Tensor:
        """One batch's labels after the other's."""
        return torch.cat(list(labels))

    def row_figures(self, results: Sequence[Mapping[str, Any]]) -> list[float]:
        """The loss per target of every row."""
        return [result["loss_sum"] / result["num_targets"] for result in results]

    def answer(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """The prediction alone."""
        return {"prediction": result["prediction"]}

    def prompt_row(self, text: str) -> dict[str, Any]:
        """A text."""
        return {"text": text}

    def probe_rows(self) -> list[dict[str, Any]]:
        """Four fixed rows, of the first task where rows have tasks."""
        tasks = {"task_id": self.settings.task_names[0]} if self.settings.task_names else {}
        return [self.probe_row(text) | tasks for text in PROBE_TEXTS]

    def probe_row(self, text: str) -> dict[str, Any]:
        """A canonical row about a text."""
        raise NotImplementedError

    def generation_batch(self, examples: Sequence[Example]) -> Batch:
        """Most tasks generate nothing."""
        raise TypeError("this task generates no text")

    def new_tokens(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Most tasks generate nothing."""
        raise TypeError("this task generates no text")


def task_number(row: Mapping[str, Any], names: Sequence[str]) -> int:
    """The number of a row's task; where there is but one, it need not be named.

    Raises:
        RowError: it names none, or one that is not known.
    """
    known = f"the adapter knows the tasks {', '.join(names)}"
    if row.get("task_id") is None and len(names) == 1:
        return 0
    if row.get("task_id") is None:
        raise RowError(f"no task is named (in the column `task_id`, or by --task-id); {known}")
    name = str(row["task_id"])
    if name not in names:
        raise RowError(f"the task {name!r} in `task_id` is not known; {known}")
    return names.index(name)


def pad(rows: Sequence[Sequence[int]], value: int, *, side: str = "right") -> torch.Tensor:
    """Rows of token ids as one tensor (N, T), filled with `value` on one side."""
    width = max(len(row) for row in rows)
    filled = [
        [*row, *[value] * (width - len(row))] if side == "right" else [*[value] * (width - len(row)), *row] for row in rows
    ]
    return torch.tensor(filled, dtype=torch.long)


def pad_inputs(tokenizer: Any, examples: Sequence[Example], *, side: str = "right") -> dict[str, torch.Tensor]:
    """Model inputs (N, T) of several examples, with `attention_mask` but for packed rows; `task_ids` (N,) of rows with tasks.

    N counts the windows or texts of all examples, in order.
    """
    values = {
        "input_ids": tokenizer.pad_token_id,
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
        "position_ids": 0,
    }
    batch = {
        name: pad(
            [sequence for example in examples for sequence in as_sequences(example.inputs[name])], values[name], side=side
        )
        for name in examples[0].inputs
    }
    if "position_ids" not in batch:  # in packed rows positions say which tokens belong together, padding included
        ones = [[1] * len(sequence) for example in examples for sequence in example.sequences]
        batch["attention_mask"] = pad(ones, 0, side=side)
    if examples[0].task_id is not None:
        batch["task_ids"] = torch.tensor([example.task_id for example in examples for _ in example.sequences])
    return batch


def check_ids(ids: Sequence[int], tokenizer: Any, name: str = "input_ids") -> list[int]:
    """Token ids of a pre-tokenised row.

    Raises:
        RowError: the tokenizer has no such token.
    """
    wrong = next((place for place, token in enumerate(ids) if not 0 <= token < len(tokenizer)), None)
    if wrong is not None:
        allowed = f"the tokenizer has the tokens 0 to {len(tokenizer) - 1}"
        raise RowError(f"`{name}` has the token {ids[wrong]} (place {wrong + 1}); {allowed}")
    return list(ids)


def as_sequences(values: Any) -> list[list[int]]:
    """One list per window or text, also where the row is a single one."""
    return values if values and isinstance(values[0], list) else [values]


def require_offsets(tokenizer: Any, task: str) -> None:
    """Refuse tokenizers that cannot tell which characters a token comes from.

    Raises:
        LoadError: it is a slow one, written in Python.
    """
    if not tokenizer.is_fast:
        raise LoadError(
            f"{task} needs a fast tokenizer, which knows the characters that tokens come from; "
            f"{type(tokenizer).__name__} is a slow one. Name another with model.tokenizer_name_or_path"
        )
