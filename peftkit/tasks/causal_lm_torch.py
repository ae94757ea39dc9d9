"""CAUSAL_LM on tensors: which tokens are learned, found by rendering the chat template and never guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peftkit.formats.base import RowError
from peftkit.tasks.base import IGNORE_INDEX, Batch, Example, fit_length
from peftkit.tasks.language_torch import score_tokens, strip_end, summarise_tokens, token_loss_sum
from peftkit.tasks.runtime_torch import BaseRuntime, pad, pad_inputs

# For tokenizers without a template; stored with the adapter, so that inference renders the same.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


def default_chat_template(tokenizer: Any) -> str:
    """The template for a tokenizer without one; it starts with BOS where the tokenizer starts every text with it."""
    first = tokenizer("a")["input_ids"][:1]
    starts_with_bos = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return "{{ bos_token }}" * starts_with_bos + DEFAULT_CHAT_TEMPLATE


class Runtime(BaseRuntime):
    """See `peftkit.tasks.base.Runtime`."""

    def encode_row(self, row: Mapping[str, Any], origin: str, target: bool) -> Example | None:
        """Tokens and labels; labels are aligned with the tokens (not shifted)."""
        if "messages" in row:
            ids, labels = self._chat(row["messages"], target)
        elif "prompt" in row:
            ids, labels = self._prompt_completion(row, target)
        else:
            ids = self.tokenizer(row["text"])["input_ids"]
            ids = (
                strip_end(ids, self.tokenizer) if not target else [*strip_end(ids, self.tokenizer), self.tokenizer.eos_token_id]
            )
            labels = list(ids)
        if self.settings.train_on == "all":
            labels = list(ids)
        num_tokens = len(ids)
        kept = fit_length(num_tokens, self.settings)
        if kept is None:
            return None
        ids, labels = ids[kept], labels[kept]
        # The first token is never predicted: its label is not a target.
        num_targets = sum(label != IGNORE_INDEX for label in labels[1:])
        if target and num_targets == 0:
            raise RowError(f"no token is left to learn ({num_tokens} tokens, max_length {self.settings.max_length})")
        return Example({"input_ids": ids}, labels, num_targets, origin, num_tokens)

    def _prompt_completion(self, row: Mapping[str, Any], target: bool) -> tuple[list[int], list[int]]:
        prompt = strip_end(self.tokenizer(row["prompt"])["input_ids"], self.tokenizer)
        if not target:
            return prompt, [IGNORE_INDEX] * len(prompt)
        answer = self.tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
        return prompt + answer, [IGNORE_INDEX] * len(prompt) + answer

    def _chat(self, messages: Sequence[Mapping[str, Any]], target: bool) -> tuple[list[int], list[int]]:
        if not target:
            ids = self._render(messages, add_generation_prompt=True)
            return ids, [IGNORE_INDEX] * len(ids)
        ids = self._render(messages)
        labels = [IGNORE_INDEX] * len(ids)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end = self._turn(messages, number, ids)
                labels[start:end] = ids[start:end]
        return ids, labels

    def _render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> list[int]:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template raises whatever it likes, most often jinja2.TemplateError
            raise RowError(f"the chat template refuses these messages: {error}") from error
        # The template writes the special tokens itself: adding them again would double the BOS.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _turn(self, messages: Sequence[Mapping[str, Any]], number: int, ids: list[int]) -> tuple[int, int]:
        """Start and end of an assistant turn, proven: both renderings must be prefixes of the whole, token by token."""
        before = self._render(messages[:number], add_generation_prompt=True)
        through = self._render(messages[: number + 1])
        if ids[: len(before)] != before or ids[: len(through)] != through:
            raise RowError(
                f"the tokens of assistant turn {number + 1} cannot be told from the rest: the chat template renders the "
                "beginning of the conversation differently from the whole; set `train_on: all` or another `model.chat_template`"
            )
        return len(before), self._end_of_turn(through, len(before))

    def _end_of_turn(self, through: list[int], start: int) -> int:
        """The end of the turn, without the white space that a template writes after its end token."""
        special = set(self.tokenizer.all_special_ids)
        last = next((place for place in range(len(through) - 1, start - 1, -1) if through[place] in special), None)
        if last is None or self.tokenizer.decode(through[last + 1 :]).strip():
            return len(through)
        return last + 1

    def labels_tensor(self, examples: Sequence[Example]) -> torch.Tensor:
        """Right-padded labels (B, T)."""
        return pad([example.labels for example in examples], IGNORE_INDEX)

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits (B, T, V)."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
        return logits

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum over the targets; position t predicts token t + 1. Logits (B, T, V), labels (B, T)."""
        return token_loss_sum(logits[:, :-1], labels[:, 1:], label_smoothing)

    def score(self, logits: torch.Tensor, batch: Batch, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Token results per row."""
        return score_tokens(logits[:, :-1], batch["labels"][:, 1:], self.tokenizer)

    def generation_batch(self, examples: Sequence[Example]) -> Batch:
        """Left-padded prompts: the answer starts right after them."""
        return pad_inputs(self.tokenizer, examples, side="left")

    def new_tokens(self, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What comes after the prompts."""
        return output[:, batch["input_ids"].shape[1] :]

    def summarise(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Loss, perplexity, token accuracy."""
        return summarise_tokens(results)

    def probe_row(self, text: str) -> dict[str, Any]:
        """A text and the same as its continuation."""
        return {"prompt": text, "completion": text}
