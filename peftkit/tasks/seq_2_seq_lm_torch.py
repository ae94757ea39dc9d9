"""SEQ_2_SEQ_LM on tensors: the encoder reads the prompt, the labels are the completion and its end token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peftkit.tasks.base import IGNORE_INDEX, Batch, Example, fit_length
from peftkit.tasks.language_torch import flat_messages, score_tokens, summarise_tokens, token_loss_sum
from peftkit.tasks.runtime_torch import BaseRuntime, pad, pad_inputs


class Runtime(BaseRuntime):
    """See `peftkit.tasks.base.Runtime`. The model shifts the labels into decoder inputs by itself."""

    def encode_row(self, row: Mapping[str, Any], origin: str, target: bool) -> Example | None:
        """`max_length` holds for the prompt and for the completion, each."""
        prompt, completion = flat_messages(row["messages"]) if "messages" in row else (row["prompt"], row.get("completion", ""))
        ids = self.tokenizer(prompt)["input_ids"]
        labels = self._answer(completion) if target else []
        num_tokens = max(len(ids), len(labels))
        kept = fit_length(num_tokens, self.settings)
        if kept is None:
            return None
        ids, labels = ids[kept], labels[kept]
        return Example({"input_ids": ids}, labels, len(labels), origin, num_tokens)

    def _answer(self, completion: str) -> list[int]:
        ids: list[int] = self.tokenizer(text_target=completion)["input_ids"]
        # Without an end to learn, an answer would never stop; some tokenizers put a language code after it.
        return ids if self.tokenizer.eos_token_id in ids else [*ids, self.tokenizer.eos_token_id]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Right-padded input_ids and attention_mask (B, S), labels (B, T)."""
        labels = [example.labels for example in examples]
        batch = pad_inputs(self.tokenizer, examples)
        return batch | ({"labels": pad(labels, IGNORE_INDEX)} if any(labels) else {})

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits (B, T, V) of the decoder; the labels make its inputs."""
        logits: torch.Tensor = model(**batch, use_cache=False).logits
        return logits

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum over the targets; decoder position t predicts label t. Logits (B, T, V), labels (B, T)."""
        return token_loss_sum(logits, labels, label_smoothing)

    def score(self, logits: torch.Tensor, batch: Batch, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Token results per row."""
        return score_tokens(logits, batch["labels"], self.tokenizer)

    def generation_batch(self, examples: Sequence[Example]) -> Batch:
        """Right-padded prompts for the encoder."""
        return pad_inputs(self.tokenizer, examples)

    def new_tokens(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The decoder's whole output."""
        return output

    def summarise(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Loss, perplexity, token accuracy."""
        return summarise_tokens(results)

    def probe_row(self, text: str) -> dict[str, Any]:
        """A text and the same as its answer."""
        return {"prompt": text, "completion": text}
