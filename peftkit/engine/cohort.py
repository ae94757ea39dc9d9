"""Answers that are generated together: one pass gives each of them a token."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.variants import get_alora_offsets_for_generate
from transformers import GenerationConfig

from peftkit.engine.adapted import AdaptedModel
from peftkit.engine.continuous import can_join, join, start, trim
from peftkit.engine.loaded import LoadedAdapter
from peftkit.engine.sampling import Choice, Chooser
from peftkit.engine.several import BASE, Host, Named
from peftkit.serving.jobs import End, Piece, Reason, Sampling, Ticket, TokenScore
from peftkit.serving.text import TextStream
from peftkit.tasks.example import Example


@dataclasses.dataclass(eq=False)
class Answer:
    """One answer that waits or is being made.

    Attributes:
        ticket: the job that it is for.
        row: its number there.
        named: who answers.
        example: the prompt.
        sampling: of the job.
        max_tokens: most new tokens.
    """

    ticket: Ticket
    row: int
    named: Named
    example: Example
    sampling: Sampling
    max_tokens: int
    num_tokens: int = 0
    chooser: Chooser | None = None
    text: TextStream | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for it."""
        return not self.ticket.cancelled

    def begin(self, config: GenerationConfig) -> None:
        """Prepare for the first token."""
        loaded = self.named.loaded
        base: Any = loaded.model.get_base_model() if isinstance(loaded.model, AdaptedModel) else loaded.model
        seen = [] if base.config.is_encoder_decoder else self.example.inputs["input_ids"]
        tokenizer = loaded.runtime.tokenizer
        sampling = self.sampling
        if sampling.seed is not None:  # several answers of one prompt differ
            sampling = dataclasses.replace(sampling, seed=sampling.seed + self.row)
        self.chooser = Chooser(base, config, sampling, list(seen), loaded.device)
        self.text = TextStream(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), sampling.stop)

    def add(self, choice: Choice) -> bool:
        """Tell a token; whether the answer is complete."""
        assert self.chooser is not None
        assert self.text is not None
        self.num_tokens += 1
        reason: Reason | None = None
        text = ""
        if choice.token in self.chooser.ends:
            reason = "stop"
        else:
            text = self.text.add(choice.token)
            if self.text.stopped:
                reason = "stop"
            elif self.num_tokens >= self.max_tokens:
                reason = "length"
        if reason is not None:
            text += self.text.rest()
            reason = "stop" if self.text.stopped else reason
        if text or self.sampling.num_logprobs is not None:
            self.ticket.emit(Piece(self.row, text, self._scores(choice)))
        if reason is not None:
            self.ticket.emit(End(self.row, reason, self.num_tokens))
        return reason is not None

    def _scores(self, choice: Choice) -> tuple[TokenScore, ...]:
        if self.sampling.num_logprobs is None:
            return ()
        decode = self.named.loaded.runtime.tokenizer.decode
        top = tuple((decode([token]), value) for token, value in choice.top)
        return (TokenScore(decode([choice.token]), choice.logprob, top),)


def must_be_alone(named: Named) -> bool:
    """Whether an answer shares no batch: where the adapter holds something for each row by its place, or mixes rows up."""
    method = named.loaded.method
    config = getattr(named.loaded.model, "active_peft_config", None)
    by_place = named.loaded.runtime.settings.task_names or getattr(config, "alora_invocation_tokens", None) is not None
    return bool(by_place) or (method is not None and method.rows_interact)


class Cohort:
    """A batch of answers of one model.

    Args:
        answers: which begin now.
        config: of the model.
    """

    def __init__(self, answers: Sequence[Answer], config: GenerationConfig) -> None:
        first = answers[0].named
        self.host: Host = first.host
        self.answers: list[Answer | None] = list(answers)
        self._loaded: LoadedAdapter = first.loaded
        batch = self._loaded.runtime.generation_batch([answer.example for answer in answers])
        inputs = {name: tensor.to(self._loaded.device) for name, tensor in batch.items()}
        config = copy.deepcopy(config)
        config.num_beams = 1
        config.max_new_tokens = max(answer.max_tokens for answer in answers)
        self._further: dict[str, Any] = {"task_ids": inputs["task_ids"]} if "task_ids" in inputs else {}
        if isinstance(self.host.model, AdaptedModel) and first.name != BASE:
            offsets = get_alora_offsets_for_generate(self.host.model, **inputs).get("alora_offsets")
            self._further |= {} if offsets is None else {"alora_offsets": offsets}
        with self._loaded.inference(), self.host.using(self._keys):
            self.batch = start(self.host.model, inputs, config)
        self._is_first, self.is_open = True, False

    @property
    def _keys(self) -> list[str]:
        """The adapter of each row; a row whose answer has left goes on with any, where it must stay in the batch."""
        known = next(answer.named.key for answer in self.answers if answer is not None)
        return [known if answer is None else answer.named.key for answer in self.answers]

    def step(self) -> None:
        """A token for each answer; those that are complete, or that nobody waits for, leave."""
        with self._loaded.inference(), self.host.using(self._keys, **self._further):
            logits = self.batch.next_logits(is_first=self._is_first)
        likeliest = logits.argmax(-1).tolist()
        tokens, left = [], []
        for place, answer in enumerate(self.answers):
            if answer is None or not answer.is_wanted:
                tokens.append(int(self.batch.pad_token))
                left.append(place)
                continue
            assert answer.chooser is not None
            row = logits[place]
            choice = answer.chooser.take(likeliest[place], row) if answer.chooser.is_plain else answer.chooser.choose(row)
            tokens.append(choice.token)
            if answer.add(choice):
                left.append(place)
        self.batch.append(torch.tensor(tokens, device=logits.device))
        self._is_first = False
        self._leave(left)
        self.is_open = bool(self.answers) and not self._further and can_join(self.batch)

    def _leave(self, places: Sequence[int]) -> None:
        for place in places:
            self.answers[place] = None
        staying = [place for place, answer in enumerate(self.answers) if answer is not None]
        if not staying:
            self.answers = []
        elif len(staying) < len(self.answers) and self.batch.is_divisible and not self._further:
            self.batch.keep(torch.tensor(staying, device=self.batch.ids.device))
            self.answers = [self.answers[place] for place in staying]
            trim(self.batch)

    def take_in(self, other: Cohort) -> None:
        """Go on with the answers of another open cohort of the same model too."""
        join(self.batch, other.batch)
        self.answers += other.answers

    @property
    def present(self) -> list[Answer]:
        """Answers that are being made."""
        return [answer for answer in self.answers if answer is not None]

    @property
    def size(self) -> int:
        """Their number."""
        return len(self.present)
