"""QUESTION_ANS on tensors: windows that cover the whole context, and the best span over all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from peftkit.formats.base import RowError
from peftkit.tasks import squad
from peftkit.tasks.encoding import Encoding, SpanSettings
from peftkit.tasks.example import IGNORE_INDEX, Batch, Example, View
from peftkit.tasks.resampling_torch import Resampler, column, share
from peftkit.tasks.runtime_torch import BaseRuntime, require_offsets

_METRICS = {"exact_match": squad.exact_match, "f1": squad.f1}


class _Window(NamedTuple):
    """Where a window's part of the context is.

    Attributes:
        first: position of its first token of the context.
        offsets: first and last (excluded) character of each of these tokens.
        null: position that stands for "no answer".
        num_tokens: tokens of the window.
    """

    first: int
    offsets: tuple[tuple[int, int], ...]
    null: int
    num_tokens: int

    def place(self, start: int, end: int) -> tuple[int, int] | None:
        """Positions of the tokens that hold the characters from `start` to `end`; None where some are outside."""
        if start < self.offsets[0][0] or end > self.offsets[-1][1]:
            return None
        inside = [number for number, (a, b) in enumerate(self.offsets) if a < end and b > start]
        return (self.first + inside[0], self.first + inside[-1]) if inside else None


@dataclass(frozen=True)
class _Span:
    """A possible answer: its score (start and end logit added up) and its characters in the context."""

    score: float
    start: int
    end: int


class Runtime(BaseRuntime):
    """See `peftkit.tasks.example.Runtime`; labels are of shape (N, 3): start, end, and the window's number of tokens.

    `num_targets` counts windows. Windows that do not hold the whole answer have the position of "no answer" as start and end:
    that of the CLS token, or the first one where there is none (Devlin et al. 2019, arXiv:1810.04805, section 4.3).
    """

    row_figure = ("f1", True)

    def __init__(self, tokenizer: Any, settings: Encoding) -> None:
        super().__init__(tokenizer, settings)
        require_offsets(tokenizer, "QUESTION_ANS")
        self.span = settings.span or SpanSettings()

    def encode_row(self, row: Mapping[str, Any], origin: str, target: bool) -> list[Example]:
        """Token ids of all windows of question and context, and where the first answer is."""
        encoded = self._windows(row["question"], row["context"])
        ids = encoded["input_ids"]
        windows = [
            self._window(ids[number], encoded["offset_mapping"][number], encoded.sequence_ids(number))
            for number in range(len(ids))
        ]
        answers = row["answers"] if target else {"text": [], "answer_start": []}
        places = self._places(windows, answers) if target else [(IGNORE_INDEX, IGNORE_INDEX)] * len(windows)
        labels = [[*place, window.num_tokens] for place, window in zip(places, windows, strict=True)]
        inputs = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        details = {
            "windows": windows,
            "context": row["context"],
            "answers": list(answers["text"]) if target else None,
        }
        num_targets, longest = len(windows) * target, max(map(len, ids))
        return [Example(inputs, labels, num_targets, origin, longest, details=details, notes=_notes(windows, places, answers))]

    def rendering(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The token ids of its windows."""
        return {"input_ids": [ids for example in self.encode(row, "a row of training") for ids in example.sequences]}

    def _windows(self, question: str, context: str) -> Any:
        """The tokenizer's output with one entry per window.

        Raises:
            RowError: the question alone fills a window.
        """
        limit = self.settings.max_length
        num_question = len(self.tokenizer(question, add_special_tokens=False)["input_ids"])
        room = limit - num_question - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room < 2:
            raise RowError(f"the question has {num_question} tokens, which leaves no room for the context in {limit}")
        return self.tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=limit,
            stride=min(self.span.doc_stride, room // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )

    def _window(self, ids: list[int], offsets: list[tuple[int, int]], parts: list[int | None]) -> _Window:
        inside = [number for number, part in enumerate(parts) if part == 1]
        if not inside:
            raise RowError("the context has no tokens")
        cls = self.tokenizer.cls_token_id
        null = ids.index(cls) if cls in ids else 0
        return _Window(inside[0], tuple(offsets[number] for number in inside), null, len(ids))

    def _places(self, windows: Sequence[_Window], answers: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Start and end to learn in every window."""
        nulls = [(window.null, window.null) for window in windows]
        if not answers["text"]:
            return nulls
        start, text = answers["answer_start"][0], answers["text"][0]
        found = [window.place(start, start + len(text)) for window in windows]
        if not any(found):
            what = f"no window of {self.settings.max_length} tokens holds the whole answer {text[:60]!r}"
            raise RowError(f"{what}; a greater data.max_length or data.doc_stride would")
        return [place or null for place, null in zip(found, nulls, strict=True)]

    def views(self, example: Example) -> list[View]:
        """The windows, with the answer in those that hold it."""
        found = []
        for ids, (start, end, _), window in zip(example.sequences, example.labels, example.details["windows"], strict=True):
            has_answer = start != _Window(*window).null
            answers = example.details["answers"]
            title = f"answer: {answers[0]}" if has_answer and answers else "no answer in this window"
            found.append(View(title, ids, [float(has_answer and start <= place <= end) for place in range(len(ids))]))
        return found

    def labels_tensor(self, examples: Sequence[Example]) -> torch.Tensor:
        """Start, end and number of tokens of every window (N, 3)."""
        return torch.tensor([labels for example in examples for labels in example.labels])

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits (N, T, 2) of starts and ends."""
        output = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
        return torch.stack([output.start_logits, output.end_logits], dim=-1)

    def graph_outputs(self, model: Any, inputs: Batch) -> dict[str, torch.Tensor]:
        """Logits (N, T) of starts, and of ends."""
        output = model(**inputs)
        return {"start_logits": output.start_logits.float(), "end_logits": output.end_logits.float()}

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum over windows of the mean cross-entropy of start and end. Logits (N, T, 2), labels (N, 3)."""
        return _window_losses(logits, labels).sum()

    def score(self, logits: torch.Tensor, batch: Batch, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """The best answer of every row over all of its windows, and how good it is where answers are known."""
        losses = _window_losses(logits, batch["labels"])
        results, first = [], 0
        for example in examples:
            rows = slice(first, first + len(example.sequences))
            first = rows.stop
            windows = [_Window(*window) for window in example.details["windows"]]
            result = self._best(logits[rows].float().cpu(), windows, example.details["context"])
            answers = example.details["answers"]
            known = answers is not None
            result |= {"answers": answers, "loss_sum": float(losses[rows].sum()), "num_targets": len(example.sequences) * known}
            if known:
                guess = result["prediction"]
                result |= {name: metric(guess, answers) for name, metric in _METRICS.items()}
                if self.span.unanswerable:
                    span = result["_span"]
                    result["_with_answer"] = {name: metric(span, answers) for name, metric in _METRICS.items()}
                    result["_without"] = float(not answers)
            results.append(result)
        return results

    def _best(self, logits: torch.Tensor, windows: Sequence[_Window], context: str) -> dict[str, Any]:
        """Prediction, its probability among all spans that are allowed, and its characters, from logits (windows, T, 2)."""
        spans, totals, nulls = [], [], []
        for row, window in zip(logits, windows, strict=True):
            span, total = self._best_in(row, window)
            spans.append(span)
            totals.append(total)
            nulls.append(float(row[window.null].sum()))
        best, null = max(spans, key=lambda span: span.score), min(nulls)
        allowed = [*totals, null] if self.span.unanswerable else totals
        total = float(torch.tensor(allowed).logsumexp(0))
        start, end = _without_space(context, best.start, best.end)
        found = {"prediction": context[start:end], "score": math.exp(best.score - total), "start": start, "end": end}
        if not self.span.unanswerable:
            return found
        if null - best.score > self.span.null_score_threshold:
            found = {"prediction": "", "score": math.exp(null - total), "start": None, "end": None}
        return found | {"null_score": null - best.score, "_span": context[start:end]}

    def _best_in(self, logits: torch.Tensor, window: _Window) -> tuple[_Span, float]:
        """The best span inside a window's context, and the logarithm of the sum of all spans' exponentials. Logits (T, 2)."""
        num_tokens = len(window.offsets)
        starts, ends = logits[window.first : window.first + num_tokens].unbind(-1)
        longest = min(self.span.max_answer_length, num_tokens)
        # Row d holds the scores of the spans of d + 1 tokens, by their start.
        scores = torch.stack(
            [functional.pad(starts[: num_tokens - d] + ends[d:], (0, d), value=-math.inf) for d in range(longest)]
        )
        more, start = divmod(int(scores.argmax()), num_tokens)
        span = _Span(float(scores[more, start]), window.offsets[start][0], window.offsets[start + more][1])
        return span, float(scores.flatten().logsumexp(0))

    def answer(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """The answer (empty where there is none), its probability, and its characters in the context."""
        return {key: result[key] for key in ("prediction", "score", "start", "end")}

    def prompt_row(self, text: str) -> dict[str, Any]:
        """A JSON object with question and context."""
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str) and row[key].strip() for key in ("question", "context")
        ):
            raise RowError('the prompt must be a JSON object: {"question": "...", "context": "..."}')
        return {"question": row["question"], "context": row["context"]}

    def probe_row(self, text: str) -> dict[str, Any]:
        """The first word of a text, asked for."""
        return {"question": "what?", "context": text, "answers": {"text": [text.split(maxsplit=1)[0]], "answer_start": [0]}}

    def summarise(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Loss per window, exact match and F1 (0 to 1); also apart for questions with and without answer, if any."""
        num_windows = sum(result["num_targets"] for result in results)
        metrics = {"loss": math.fsum(result["loss_sum"] for result in results) / num_windows, **_means(results)}
        parts = {
            "has_answer": [result for result in results if result["answers"]],
            "no_answer": [result for result in results if not result["answers"]],
        }
        for name, rows in parts.items() if parts["no_answer"] else ():
            metrics |= {f"{name}_{metric}": value for metric, value in _means(rows).items()} if rows else {}
        return metrics | (_best_thresholds(results) if self.span.unanswerable and parts["no_answer"] else {})

    def resampler(self, results: Sequence[Mapping[str, Any]]) -> Resampler:
        """Loss, exact match and F1, also apart for questions with and without answer, if any."""
        answered = column([float(bool(result["answers"])) for result in results])
        parts = {"": torch.ones_like(answered)}
        parts |= {"has_answer_": answered, "no_answer_": 1 - answered} if not answered.all() else {}
        loss_sum, num_windows, *figures = (
            column([result[name] for result in results]) for name in ("loss_sum", "num_targets", *_METRICS)
        )
        named = list(zip(_METRICS, figures, strict=True))
        return lambda counts: (
            {"loss": share(counts, loss_sum, num_windows)}
            | {f"{part}{name}": share(counts, figure * rows, rows) for part, rows in parts.items() for name, figure in named}
        )

    def row_figures(self, results: Sequence[Mapping[str, Any]]) -> list[float]:
        """F1 of every row."""
        return [result["f1"] for result in results]


def _notes(windows: Sequence[_Window], places: Sequence[tuple[int, int]], answers: Mapping[str, Any]) -> tuple[str, ...]:
    """What the audit tells of a row with an answer that not every window holds."""
    nulls = sum(place == (window.null, window.null) for window, place in zip(windows, places, strict=True))
    if not answers["text"] or not nulls:
        return ()
    return (f"{nulls} of {len(windows)} windows do not hold the whole answer and are learned as ones without an answer",)


def _means(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: sum(result[name] for result in results) / len(results) for name in _METRICS}


def _best_thresholds(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the best `evaluation.null_score_threshold` would give on these rows, and which it is."""
    found = {}
    for name in _METRICS:
        rows = [(result["null_score"], result["_with_answer"][name], result["_without"]) for result in results]
        found[f"best_{name}"], found[f"best_{name}_threshold"] = squad.best_threshold(rows)
    return found


def _window_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss (N,) of every window, 0 where nothing is known; padding takes no part. Logits (N, T, 2), labels (N, 3)."""
    lengths = torch.where(labels[:, 2] == IGNORE_INDEX, logits.shape[1], labels[:, 2])
    padding = torch.arange(logits.shape[1], device=logits.device)[None, :] >= lengths[:, None]  # (N, T)
    scores = logits.float().masked_fill(padding[:, :, None], -math.inf).transpose(1, 2)  # (N, 2, T)
    losses = functional.cross_entropy(
        scores.flatten(0, 1), labels[:, :2].flatten(), reduction="none", ignore_index=IGNORE_INDEX
    )
    return losses.view(-1, 2).mean(1)


def _without_space(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without the white space at its ends, which some tokenizers count to a word."""
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip())
