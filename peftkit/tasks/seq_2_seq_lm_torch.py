"""SEQ_2_SEQ_LM on tensors: the encoder reads the prompt, the labels are the completion and its end token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peftkit.formats.base import RowError
from peftkit.tasks.example import IGNORE_INDEX, Batch, Example, LogitsOf, View, fit_length
from peftkit.tasks.language_torch import flat_messages, score_tokens, summarise_tokens, token_loss_sum, token_resampler
from peftkit.tasks.resampling_torch import Resampler
from peftkit.tasks.runtime_torch import BaseRuntime, check_ids, pad, pad_inputs


class Runtime(BaseRuntime):
    """See `peftkit.tasks.example.Runtime`. The model shifts the labels into decoder inputs by itself."""

    def encode_row(self, row: Mapping[str, Any], origin: str, target: bool) -> list[Example]:
        """`max_length` holds for the source and for the target, each; what is cut keeps its end token."""
        ids, labels = self._as_stated(row, target) if "input_ids" in row else self._texts(row, target)
        num_tokens = max(len(ids), len(labels))
        if not fit_length(num_tokens, self.settings):
            return []
        ids, labels = self._cut(ids), self._cut(labels)
        return [Example({"input_ids": ids}, labels, sum(label != IGNORE_INDEX for label in labels), origin, num_tokens)]

    def _texts(self, row: Mapping[str, Any], target: bool) -> tuple[list[int], list[int]]:
        source, answer = flat_messages(row, target) if "messages" in row else (row["prompt"], row.get("completion", ""))
        ids: list[int] = self.tokenizer(self.settings.source_prefix + source)["input_ids"]
        return ids, self._answer(answer) if target else []

    def _as_stated(self, row: Mapping[str, Any], target: bool) -> tuple[list[int], list[int]]:
        """A pre-tokenised row."""
        ids, labels = check_ids(row["input_ids"], self.tokenizer), list(row["labels"]) if target else []
        check_ids([label for label in labels if label != IGNORE_INDEX], self.tokenizer, "labels")
        if target and all(label == IGNORE_INDEX for label in labels):
            raise RowError("no token is left to learn: every label is -100")
        return ids, labels

    def _cut(self, ids: list[int]) -> list[int]:
        """At most max_length tokens, without their beginning or end as `truncation` says; end tokens stay."""
        limit = self.settings.max_length
        if len(ids) <= limit:
            return ids
        if self.settings.truncation == "left":
            return ids[-limit:]
        special = set(self.tokenizer.all_special_ids)  # some tokenizers put a language code after the end token
        num_end = next((count for count, token in enumerate(reversed(ids)) if token not in special), 0)
        return [*ids[: limit - num_end], *ids[len(ids) - num_end :]]

    def _answer(self, completion: str) -> list[int]:
        ids: list[int] = self.tokenizer(text_target=completion)["input_ids"]
        # Without an end to learn, an answer would never stop; some tokenizers put a language code after it.
        return ids if self.tokenizer.eos_token_id in ids else [*ids, self.tokenizer.eos_token_id]

    def views(self, example: Example) -> list[View]:
        """What the encoder reads, and what the decoder learns to write."""
        ids, target = example.inputs["input_ids"], [label for label in example.labels if label != IGNORE_INDEX]
        return [View("source", ids, [0.0] * len(ids)), View("target", target, [1.0] * len(target))]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Right-padded input_ids and attention_mask (B, S), labels (B, T)."""
        labels = [example.labels for example in examples]
        batch = pad_inputs(self.tokenizer, examples)
        return batch | ({"labels": pad(labels, IGNORE_INDEX)} if any(labels) else {})

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits (B, T, V) of the decoder; the labels make its inputs."""
        logits: torch.Tensor = model(**self.inputs(model, batch)).logits
        return logits

    def inputs(self, model: Any, batch: Batch) -> dict[str, Any]:
        """Decoder inputs in place of the labels, where the model's class can make them: it would take a loss of labels."""
        inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"} | {"use_cache": False}
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            return inputs | {"labels": batch["labels"]}
        return inputs | {"decoder_input_ids": shift(labels=batch["labels"])}

    def align(self, outputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoder position t predicts label t."""
        return outputs, labels

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum over the targets; decoder position t predicts label t. Logits (B, T, V), labels (B, T)."""
        return token_loss_sum(logits, labels, label_smoothing)

    def score(self, logits: torch.Tensor, batch: Batch, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Token results per row."""
        return self.score_states(logits, batch, lambda part: part)

    def score_states(self, states: torch.Tensor, batch: Batch, logits_of: LogitsOf) -> list[dict[str, Any]]:
        """Token results per row."""
        return score_tokens(states, batch["labels"], self.tokenizer, logits_of)

    def generation_batch(self, examples: Sequence[Example]) -> Batch:
        """Right-padded prompts for the encoder."""
        return pad_inputs(self.tokenizer, examples)

    def new_tokens(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The decoder's whole output."""
        return output

    def summarise(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Loss, perplexity, token accuracy."""
        return summarise_tokens(results)

    def resampler(self, results: Sequence[Mapping[str, Any]]) -> Resampler:
        """See `token_resampler`."""
        return token_resampler(results)

    def probe_row(self, text: str) -> dict[str, Any]:
        """A text and the same as its answer."""
        return {"prompt": text, "completion": text}
