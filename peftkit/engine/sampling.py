"""The next token of one answer: transformers' own processors for what a recipe or a request asks for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from peftkit.serving.jobs import Sampling


@dataclass(frozen=True)
class Choice:
    """A token, its log probability (of the model, before any setting) and those of the likeliest ones in its place."""

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses the tokens of one answer.

    Args:
        model: without adapter, with a language model's head.
        config: as the adapter's recipe has it.
        sampling: what the request changes.
        prompt: token ids that penalties count too: of the prompt or, beside an encoder, those that the decoder begins with.
        device: where the logits are.
    """

    def __init__(
        self, model: Any, config: GenerationConfig, sampling: Sampling, prompt: list[int], device: torch.device
    ) -> None:
        config = merged(config, sampling)
        model._prepare_special_tokens(config, device=device)
        processors = model._get_logits_processor(config, input_ids_seq_length=len(prompt), device=str(device))
        self._processors, self._sampling, self._samples = processors, sampling, bool(config.do_sample)
        self._prompt, self._answer, self._device = prompt, list[int](), device
        self._counts: dict[int, int] = {}
        self._generator = torch.Generator(device)
        self._generator.manual_seed(sampling.seed) if sampling.seed is not None else self._generator.seed()
        ends = config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self.is_plain = not (processors or self._samples or self._has_penalty or sampling.num_logprobs is not None)

    @property
    def _has_penalty(self) -> bool:
        return bool(self._sampling.frequency_penalty or self._sampling.presence_penalty)

    def choose(self, logits: torch.Tensor) -> Choice:
        """The next token, from its logits (V,) in float32."""
        scores = self._penalised(logits) if self._has_penalty else logits
        if self._processors:
            ids = torch.tensor([self._prompt + self._answer], device=self._device)
            scores = self._processors(ids, scores[None].clone())[0]
        if self._samples:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        else:
            token = int(scores.argmax())
        return self.take(token, logits)

    def take(self, token: int, logits: torch.Tensor) -> Choice:
        """Note that this token comes next."""
        self._answer.append(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        num_top = self._sampling.num_logprobs
        if num_top is None:
            return Choice(token)
        logprobs = logits.log_softmax(-1)
        values, tokens = logprobs.topk(num_top) if num_top else (logprobs[:0], logprobs[:0].long())
        return Choice(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        """OpenAI's penalties: logit - count * frequency_penalty - (count > 0) * presence_penalty, over the answer alone."""
        tokens = torch.tensor(list(self._counts), dtype=torch.long, device=self._device)
        counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype, device=self._device)
        scores = logits.clone()
        scores[tokens] -= counts * self._sampling.frequency_penalty + self._sampling.presence_penalty
        return scores


def merged(config: GenerationConfig, sampling: Sampling) -> GenerationConfig:
    """The recipe's config with what a request changes; beams are not searched here."""
    config = copy.deepcopy(config)
    config.num_beams = 1
    if sampling.top_p is not None and sampling.top_p < 1 and sampling.temperature is None:
        config.do_sample = True
    if sampling.temperature is not None:
        config.do_sample = sampling.temperature > 0
        config.temperature = sampling.temperature or None
    if sampling.top_p is not None:
        config.top_p = sampling.top_p
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
    return config
