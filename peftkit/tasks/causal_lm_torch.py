"""CAUSAL_LM on tensors: which tokens are learned, found exactly and never guessed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peftkit.formats.base import CanonicalRow, RowError
from peftkit.formats.pretokenized import check_aligned
from peftkit.tasks.chat import ChatRenderer
from peftkit.tasks.encoding import Encoding
from peftkit.tasks.example import IGNORE_INDEX, Batch, Example, LogitsOf, View, fit_length
from peftkit.tasks.language_torch import (
    join_weights,
    score_tokens,
    strip_end,
    summarise_tokens,
    token_loss_sum,
    token_resampler,
)
from peftkit.tasks.resampling_torch import Resampler
from peftkit.tasks.runtime_torch import BaseRuntime, check_ids, pad, pad_inputs


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """A row's tokens, the weight of each (0: not learned), and what the audit should tell of it."""

    ids: list[int]
    weights: list[float]
    notes: tuple[str, ...] = ()


class Runtime(BaseRuntime):
    """See `peftkit.tasks.example.Runtime`; labels are of shape (B, T), or (B, T, 2) where tokens have weights."""

    def __init__(self, tokenizer: Any, settings: Encoding) -> None:
        super().__init__(tokenizer, settings)
        self.chat = ChatRenderer(tokenizer, settings)

    def encode_row(self, row: Mapping[str, Any], origin: str, target: bool) -> list[Example]:
        """Tokens and labels; labels are aligned with the tokens (not shifted). Parts without anything to learn are left out."""
        tokens = self._tokens(row) if target else self._prompt(row)
        if not tokens.ids:
            raise RowError("there is no token in it")
        examples = [self._example(tokens, kept, origin) for kept in fit_length(len(tokens.ids), self.settings)]
        learned = [example for example in examples if example.num_targets or not target]
        if examples and not learned:
            raise RowError(f"no token is left to learn ({len(tokens.ids)} tokens, max_length {self.settings.max_length})")
        return learned

    def _example(self, tokens: _Tokens, kept: slice, origin: str) -> Example:
        ids, weights = tokens.ids[kept], tokens.weights[kept]
        labels = [token if weight else IGNORE_INDEX for token, weight in zip(ids, weights, strict=True)]
        plain = all(weight in (0.0, 1.0) for weight in weights)
        # The first token is never predicted: its label is not a target.
        num_targets = sum(label != IGNORE_INDEX for label in labels[1:]) if plain else sum(weights[1:])
        return Example(
            {"input_ids": ids},
            labels,
            num_targets,
            origin,
            len(tokens.ids),
            weights=None if plain else weights,
            notes=tokens.notes,
        )

    def _prompt(self, row: Mapping[str, Any]) -> _Tokens:
        """What a model is asked with."""
        if "messages" in row:
            ids = self.chat.ids(self.chat.prompt(row))
        elif "input_ids" in row:
            ids = check_ids(row["input_ids"], self.tokenizer)
        elif "segments" in row:
            ids = [token for part in row["segments"] for token in self._piece(part["text"])]
        else:
            ids = self._start(row.get("prompt", row.get("text", "")))
        return _Tokens(ids, [0.0] * len(ids))

    def _tokens(self, row: Mapping[str, Any]) -> _Tokens:
        conversation = _conversation(row)
        if conversation is not None:
            rendered = self.chat.conversation(conversation)
            return _Tokens(rendered.ids, rendered.weights, rendered.notes)
        if self.settings.train_on == "assistant":
            raise RowError("the row has no assistant turns, which `train_on: assistant` is about")
        if "input_ids" in row or "segments" in row:
            return self._as_stated(row)
        if "prompt" in row:
            prompt, answer = self._start(row["prompt"]), [*self._piece(row["completion"]), self.tokenizer.eos_token_id]
            learned = float(self.settings.train_on == "all")
            return _Tokens(prompt + answer, [learned] * len(prompt) + [1.0] * len(answer))
        ids = [*self._start(row["text"]), self.tokenizer.eos_token_id]
        return _Tokens(ids, [1.0] * len(ids))

    def _as_stated(self, row: Mapping[str, Any]) -> _Tokens:
        """Rows that say themselves what is learned: pre-tokenised ones, and those of segments."""
        if self.settings.train_on != "completion":
            raise RowError(f"the row itself says what is learned: `train_on: {self.settings.train_on}` has no effect")
        if "input_ids" in row:
            check_aligned(dict(row))
            ids = check_ids(row["input_ids"], self.tokenizer)
            return _Tokens(ids, [float(label != IGNORE_INDEX) for label in row["labels"]])
        pieces = [(self._piece(part["text"]), float(part["train"])) for part in row["segments"]]
        return _Tokens(
            [token for ids, _ in pieces for token in ids], [weight for ids, weight in pieces for _ in range(len(ids))]
        )

    def _start(self, text: str) -> list[int]:
        """Tokens of a text that begins an example; one that writes BOS itself gets no second one."""
        ids = strip_end(self.tokenizer(text)["input_ids"], self.tokenizer)
        bos = self.tokenizer.bos_token_id
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def _piece(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def rendering(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Token ids and, of a conversation, what the template writes with and without its end."""
        conversation = _conversation(row)
        if conversation is None:
            return super().rendering(row)
        rendered = self.chat.conversation(conversation)
        asked = _asked(conversation)
        prompts = {"generation_prompt": self.chat.prompt(asked)} if asked["messages"] else {}
        return {"text": rendered.text, **prompts, "input_ids": [rendered.ids]}

    def views(self, example: Example) -> list[View]:
        """The tokens; the first one is never a target."""
        learned = example.weights or [float(label != IGNORE_INDEX) for label in example.labels]
        return [View("", example.inputs["input_ids"], [0.0, *learned[1:]])]

    def labels_tensor(self, examples: Sequence[Example]) -> torch.Tensor:
        """Right-padded labels (B, T), or with weights (B, T, 2)."""
        return join_weights(pad([example.labels for example in examples], IGNORE_INDEX), examples)

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits (B, T, V)."""
        logits: torch.Tensor = model(**self.inputs(model, batch)).logits
        return logits

    def inputs(self, model: Any, batch: Batch) -> dict[str, Any]:
        """All but the labels, which the model would take a loss of."""
        return {name: tensor for name, tensor in batch.items() if name != "labels"} | {"use_cache": False}

    def align(self, outputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Position t predicts token t + 1."""
        return outputs[:, :-1], labels[:, 1:]

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum over the targets. Logits (B, T, V)."""
        return token_loss_sum(*self.align(logits, labels), label_smoothing)

    def score(self, logits: torch.Tensor, batch: Batch, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Token results per row."""
        return self.score_states(logits, batch, lambda part: part)

    def score_states(self, states: torch.Tensor, batch: Batch, logits_of: LogitsOf) -> list[dict[str, Any]]:
        """Token results per row."""
        return score_tokens(*self.align(states, batch["labels"]), self.tokenizer, logits_of)

    def generation_batch(self, examples: Sequence[Example]) -> Batch:
        """Left-padded prompts: the answer starts right after them."""
        return pad_inputs(self.tokenizer, examples, side="left")

    def new_tokens(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What comes after the prompts."""
        return output[:, batch["input_ids"].shape[1] :]

    def summarise(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Loss, perplexity, token accuracy."""
        return summarise_tokens(results)

    def resampler(self, results: Sequence[Mapping[str, Any]]) -> Resampler:
        """See `token_resampler`."""
        return token_resampler(results)

    def probe_row(self, text: str) -> dict[str, Any]:
        """A text and the same as its continuation."""
        return {"prompt": text, "completion": text}


def _conversation(row: Mapping[str, Any]) -> CanonicalRow | None:
    """The row as a conversation, if it is one; of a preference the chosen one."""
    if "messages" in row:
        return dict(row)
    return {"messages": row["chosen"], "tools": row.get("tools")} if "chosen" in row else None


def _asked(row: CanonicalRow) -> CanonicalRow:
    """The conversation without its last answer."""
    messages = row["messages"]
    return row | {"messages": messages[:-1] if messages[-1]["role"] == "assistant" else messages}
