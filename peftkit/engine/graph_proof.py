"""Whether exported files answer as the adapter on its base does: all outputs, or token by token with cached keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from peftkit.engine.adapter import base_of_adapted
from peftkit.engine.graph_clients import DecodingClient, Session
from peftkit.engine.graphs import examples_batch
from peftkit.exports.base import Check, Material
from peftkit.tasks.example import Example

NUM_TOKENS = 8


@dataclass
class Tally:
    """How far numbers are from those expected, and how often the likeliest choice is the same."""

    worst: float = 0.0
    scale: float = 1.0
    same: int = 0
    number: int = 0

    def add(self, expected: np.ndarray, found: np.ndarray) -> None:
        """Compare arrays of one shape; a number that is not finite is as far off as can be."""
        difference = float(np.abs(expected - found).max())
        self.worst = max(self.worst, difference if np.isfinite(difference) else np.inf)
        self.scale = max(self.scale, float(np.abs(expected).max()))

    def count(self, same: np.ndarray) -> None:
        """Choices that are the same, or not."""
        self.same, self.number = self.same + int(same.sum()), self.number + same.size

    def check(self, client: str, what: str, relative: float | None, *, passed: bool = True) -> Check:
        """What a client's answers are worth.

        Args:
            client: program and version.
            what: says what was compared, with a place for the share of same choices.
            relative: largest allowed difference over the largest number; None: any that is finite.
            passed: what else was found.
        """
        detail = f"{what.format(same=self.same, number=self.number)} differ by at most {self.worst:.3g}"
        numbers = {"max_abs_diff": self.worst} | ({"agreement": self.same / self.number} if self.number else {})
        if relative is None:
            return Check(client, bool(np.isfinite(self.worst)), detail, numbers)
        tolerance = relative * self.scale
        detail += f" (allowed {tolerance:.3g})"
        return Check(client, passed and self.worst <= tolerance, detail, numbers | {"tolerance": tolerance})


@torch.no_grad()
def check_outputs(model: nn.Module, material: Material, session: Session, relative: float | None) -> Check:
    """The check of a file that needs one pass: fixed rows, alone and together, padded as the task has it.

    Args:
        model: the adapter on its base.
        material: the task's rows.
        session: the file.
        relative: largest allowed difference of a number over the largest one; None: any.
    """
    tally, examples, outputs = Tally(), material.examples(), ""
    for rows in (examples[:1], examples[1:], examples):
        batch = examples_batch(material.runtime, rows)
        expected = material.runtime.graph_outputs(model, batch)
        found = session({name: tensor.numpy() for name, tensor in batch.items()})
        seen = batch["attention_mask"].numpy().astype(bool)
        for name, tensor in expected.items():
            one, other = tensor.numpy(), found[name].astype(np.float32)
            if one.shape[:2] == seen.shape:  # of tokens: those of padding mean nothing
                one, other = one[seen], other[seen]
            tally.add(one, other)
            if name == "logits":
                tally.count(one.argmax(-1) == other.argmax(-1))
        outputs = " and ".join(expected)
    choices = " ({same} of {number} likeliest classes are the same)" if tally.number else ""
    what = f"{outputs} of {len(examples)} rows, alone and padded{choices},"
    return tally.check(session.client, what, relative)


@dataclass(frozen=True)
class Answer:
    """What a model without any cache goes on with after a prompt.

    Attributes:
        prompt: token ids.
        tokens: the likeliest ones, (T,).
        logits: by which they were chosen, (T, V).
    """

    prompt: list[int]
    tokens: np.ndarray
    logits: np.ndarray


@torch.no_grad()
def answers_of(model: nn.Module, material: Material) -> list[Answer]:
    """What the adapter on its base goes on with after some prompts, each alone, by whole passes without a cache."""
    longest = max(example.length for example in material.examples())
    settings = dataclasses.replace(material.runtime.settings, truncation="right", max_length=longest)
    cut: Any = type(material.runtime)
    runtime = cut(material.runtime.tokenizer, settings)
    prompts = [example for row in runtime.probe_rows() for example in runtime.encode(row, "probe", target=False)]
    return [_answer(model, example) for example in prompts]


def _answer(model: nn.Module, example: Example) -> Answer:
    config: Any = base_of_adapted(model).config
    prompt, logits = list(example.inputs["input_ids"]), []
    tokens: list[int] = []
    for _ in range(NUM_TOKENS):
        if config.is_encoder_decoder:
            ids, own = torch.tensor([prompt]), {"decoder_input_ids": torch.tensor([[config.decoder_start_token_id, *tokens]])}
        else:
            ids, own = torch.tensor([prompt + tokens]), {}
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **own)
        logits.append(output.logits[0, -1].float().numpy())
        tokens.append(int(logits[-1].argmax()))
    return Answer(prompt, np.array(tokens), np.stack(logits))


def check_answers(expected: Sequence[Answer], client: DecodingClient, relative: float | None) -> Check:
    """The check of files that generate text, alone and padded: the same tokens, and logits as long as they are.

    Args:
        expected: of the adapter on its base, without a cache.
        client: the files, with their cache.
        relative: largest allowed difference of a logit over the largest logit; None: any.
    """
    tally, gaps = Tally(), [0.0]
    for group in (expected[:1], expected):
        tokens, logits = client.continuations([part.prompt for part in group], NUM_TOKENS)
        for part, own_tokens, own_logits in zip(group, tokens, logits, strict=True):
            same = (part.tokens == own_tokens).cumprod().astype(bool)  # behind the first other one all is another text
            length = int(same.sum())
            tally.add(part.logits[: length + 1], own_logits[: length + 1])
            tally.count(same)
            if length < NUM_TOKENS:
                choices = part.logits[length]
                gaps.append(float(choices[part.tokens[length]] - choices[own_tokens[length]]))
    # Where another token was chosen, both were as likely as the allowed difference can tell.
    is_tie = relative is not None and max(gaps) <= 2 * relative * tally.scale
    what = "{same} of {number} greedy tokens with a cache are those without; logits"
    return tally.check(client.later.client, what, relative, passed=is_tie)


def with_metrics(check: Check, before: Mapping[str, float], after: Mapping[str, float]) -> Check:
    """A check that tells the task's metrics too, from before and after quantisation."""
    numbers = {f"{name}_{when}": values[name] for when, values in (("before", before), ("after", after)) for name in values}
    told = ", ".join(f"{name} {before[name]:.4g} -> {after[name]:.4g}" for name in before)
    return dataclasses.replace(check, detail=f"{check.detail}; {told}", numbers={**check.numbers, **numbers})
