"""Whether exported files answer as the adapter on its base does: all outputs, or token by token with cached keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from peftkit.engine.graph_clients import DecodingClient, Session
from peftkit.engine.adapter import base_of_adapted
from peftkit.engine.graphs import examples_batch
from peftkit.exports.base import Check, Material
from peftkit.tasks.example import Batch, Example

NUM_TOKENS = 8


@dataclass(frozen=True)
class Answers:
    """What a model without any cache goes on with after a prompt.

    Attributes:
        prompt: token ids.
        tokens: the likeliest ones, (T,).
        logits: by which they were chosen, (T, V).
    """

    prompt: list[int]
    tokens: np.ndarray
    logits: np.ndarray


def batches_of(material: Material) -> list[Batch]:
    """Fixed rows alone and together, padded as the task has it."""
    examples = material.examples()
    return [examples_batch(material.runtime, part) for part in ([examples[0]], examples[1:], examples)]


@torch.no_grad()
def check_outputs(model: nn.Module, material: Material, session: Session, relative: float | None) -> Check:
    """The check of a file that needs one pass.

    Args:
        model: the adapter on its base.
        material: the task's rows.
        session: the file.
        relative: largest allowed difference of an output over its largest number; None: any.
    """
    worst, allowed, agreed, number = 0.0, 0.0, 0, 0
    batches = batches_of(material)
    for batch in batches:
        expected = material.runtime.graph_outputs(model, batch)
        found = session({name: tensor.numpy() for name, tensor in batch.items()})
        for name, tensor in expected.items():
            one, other = tensor.numpy(), found[name].astype(np.float32)
            if one.ndim > 2 or name.endswith("_logits"):  # of tokens: padding says nothing
                seen = batch["attention_mask"].numpy().astype(bool)
                one, other = one[seen], other[seen]
            difference = float(np.abs(one - other).max())
            scale = max(1.0, float(np.abs(one).max()))
            worst, allowed = max(worst, difference if np.isfinite(difference) else np.inf), max(allowed, scale)
            if name == "logits":
                agreed += int((one.argmax(-1) == other.argmax(-1)).sum())
                number += one.shape[0]
    tolerance = allowed * relative if relative is not None else np.inf
    what = " and ".join(expected)
    detail = f"{what} of {len(batches[-1]['input_ids'])} rows, alone and padded, differ by at most {worst:.3g}"
    detail += f" (allowed {tolerance:.3g})" if relative is not None else ""
    numbers = {"max_abs_diff": worst} | ({"tolerance": tolerance} if relative is not None else {})
    if relative is None and number:
        detail += f"; the likeliest class is the same {agreed} times of {number}"
        numbers |= {"agreement": agreed / number}
    return Check(session.client, bool(worst <= tolerance and np.isfinite(worst)), detail, numbers)


@torch.no_grad()
def answers_of(model: nn.Module, material: Material, num_tokens: int = NUM_TOKENS) -> list[Answers]:
    """What the adapter on its base goes on with after some prompts, each alone, by whole passes without a cache."""
    return [_answers(model, example, num_tokens) for example in prompts_of(material)]


def prompts_of(material: Material) -> list[Example]:
    """Fixed prompts of several lengths."""
    runtime, longest = material.runtime, max(example.length for example in material.examples())
    cut = type(runtime)(  # type: ignore[call-arg]
        runtime.tokenizer, dataclasses.replace(runtime.settings, truncation="right", max_length=longest)
    )
    return [example for row in cut.probe_rows() for example in cut.encode(row, "probe", target=False)]


def _answers(model: nn.Module, example: Example, num_tokens: int) -> Answers:
    config: Any = base_of_adapted(model).config
    prompt = list(example.inputs["input_ids"])
    tokens: list[int] = []
    logits = []
    for _ in range(num_tokens):
        if config.is_encoder_decoder:
            ids = torch.tensor([prompt])
            own: Any = {"decoder_input_ids": torch.tensor([[config.decoder_start_token_id, *tokens]])}
        else:
            ids, own = torch.tensor([prompt + tokens]), {}
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **own)
        logits.append(output.logits[0, -1].float().numpy())
        tokens.append(int(logits[-1].argmax()))
    return Answers(prompt, np.array(tokens), np.stack(logits))


def check_answers(expected: Sequence[Answers], client: DecodingClient, relative: float | None) -> Check:
    """The check of files that generate text: the same tokens, and logits within a tolerance as long as they are.

    Args:
        expected: of the adapter on its base, without a cache.
        client: the files, with their cache.
        relative: largest allowed difference of a logit over the largest logit; None: any.
    """
    scale = max(1.0, *(float(np.abs(part.logits).max()) for part in expected))
    tolerance = np.inf if relative is None else relative * scale
    worst, same, number, all_same = 0.0, 0, 0, True
    for rows in ([part] for part in expected[:1]), (expected,):
        for group in rows:
            tokens, logits = client.continuations([part.prompt for part in group], len(group[0].tokens))
            for part, own_tokens, own_logits in zip(group, tokens, logits, strict=True):
                length = _common(part.tokens, own_tokens)
                difference = float(np.abs(part.logits[: length + 1] - own_logits[: length + 1]).max())
                worst = max(worst, difference if np.isfinite(difference) else np.inf)
                same, number = same + length, number + len(own_tokens)
                all_same &= _is_tie(part, own_tokens, length, tolerance)
    detail = f"{same} of {number} greedy tokens with a cache are those without; logits differ by at most {worst:.3g}"
    detail += f" (allowed {tolerance:.3g})" if relative is not None else ""
    numbers = {"max_abs_diff": worst, "tokens": float(number), "agreement": same / number}
    numbers |= {"tolerance": float(tolerance)} if relative is not None else {}
    passed = bool(np.isfinite(worst) and worst <= tolerance and (all_same or relative is None))
    return Check(client.later.client, passed, detail, numbers)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many first tokens are the same."""
    differing = np.nonzero(one != other)[0]
    return int(differing[0]) if len(differing) else len(one)


def _is_tie(expected: Answers, tokens: np.ndarray, length: int, tolerance: float) -> bool:
    """Whether the tokens are the same, or the first other one was as likely as rounding can tell."""
    if length == len(tokens):
        return True
    logits: Mapping[int, float] = expected.logits[length]  # type: ignore[assignment]
    return bool(logits[int(expected.tokens[length])] - logits[int(tokens[length])] <= 2 * tolerance)
