"""SEQ_CLS on tensors: one target per row, which is a class, a set of classes or a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from peftkit.formats.base import RowError
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import IGNORE_INDEX, Batch, Example, fit_length
from peftkit.tasks.resampling_torch import (
    Resampler,
    column,
    correlations_of,
    f1_of,
    macro_f1,
    means_of,
    ratio,
    tallies,
    weighted_f1,
)
from peftkit.tasks.runtime_torch import BaseRuntime
from peftkit.tasks.seq_cls import MULTI, REGRESSION, SINGLE, class_of, number_of
from peftkit.tasks.statistics import class_table, correlations

ROW_FIGURES = {SINGLE: ("right", True), MULTI: ("f1", True), REGRESSION: ("absolute_error", False)}
THRESHOLD = 0.5  # probability from which on a class counts as predicted, with several labels per row


class Runtime(BaseRuntime):
    """See `peftkit.tasks.example.Runtime`.

    Labels are of shape (B,) with class numbers (IGNORE_INDEX: none), (B, C) with 0 and 1, or (B,) with numbers (NaN: none).
    """

    def __init__(self, tokenizer: Any, settings: Encoding) -> None:
        super().__init__(tokenizer, settings)
        self.label_ids = {name: number for number, name in enumerate(settings.labels)}
        self.problem_type = settings.problem_type
        self.row_figure = ROW_FIGURES.get(settings.problem_type, ROW_FIGURES[SINGLE])

    def encode_row(self, row: Mapping[str, Any], origin: str, target: bool) -> list[Example]:
        """Token ids of the text (or pair) and its label."""
        names = self._names(row["label"]) if target and self.problem_type != REGRESSION else []
        label = self._label(row.get("label"), names, target)
        encoded = self.tokenizer(row["text"], row.get("text_pair"))
        num_tokens = len(encoded["input_ids"]) + self._lacks_end(encoded["input_ids"])
        if not fit_length(num_tokens, self.settings):
            return []
        if num_tokens > self.settings.max_length:
            encoded = self._cut(row)  # by the tokenizer, which keeps the special tokens at both ends
        inputs = {name: list(encoded[name]) for name in ("input_ids", "token_type_ids") if name in encoded}
        if self._lacks_end(inputs["input_ids"]):
            kept = slice(self.settings.max_length - 1)
            inputs["input_ids"] = [*inputs["input_ids"][kept], self.tokenizer.eos_token_id]
        return [Example(inputs, label, 1, origin, num_tokens, details={"classes": names})]

    def _lacks_end(self, ids: list[int]) -> bool:
        """Whether a text wants an end token that its tokenizer has not given it."""
        return self.settings.adds_end and ids[-1:] != [self.tokenizer.eos_token_id]

    def _cut(self, row: Mapping[str, Any]) -> Any:
        side, self.tokenizer.truncation_side = self.tokenizer.truncation_side, self.settings.truncation
        encoded = self.tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=self.settings.max_length)
        self.tokenizer.truncation_side = side
        return encoded

    def _names(self, label: Any) -> list[str]:
        """The classes of a row."""
        if isinstance(label, list) != (self.problem_type == MULTI):
            wanted = "a list of classes" if self.problem_type == MULTI else "one class"
            raise RowError(f"the label is {label!r}, not {wanted}, as `data.problem_type` or the other rows have it")
        names = [self._name(part) for part in (label if isinstance(label, list) else [label])]
        for name in names:
            if name not in self.label_ids:
                raise RowError(f"the label {name!r} is not among the classes: {', '.join(self.settings.labels)}")
        return names

    def _name(self, label: Any) -> str:
        """The name of a class, or the one at this place."""
        name = class_of(label)
        is_place = self.settings.numbered and name.isdigit() and name not in self.label_ids
        return self.settings.labels[int(name)] if is_place and int(name) < len(self.label_ids) else name

    def _label(self, label: Any, names: list[str], target: bool) -> Any:
        if self.problem_type == REGRESSION:
            number = number_of(label) if target else math.nan
            if number is None:
                raise RowError(f"the label is {label!r}, not a number, as `data.problem_type` or the other rows have it")
            return number
        if self.problem_type == MULTI:
            return [int(name in names) if target else IGNORE_INDEX for name in self.settings.labels]
        return self.label_ids[names[0]] if target else IGNORE_INDEX

    def view_titles(self, example: Example) -> list[str]:
        """The label."""
        label = example.labels if self.problem_type == REGRESSION else ", ".join(example.details["classes"]) or "none"
        return [f"label: {label}"]

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum over the rows that have a label. Logits (B, C); labels as the class says."""
        return self._losses(logits, labels, label_smoothing).sum()

    def _losses(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Loss of every row (B,), 0 where it has no label.

        Cross-entropy; binary cross-entropy averaged over the classes; or the squared error.
        """
        logits = logits.float()
        if self.problem_type == REGRESSION:
            errors = logits.squeeze(-1) - labels.to(logits.dtype)
            return torch.where(labels.isnan(), logits.new_zeros(()), errors).square()
        if self.problem_type == MULTI:
            known = (labels != IGNORE_INDEX).to(logits.dtype)
            wanted = labels.clamp(min=0).to(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
            return (functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none") * known).mean(-1)
        return functional.cross_entropy(
            logits, labels, reduction="none", label_smoothing=label_smoothing, ignore_index=IGNORE_INDEX
        )

    def score(self, logits: torch.Tensor, batch: Batch, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Prediction, probabilities (of classes), and the loss where the label is known."""
        results = []
        losses = self._losses(logits, batch["labels"])
        for row, label, loss in zip(logits.float(), batch["labels"], losses, strict=True):
            known = bool((label != IGNORE_INDEX).all() and not label.isnan().any())
            result = self._guess(row) | {"loss_sum": float(loss), "num_targets": int(known)}
            results.append({"label": self._truth(label) if known else None, **result})
        return results

    def _truth(self, label: torch.Tensor) -> Any:
        if self.problem_type == REGRESSION:
            return float(label)
        names = self.settings.labels
        if self.problem_type == MULTI:
            return [name for name, there in zip(names, label.tolist(), strict=True) if there]
        return names[int(label)]

    def _guess(self, logits: torch.Tensor) -> dict[str, Any]:
        """Prediction and probabilities from a row's logits (C,)."""
        if self.problem_type == REGRESSION:
            return {"prediction": float(logits)}
        names, several = self.settings.labels, self.problem_type == MULTI
        values = logits.sigmoid() if several else logits.softmax(-1)
        probabilities = {name: round(float(value), 6) for name, value in zip(names, values, strict=True)}
        if several:
            guess = [name for name, value in zip(names, values.tolist(), strict=True) if value >= THRESHOLD]
            return {"prediction": guess, "probabilities": probabilities}
        return {"prediction": names[int(values.argmax())], "probabilities": probabilities}

    def answer(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Prediction and, for classes, their probabilities."""
        return {key: result[key] for key in ("prediction", "probabilities") if key in result}

    def probe_row(self, text: str) -> dict[str, Any]:
        """The text with some label."""
        label: Any = self.settings.labels[:1]
        return {
            "text": text,
            "label": 0.5 if self.problem_type == REGRESSION else list(label) if self.problem_type == MULTI else label[0],
        }

    def summarise(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Loss and the metrics of the problem type."""
        truth = [result["label"] for result in results]
        guess = [result["prediction"] for result in results]
        loss = {"loss": sum(result["loss_sum"] for result in results) / len(results)}
        if self.problem_type == REGRESSION:
            return loss | _number_metrics(truth, guess)
        names = list(self.settings.labels)
        return loss | (_set_metrics if self.problem_type == MULTI else _class_metrics)(truth, guess, names)

    def resampler(self, results: Sequence[Mapping[str, Any]]) -> Resampler:
        """Loss and the metrics of the problem type, tables aside."""
        truth = [result["label"] for result in results]
        guess = [result["prediction"] for result in results]
        loss = means_of({"loss": [result["loss_sum"] for result in results]})
        if self.problem_type == REGRESSION:
            further = _number_resampler(truth, guess)
        elif self.problem_type == MULTI:
            further = _set_resampler(self._marks(truth), self._marks(guess))
        else:
            wanted, guessed = (torch.tensor([self.label_ids[name] for name in names]) for names in (truth, guess))
            further = _class_resampler(wanted, guessed, len(self.label_ids))
        return lambda counts: loss(counts) | further(counts)

    def _marks(self, rows: Sequence[Sequence[str]]) -> torch.Tensor:
        """0 or 1 for every row and class (N, C)."""
        return column([[int(name in row) for name in self.settings.labels] for row in rows])

    def row_figures(self, results: Sequence[Mapping[str, Any]]) -> list[float]:
        """Whether the class is right, the F1 of the row's classes, or how far the number is off."""
        pairs = [(result["label"], result["prediction"]) for result in results]
        if self.problem_type == REGRESSION:
            return [abs(truth - guess) for truth, guess in pairs]
        if self.problem_type == MULTI:
            return [_row_f1(set(truth), set(guess)) for truth, guess in pairs]
        return [float(truth == guess) for truth, guess in pairs]


def _class_metrics(truth: list[str], guess: list[str], names: list[str]) -> dict[str, Any]:
    """Accuracy, F1, Matthews correlation, a table by class and the confusion matrix."""
    from sklearn import metrics

    return {
        "accuracy": float(metrics.accuracy_score(truth, guess)),
        # Over the classes that occur, as scikit-learn does: a class without rows has no F1 to average.
        "f1_macro": float(metrics.f1_score(truth, guess, average="macro", zero_division=0)),
        "f1_weighted": float(metrics.f1_score(truth, guess, average="weighted", zero_division=0)),
        "mcc": float(metrics.matthews_corrcoef(truth, guess)),
        "by_class": class_table(truth, guess, names, names),
        "confusion": metrics.confusion_matrix(truth, guess, labels=names).tolist(),
    }


def _set_metrics(truth: list[list[str]], guess: list[list[str]], names: list[str]) -> dict[str, Any]:
    """F1 averaged in four ways (over all classes), the share of rows that are right in every class, a table by class.

    `f1_samples`: a row without classes that gets none counts as right.
    """
    from sklearn import metrics

    wanted, found = ([[int(name in row) for name in names] for row in rows] for rows in (truth, guess))
    averages = ("micro", "macro", "weighted")
    f1 = {f"f1_{average}": float(metrics.f1_score(wanted, found, average=average, zero_division=0)) for average in averages}
    return {
        **f1,
        "f1_samples": float(metrics.f1_score(wanted, found, average="samples", zero_division=1)),
        "exact_match": float(metrics.accuracy_score(wanted, found)),
        "by_class": class_table(wanted, found, names, range(len(names))),
    }


def _number_metrics(truth: list[float], guess: list[float]) -> dict[str, Any]:
    """Mean squared and mean absolute error, and both correlations."""
    errors = [mine - theirs for mine, theirs in zip(guess, truth, strict=True)]
    return {
        "mse": math.fsum(error**2 for error in errors) / len(errors),
        "mae": math.fsum(map(abs, errors)) / len(errors),
        **correlations(truth, guess),
    }


def _row_f1(truth: set[str], guess: set[str]) -> float:
    """F1 of a row's classes; 1 where there are none and none were guessed."""
    return 2 * len(truth & guess) / (len(truth) + len(guess)) if truth or guess else 1.0


def _class_resampler(truth: torch.Tensor, guess: torch.Tensor, num_classes: int) -> Resampler:
    """What `_class_metrics` gives, from how often each class is right, guessed and wanted (MCC: Gorodkin 2004)."""

    def resampled(counts: torch.Tensor) -> dict[str, torch.Tensor]:
        right = tallies(counts * (truth == guess), truth, num_classes)
        guessed, wanted = tallies(counts, guess, num_classes), tallies(counts, truth, num_classes)
        total, num_right = counts.sum(1), right.sum(1)
        spreads = (total**2 - guessed.square().sum(1)) * (total**2 - wanted.square().sum(1))
        return {
            "accuracy": num_right / total,
            "f1_macro": macro_f1(right, guessed, wanted),
            "f1_weighted": weighted_f1(right, guessed, wanted),
            "mcc": ratio(num_right * total - (guessed * wanted).sum(1), spreads.sqrt()),
        }

    return resampled


def _set_resampler(truth: torch.Tensor, guess: torch.Tensor) -> Resampler:
    """What `_set_metrics` gives, from 0 and 1 of every row and class (N, C)."""
    both = truth * guess
    of_rows = torch.where((truth + guess).sum(1) > 0, f1_of(both.sum(1), guess.sum(1), truth.sum(1)), 1.0)
    means = means_of({"f1_samples": of_rows.tolist(), "exact_match": (truth == guess).all(1).double().tolist()})

    def resampled(counts: torch.Tensor) -> dict[str, torch.Tensor]:
        right, guessed, wanted = (counts @ marks for marks in (both, guess, truth))
        return {
            "f1_micro": f1_of(right.sum(1), guessed.sum(1), wanted.sum(1)),
            "f1_macro": f1_of(right, guessed, wanted).mean(1),
            "f1_weighted": weighted_f1(right, guessed, wanted),
        } | means(counts)

    return resampled


def _number_resampler(truth: list[float], guess: list[float]) -> Resampler:
    """What `_number_metrics` gives."""
    errors = [mine - theirs for mine, theirs in zip(guess, truth, strict=True)]
    means = means_of({"mse": [error**2 for error in errors], "mae": [abs(error) for error in errors]})
    both = correlations_of(truth, guess)
    return lambda counts: means(counts) | both(counts)
