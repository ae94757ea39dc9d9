"""SEQ_CLS on tensors: one target per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from peftkit.formats.base import RowError
from peftkit.tasks.base import IGNORE_INDEX, Batch, Encoding, Example, fit_length
from peftkit.tasks.language_torch import pad_inputs


class Runtime:
    """See `peftkit.tasks.base.Runtime`."""

    def __init__(self, tokenizer: Any, settings: Encoding) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.label_ids = {name: number for number, name in enumerate(settings.labels)}

    def encode(self, row: Mapping[str, Any], origin: str, *, target: bool = True) -> Example | None:
        """Token ids of the text (or pair) and the number of its label."""
        label = self._label_id(row["label"]) if target else IGNORE_INDEX
        encoded = self.tokenizer(row["text"], row.get("text_pair"))
        num_tokens = len(encoded["input_ids"])
        if fit_length(num_tokens, self.settings) is None:
            return None
        if num_tokens > self.settings.max_length:
            encoded = self._cut(row)  # by the tokenizer, which keeps the special tokens at both ends
        inputs = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        return Example(inputs, label, 1, origin, num_tokens)

    def _cut(self, row: Mapping[str, Any]) -> Any:
        side, self.tokenizer.truncation_side = self.tokenizer.truncation_side, self.settings.truncation
        encoded = self.tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=self.settings.max_length)
        self.tokenizer.truncation_side = side
        return encoded

    def _label_id(self, label: str | int) -> int:
        name = str(label)
        if name not in self.label_ids:
            raise RowError(f"the label {label!r} is not among the classes: {', '.join(self.settings.labels)}")
        return self.label_ids[name]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Right-padded inputs (B, T) and labels (B,)."""
        return pad_inputs(self.tokenizer, examples) | {"labels": torch.tensor([example.labels for example in examples])}

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits (B, C)."""
        logits: torch.Tensor = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        return logits

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum of cross-entropy over rows that have a label. Logits (B, C), labels (B,)."""
        wanted = labels != IGNORE_INDEX
        return functional.cross_entropy(
            logits[wanted].float(), labels[wanted], reduction="sum", label_smoothing=label_smoothing
        )

    def score(self, logits: torch.Tensor, batch: Batch, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Prediction, probabilities, and the loss where the label is known."""
        losses = functional.cross_entropy(logits.float(), batch["labels"], reduction="none", ignore_index=IGNORE_INDEX)
        probabilities = logits.float().softmax(-1)
        names = self.settings.labels
        return [
            {
                "label": names[int(label)] if label != IGNORE_INDEX else None,
                "prediction": names[int(row.argmax())],
                "probabilities": {name: round(float(value), 6) for name, value in zip(names, row, strict=True)},
                "loss_sum": float(loss),
                "num_targets": int(label != IGNORE_INDEX),
            }
            for row, label, loss in zip(probabilities, batch["labels"], losses, strict=True)
        ]

    def generation_batch(self, examples: Sequence[Example]) -> Batch:
        """Classifiers generate nothing."""
        raise TypeError("SEQ_CLS generates no text")

    def new_tokens(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Classifiers generate nothing."""
        raise TypeError("SEQ_CLS generates no text")

    def summarise(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Loss, accuracy, F1, Matthews correlation, a table by class and the confusion matrix."""
        from sklearn import metrics

        names = list(self.settings.labels)
        truth = [result["label"] for result in results]
        guess = [result["prediction"] for result in results]
        precision, recall, f1, support = metrics.precision_recall_fscore_support(truth, guess, labels=names, zero_division=0)
        by_class = {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "num_rows": int(n)}
            for name, p, r, f, n in zip(names, precision, recall, f1, support, strict=True)
        }
        return {
            "loss": sum(result["loss_sum"] for result in results) / len(results),
            "accuracy": float(metrics.accuracy_score(truth, guess)),
            # Over the classes that occur, as scikit-learn does: a class without rows has no F1 to average.
            "f1_macro": float(metrics.f1_score(truth, guess, average="macro", zero_division=0)),
            "f1_weighted": float(metrics.f1_score(truth, guess, average="weighted", zero_division=0)),
            "mcc": float(metrics.matthews_corrcoef(truth, guess)),
            "by_class": by_class,
            "confusion": metrics.confusion_matrix(truth, guess, labels=names).tolist(),
        }
