"""What the server asks of the model, and what it hears: plain data, in between a queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Reason = Literal["stop", "length"]
CHAT, COMPLETIONS, EMBEDDINGS, CLASSIFY = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/classify"


class Refusal(Exception):  # noqa: N818 - the client's error, not ours
    """A request that is not answered, with the HTTP status and the words for the client.

    Attributes:
        status: HTTP status.
        message: what is wrong and what is allowed.
        code: short word for programs.
        param: the field that is wrong, if it is one.
        retry_after: seconds after which it makes sense to ask again.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; None: as the adapter's recipe says.

    Attributes:
        max_tokens: longest answer; None: the server's limit or the recipe's, whichever is less.
        temperature: 0 takes the likeliest token.
        top_p: sample from the smallest set with this probability.
        seed: of the answer's own random numbers.
        stop: texts before which the answer ends.
        num_logprobs: how many likeliest tokens are told beside each; None: no probabilities at all.
        frequency_penalty: taken from a token's logit for each time that the answer has it.
        presence_penalty: taken from a token's logit if the answer has it.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0


@dataclass(frozen=True)
class Job:
    """A request as the model sees it.

    Attributes:
        model: name of the adapter, or `base`.
        endpoint: where it was asked.
        rows: each a mapping: `messages` or `prompt` to write after, or the columns of the task's rows.
        copies: answers for each row.
        sampling: where text is written.
        task_id: task of the rows, for adapters that know several.
    """

    model: str
    endpoint: str
    rows: Sequence[Mapping[str, Any]]
    copies: int = 1
    sampling: Sampling = Sampling()
    task_id: str | None = None


@dataclass(frozen=True)
class TokenScore:
    """A token of an answer with its log probability, and those of the likeliest ones in its place."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """More text of an answer; `row` counts answers from 0, those of one row after each other."""

    row: int
    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class End:
    """An answer is complete."""

    row: int
    reason: Reason
    num_tokens: int


@dataclass(frozen=True)
class Predicted:
    """What the task makes of a row."""

    row: int
    answer: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """Nothing more will come."""

    refusal: Refusal


Event = Piece | End | Predicted | Failed


@dataclass(eq=False)
class Ticket:
    """Who waits for a job: events come to `emit`, from the model's thread, until the client or its time says no more.

    Attributes:
        emit: takes each event.
        deadline: by the monotonic clock.
        num_prompt_tokens: of each row, once the job is taken.
        cancelled: the client does not wait any more.
    """

    emit: Callable[[Event], None]
    deadline: float
    num_prompt_tokens: list[int] = field(default_factory=list)
    cancelled: bool = False

    @property
    def is_late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() >= self.deadline


@dataclass(frozen=True)
class ModelFacts:
    """What can be asked of an adapter, or of the base.

    Attributes:
        name: to be named by.
        task: PEFT's task type.
        method: adapter method; `base` for none.
        endpoints: where to ask it, the most fitting first.
        labels: classes, where it has some.
        max_length: longest input in tokens; None: no bound.
    """

    name: str
    task: str
    method: str
    endpoints: tuple[str, ...]
    labels: tuple[str, ...]
    max_length: int | None


@dataclass(frozen=True)
class Limits:
    """What the server takes.

    Attributes:
        max_batch: answers that are made together.
        max_waiting: answers that may wait for their turn.
        max_tokens: longest answer, in tokens.
        max_rows: inputs of one request, answers of one prompt.
        max_body_bytes: largest request.
        request_seconds: longest time for a request.
    """

    max_batch: int = 16
    max_waiting: int = 128
    max_tokens: int = 2048
    max_rows: int = 128
    max_body_bytes: int = 2**20
    request_seconds: float = 300.0


class Engine(Protocol):
    """The model behind the server; every method may be called from any thread."""

    limits: Limits

    def models(self) -> list[ModelFacts]:
        """What it can be asked."""
        ...

    def submit(self, job: Job, ticket: Ticket) -> None:
        """Take a job; what comes of it goes to the ticket.

        Raises:
            Refusal: it cannot be done, or not now.
        """
        ...

    def load(self, name: str, path: str) -> ModelFacts:
        """Load an adapter from below the folder for that, in place of one of this name.

        Raises:
            Refusal: it cannot.
        """
        ...

    def remove(self, name: str) -> None:
        """Take an adapter out; answers that are being made with it are finished.

        Raises:
            Refusal: there is none of this name, or it is the last one.
        """
        ...

    def load_of_work(self) -> tuple[int, int]:
        """Answers that wait, and answers that are being made."""
        ...

    @property
    def is_open(self) -> bool:
        """Whether it takes jobs."""
        ...

    def close(self, grace_seconds: float) -> int:
        """Take nothing more, finish what was taken in so many seconds, and end. How many answers were cut off."""
        ...
