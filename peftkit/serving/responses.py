"""What clients get, in OpenAI's shapes."""

from __future__ import annotations

import base64
import struct
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftkit.serving.jobs import End, ModelFacts, Piece, Refusal, TokenScore

Json = dict[str, Any]


def error_body(refusal: Refusal) -> Json:
    """An error as OpenAI's clients read it."""
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}


def model_body(facts: ModelFacts, created: int) -> Json:
    """A model, with what is known of it here."""
    return {
        "id": facts.name,
        "object": "model",
        "created": created,
        "owned_by": "peftkit",
        "task": facts.task,
        "method": facts.method,
        "endpoints": list(facts.endpoints),
        "labels": list(facts.labels),
        "max_length": facts.max_length,
    }


@dataclass
class Written:
    """Answers as they come, and how they are told: a whole, or chunks of a stream.

    Attributes:
        model: who answers.
        is_chat: messages, or plain texts.
        num_answers: how many there will be.
    """

    model: str
    is_chat: bool
    num_answers: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.texts = [""] * self.num_answers
        self.scores: list[list[TokenScore]] = [[] for _ in range(self.num_answers)]
        self.reasons: list[str | None] = [None] * self.num_answers
        self.num_tokens = 0

    @property
    def is_complete(self) -> bool:
        """Whether every answer has ended."""
        return None not in self.reasons

    def add(self, event: Piece | End) -> None:
        """Take over what has come."""
        if isinstance(event, Piece):
            self.texts[event.row] += event.text
            self.scores[event.row] += event.scores
        else:
            self.reasons[event.row] = event.reason
            self.num_tokens += event.num_tokens

    def usage(self, num_prompt_tokens: Sequence[int]) -> Json:
        """Tokens of prompts, each counted once, and of answers."""
        prompt = sum(num_prompt_tokens)
        return {"prompt_tokens": prompt, "completion_tokens": self.num_tokens, "total_tokens": prompt + self.num_tokens}

    def whole(self, num_prompt_tokens: Sequence[int]) -> Json:
        """The response of a request that is not streamed."""
        choices = []
        for row in range(self.num_answers):
            content = (
                {"message": {"role": "assistant", "content": self.texts[row]}} if self.is_chat else {"text": self.texts[row]}
            )
            scores = self._logprobs(self.scores[row])
            choices.append({"index": row, **content, "logprobs": scores, "finish_reason": self.reasons[row]})
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": self.usage(num_prompt_tokens)}

    def first_chunks(self) -> list[Json]:
        """What a chat's stream begins with: who speaks."""
        if not self.is_chat:
            return []
        return [self._chunk(row, {"delta": {"role": "assistant", "content": ""}}) for row in range(self.num_answers)]

    def chunk(self, event: Piece | End) -> Json:
        """What a stream tells of an event."""
        if isinstance(event, End):
            return self._chunk(event.row, {"delta": {}} if self.is_chat else {"text": ""}, reason=event.reason)
        content: Json = {"delta": {"content": event.text}} if self.is_chat else {"text": event.text}
        return self._chunk(event.row, content | {"logprobs": self._logprobs(event.scores)})

    def last_chunk(self, num_prompt_tokens: Sequence[int]) -> Json:
        """The counts, at the end of a stream that was asked for them."""
        return self._head(self._chunk_kind) | {"choices": [], "usage": self.usage(num_prompt_tokens)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _chunk(self, row: int, content: Json, reason: str | None = None) -> Json:
        return self._head(self._chunk_kind) | {"choices": [{"index": row, "finish_reason": reason, **content}]}

    def _head(self, kind: str) -> Json:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, scores: Sequence[TokenScore]) -> Json | None:
        if not scores:
            return None
        if self.is_chat:
            return {"content": [_chat_score(score) for score in scores], "refusal": None}
        return {
            "tokens": [score.token for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [dict(score.top) for score in scores],
            "text_offset": None,
        }


def _chat_score(score: TokenScore) -> Json:
    def one(token: str, logprob: float) -> Json:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    return one(score.token, score.logprob) | {"top_logprobs": [one(token, logprob) for token, logprob in score.top]}


def embeddings_body(model: str, answers: Sequence[Mapping[str, Any]], num_prompt_tokens: Sequence[int], form: str) -> Json:
    """Vectors, as numbers or as base64 of little-endian float32."""
    data = []
    for row, answer in enumerate(answers):
        vector = answer["prediction"]
        packed = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii") if form == "base64" else vector
        data.append({"object": "embedding", "index": row, "embedding": packed})
    return {"object": "list", "data": data, "model": model, "usage": _read(num_prompt_tokens)}


def classify_body(model: str, answers: Sequence[Mapping[str, Any]], num_prompt_tokens: Sequence[int]) -> Json:
    """What the task made of each row: `prediction`, and probabilities or spans."""
    data = [{"index": row, **answer} for row, answer in enumerate(answers)]
    return {"object": "list", "data": data, "model": model, "usage": _read(num_prompt_tokens)}


def _read(num_prompt_tokens: Sequence[int]) -> Json:
    return {"prompt_tokens": sum(num_prompt_tokens), "total_tokens": sum(num_prompt_tokens)}
