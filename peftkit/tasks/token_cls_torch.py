"""TOKEN_CLS on tensors: the tag of a word is learned at its first token (or at all of them) and read at the first."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional

from peftkit.formats.base import RowError
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import IGNORE_INDEX, Batch, Example, View, fit_length
from peftkit.tasks.resampling_torch import Resampler, column, f1_of, macro_f1, ratio, share, weighted_f1
from peftkit.tasks.runtime_torch import BaseRuntime, as_sequences, pad, require_offsets
from peftkit.tasks.statistics import class_table
from peftkit.tasks.token_cls import has_spans, inner_tag

_MARKS = "▁Ġ "  # how tokenizers write a space: a token of nothing else belongs to no word


@dataclass(frozen=True)
class _Pieces:
    """A row's tokens.

    Attributes:
        columns: `input_ids` (and `token_type_ids`) of the whole row, special tokens at both ends included.
        start: special tokens before the words.
        end: where the special tokens after the words begin.
        firsts: position of the first token of every word.
        words: the word of every token between them.
    """

    columns: dict[str, list[int]]
    start: int
    end: int
    firsts: list[int]
    words: list[int | None]

    def window(self, start: int, end: int) -> dict[str, list[int]]:
        """The tokens from `start` to `end` between the special tokens."""
        return {name: [*ids[: self.start], *ids[start:end], *ids[self.end :]] for name, ids in self.columns.items()}


class Runtime(BaseRuntime):
    """See `peftkit.tasks.example.Runtime`; labels are of shape (N, T), IGNORE_INDEX but at the first token of a word.

    `details["places"]` of an example holds (window, position) of every word that has one.
    """

    row_figure = ("token_accuracy", True)

    def __init__(self, tokenizer: Any, settings: Encoding) -> None:
        super().__init__(tokenizer, settings)
        require_offsets(tokenizer, "TOKEN_CLS")
        self.label_ids = {name: number for number, name in enumerate(settings.labels)}
        self.marks_spans = has_spans(settings.labels)
        self._inner_ids = [self.label_ids.get(inner_tag(name), number) for number, name in enumerate(settings.labels)]

    def encode_row(self, row: Mapping[str, Any], origin: str, target: bool) -> list[Example]:
        """Token ids, with one label per word; without target as many windows as every word's tag needs."""
        tags = [self._label_id(tag) for tag in row["tags"]] if target else []
        pieces = self._pieces(row["tokens"])
        num_tokens = len(pieces.columns["input_ids"])
        if not target:
            return [self._windows(row["tokens"], pieces, origin)]
        if not fit_length(num_tokens, self.settings):
            return []
        examples = [self._part(row, pieces, tags, span, origin) for span in self._kept(pieces)]
        if not any(examples):
            raise RowError(f"no word is left to learn ({num_tokens} tokens, max_length {self.settings.max_length})")
        return [example for example in examples if example is not None]

    def _part(
        self, row: Mapping[str, Any], pieces: _Pieces, tags: Sequence[int], span: tuple[int, int], origin: str
    ) -> Example | None:
        """The tokens from the one place to the other, with the tags of the words that begin there; None where none does."""
        start, end = span
        shift = pieces.start - start
        places = {word: first + shift for word, first in enumerate(pieces.firsts) if start <= first < end}
        if not places:
            return None
        inputs = pieces.window(start, end)
        labels = [IGNORE_INDEX] * len(inputs["input_ids"])
        if self.settings.label_all_tokens:
            for place in range(start, end):
                word = pieces.words[place - pieces.start]
                if word in places:
                    labels[place + shift] = self._inner_ids[tags[word]]
        for word, place in places.items():
            labels[place] = tags[word]
        details = {
            "places": [(0, place) for place in places.values()],
            "words": [row["tokens"][word] for word in places],
            "num_words_cut": len(row["tokens"]) - len(places) if self.settings.truncation != "split" else 0,
            "classes": [self.settings.labels[tags[word]] for word in places],
        }
        num_targets = sum(label != IGNORE_INDEX for label in labels)
        return Example(inputs, labels, num_targets, origin, len(pieces.columns["input_ids"]), details=details)

    def _label_id(self, tag: str | int) -> int:
        """The number of a tag: by its name, or, for numbers where the recipe names the tags, by its place."""
        if str(tag) in self.label_ids:
            return self.label_ids[str(tag)]
        if self.settings.numbered and isinstance(tag, int) and 0 <= tag < len(self.label_ids):
            return tag
        raise RowError(f"the tag {tag!r} is not among the tags: {', '.join(self.settings.labels)}")

    def _pieces(self, words: Sequence[str]) -> _Pieces:
        """Tokens of the words as the text that they are, and where each word begins.

        The words are joined by spaces, so that every tokenizer sees the text that its model knows; characters say which token
        is whose. A word that the tokenizer passes over (a zero-width sign) is read as its unknown token.
        """
        pieces, lost = self._tokenize(words)
        if lost and self.tokenizer.unk_token is not None:
            pieces, lost = self._tokenize([self.tokenizer.unk_token if n in lost else word for n, word in enumerate(words)])
        if lost:
            number = min(lost)
            raise RowError(f"word {number + 1} ({words[number]!r}) has no token of its own")
        return pieces

    def _tokenize(self, words: Sequence[str]) -> tuple[_Pieces, set[int]]:
        """The tokens, and the numbers of words without any."""
        text = " ".join(words)
        starts = [0, *accumulate(len(word) + 1 for word in words)][:-1]
        encoded = self.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        special = encoded["special_tokens_mask"]
        start = next((place for place, flag in enumerate(special) if not flag), len(special))
        end = next((place + 1 for place in reversed(range(start, len(special))) if not special[place]), start)
        tokens = self.tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        owners: list[int | None] = []
        firsts: dict[int, int] = {}
        for place in range(start, end):
            first, last = encoded["offset_mapping"][place]
            owned = first < last and not text[last - 1].isspace() and tokens[place].strip(_MARKS)
            owners.append(bisect.bisect_right(starts, last - 1) - 1 if owned else None)
            if owners[-1] is not None:
                firsts.setdefault(owners[-1], place)
        columns = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        lost = set(range(len(words))) - set(firsts)
        return _Pieces(columns, start, end, [firsts[word] for word in sorted(firsts)], owners), lost

    def _room(self, pieces: _Pieces) -> int:
        """Tokens of words that fit beside the special tokens."""
        num_special = len(pieces.columns["input_ids"]) - (pieces.end - pieces.start)
        room = self.settings.max_length - num_special
        if room < 1:
            raise RowError(f"max_length {self.settings.max_length} leaves no room beside {num_special} special tokens")
        return room

    def _kept(self, pieces: _Pieces) -> list[tuple[int, int]]:
        """From where to where tokens are kept, for each example that `truncation` makes of the row."""
        room = self._room(pieces)
        if self.settings.truncation == "left":
            return [(max(pieces.start, pieces.end - room), pieces.end)]
        if self.settings.truncation != "split":
            return [(pieces.start, min(pieces.end, pieces.start + room))]
        spans, start = [], pieces.start
        while start < pieces.end:
            # The next part begins with a word, unless one alone has more tokens than there is room for.
            ends = [first for first in (*pieces.firsts, pieces.end) if start < first <= start + room]
            spans.append((start, ends[-1] if ends else min(pieces.end, start + room)))
            start = spans[-1][1]
        return spans

    def _windows(self, words: Sequence[str], pieces: _Pieces, origin: str) -> Example:
        """Windows that cover every word; neighbours share half of their tokens, and a word is read where it is deepest."""
        room = self._room(pieces)
        step = max(1, room // 2)
        spans, start = [(pieces.start, min(pieces.end, pieces.start + room))], pieces.start
        while spans[-1][1] < pieces.end:
            start += step
            spans.append((start, min(pieces.end, start + room)))
        places = []
        for first in pieces.firsts:
            depth = {n: min(first - a, b - 1 - first) for n, (a, b) in enumerate(spans) if a <= first < b}
            best = max(depth, key=lambda number: depth[number])
            places.append((best, first - spans[best][0] + pieces.start))
        parts = [pieces.window(*span) for span in spans]
        inputs = {name: [part[name] for part in parts] for name in pieces.columns}
        labels = [[IGNORE_INDEX] * len(ids) for ids in inputs["input_ids"]]
        details = {"places": places, "words": list(words), "num_words_cut": 0}
        longest = max(map(len, inputs["input_ids"]))
        return Example(inputs, labels, 0, origin, longest, details=details)

    def views(self, example: Example) -> list[View]:
        """The tokens, and the tags of those that are learned, in order."""
        (ids,), labels, names = example.sequences, example.labels, self.settings.labels
        tags = " ".join(names[label] for label in labels if label != IGNORE_INDEX)
        return [View(f"tags: {tags}", ids, [float(label != IGNORE_INDEX) for label in labels])]

    def labels_tensor(self, examples: Sequence[Example]) -> torch.Tensor:
        """Right-padded labels (N, T)."""
        return pad([labels for example in examples for labels in as_sequences(example.labels)], IGNORE_INDEX)

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum of cross-entropy over labelled words. Logits (N, T, C), labels (N, T)."""
        wanted = labels != IGNORE_INDEX
        return functional.cross_entropy(
            logits[wanted].float(), labels[wanted], reduction="sum", label_smoothing=label_smoothing
        )

    def score(self, logits: torch.Tensor, batch: Batch, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Tags of the words, and the loss where they are known; words that were cut off are counted."""
        results, window, names = [], 0, self.settings.labels
        for example in examples:
            rows = torch.tensor([window + number for number, _ in example.details["places"]])
            columns = torch.tensor([place for _, place in example.details["places"]])
            at_words, labels = logits[rows, columns].float(), batch["labels"][rows, columns]  # (words, C), (words,)
            known = bool((labels != IGNORE_INDEX).all())
            loss = functional.cross_entropy(at_words, labels, reduction="sum") if known else torch.zeros(())
            results.append(
                {
                    "label": [names[int(label)] for label in labels] if known else None,
                    "prediction": [names[int(guess)] for guess in at_words.argmax(-1)],
                    "loss_sum": float(loss),
                    "num_targets": len(labels) if known else 0,
                    "num_words_cut": example.details["num_words_cut"],
                    "_words": example.details["words"],
                }
            )
            window += len(example.sequences)
        return results

    def answer(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Tags of the words and, in BIO and BIOES, the spans: words `start` up to (without) `end`."""
        if not self.marks_spans:
            return {"prediction": result["prediction"]}
        from seqeval.metrics.sequence_labeling import get_entities

        entities = [
            {"type": kind, "text": " ".join(result["_words"][first : last + 1]), "start": first, "end": last + 1}
            for kind, first, last in get_entities(result["prediction"])
        ]
        return {"prediction": result["prediction"], "entities": entities}

    def prompt_row(self, text: str) -> dict[str, Any]:
        """A text, its words split at white space."""
        if not text.split():
            raise RowError("the prompt is blank")
        return {"tokens": text.split()}

    def probe_row(self, text: str) -> dict[str, Any]:
        """The text's words with some tag."""
        return {"tokens": text.split(), "tags": [self.settings.labels[0]] * len(text.split())}

    def summarise(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Loss per word, the share of right tags, and F1 of spans (BIO, BIOES) or of tags; words that were cut off, if any."""
        truth, guess = ([result[key] for result in results] for key in ("label", "prediction"))
        pairs = [pair for row in zip(truth, guess, strict=True) for pair in zip(*row, strict=True)]
        metrics = {
            "loss": math.fsum(result["loss_sum"] for result in results) / len(pairs),
            "token_accuracy": sum(mine == theirs for mine, theirs in pairs) / len(pairs),
        }
        cut = sum(result["num_words_cut"] for result in results)
        rest = _span_metrics(truth, guess) if self.marks_spans else _tag_metrics(pairs, self.settings.labels)
        return metrics | ({"num_words_cut": cut} if cut else {}) | rest

    def resampler(self, results: Sequence[Mapping[str, Any]]) -> Resampler:
        """Loss, token accuracy, and precision, recall and F1 of spans, or F1 of tags."""
        truth, guess = ([result[key] for result in results] for key in ("label", "prediction"))
        loss_sum, num_words = column([result["loss_sum"] for result in results]), column([len(row) for row in truth])
        right = column([_num_equal(*row) for row in zip(truth, guess, strict=True)])
        rest = _span_resampler(truth, guess) if self.marks_spans else _tag_resampler(truth, guess, self.label_ids)
        return lambda counts: (
            {
                "loss": share(counts, loss_sum, num_words),
                "token_accuracy": share(counts, right, num_words),
            }
            | rest(counts)
        )

    def row_figures(self, results: Sequence[Mapping[str, Any]]) -> list[float]:
        """The share of right tags of every row."""
        return [_num_equal(row["label"], row["prediction"]) / len(row["label"]) for row in results]


def _span_metrics(truth: list[list[str]], guess: list[list[str]]) -> dict[str, Any]:
    """Precision, recall and F1 of whole spans, as CoNLL counts them, and a table by kind."""
    from seqeval import metrics
    from seqeval.metrics.sequence_labeling import get_entities

    if not get_entities(truth) and not get_entities(guess):
        return {"f1": 0.0, "precision": 0.0, "recall": 0.0, "by_class": {}}
    report = metrics.classification_report(truth, guess, output_dict=True, zero_division=0)
    by_class = {
        kind: {
            "precision": float(row["precision"]),
            "recall": float(row["recall"]),
            "f1": float(row["f1-score"]),
            "num_rows": int(row["support"]),
        }
        for kind, row in report.items()
        if not kind.endswith(" avg")
    }
    total = report["micro avg"]
    f1, precision, recall = (float(total[name]) for name in ("f1-score", "precision", "recall"))
    return {"f1": f1, "precision": precision, "recall": recall, "by_class": by_class}


def _tag_metrics(pairs: list[tuple[str, str]], names: Sequence[str]) -> dict[str, Any]:
    """F1 of single tags, weighted by how often they occur, and their plain mean, with a table by tag."""
    from sklearn import metrics

    truth, guess = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return {
        "f1": float(metrics.f1_score(truth, guess, average="weighted", zero_division=0)),
        "f1_macro": float(metrics.f1_score(truth, guess, average="macro", zero_division=0)),
        "by_class": class_table(truth, guess, names, names),
    }


def _num_equal(truth: Sequence[str], guess: Sequence[str]) -> int:
    return sum(mine == theirs for mine, theirs in zip(guess, truth, strict=True))


def _span_resampler(truth: list[list[str]], guess: list[list[str]]) -> Resampler:
    """What `_span_metrics` gives, from the numbers of right, guessed and wanted spans of every row."""
    from seqeval.metrics.sequence_labeling import get_entities

    spans = [(set(get_entities(mine)), set(get_entities(theirs))) for mine, theirs in zip(guess, truth, strict=True)]
    numbers = column([(len(mine & theirs), len(mine), len(theirs)) for mine, theirs in spans])

    def resampled(counts: torch.Tensor) -> dict[str, torch.Tensor]:
        right, guessed, wanted = (counts @ numbers).unbind(1)
        return {"f1": f1_of(right, guessed, wanted), "precision": ratio(right, guessed), "recall": ratio(right, wanted)}

    return resampled


def _tag_resampler(truth: list[list[str]], guess: list[list[str]], label_ids: Mapping[str, int]) -> Resampler:
    """What `_tag_metrics` gives, from the numbers of right, guessed and wanted tags of every row (N, tags)."""
    right, guessed, wanted = torch.zeros(3, len(truth), len(label_ids), dtype=torch.float64)
    for row, pairs in enumerate(zip(truth, guess, strict=True)):
        for theirs, mine in zip(*pairs, strict=True):
            wanted[row, label_ids[theirs]] += 1
            guessed[row, label_ids[mine]] += 1
            right[row, label_ids[mine]] += mine == theirs

    def resampled(counts: torch.Tensor) -> dict[str, torch.Tensor]:
        sums = [counts @ numbers for numbers in (right, guessed, wanted)]
        return {"f1": weighted_f1(*sums), "f1_macro": macro_f1(*sums)}

    return resampled
