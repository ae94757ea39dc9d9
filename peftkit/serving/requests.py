"""What clients send, by OpenAI's names: checked, and nothing of it ignored in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from peftkit.serving.jobs import CHAT, CLASSIFY, COMPLETIONS, EMBEDDINGS, Job, Limits, Refusal, Sampling

# Fields of OpenAI's that ask for nothing with these values.
_NEUTRAL: dict[str, Any] = {
    "logit_bias": {},
    "store": False,
    "echo": False,
    "best_of": 1,
    "tools": [],
    "service_tier": "auto",
    "response_format": {"type": "text"},
}
Text = Annotated[str, Field(min_length=1)]
_MAX_STOP = 4  # OpenAI's


class Request(BaseModel):
    """What every request has.

    `user` tells whom it is for; it has no effect here, and needs none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    model: str
    user: str | None = None
    task_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None and _NEUTRAL.get(key, _NEUTRAL) != value}


class StreamOptions(BaseModel):
    """What a stream has besides the answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    include_usage: bool = False


class Writing(Request):
    """What requests for text have."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=_MAX_STOP)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, num_logprobs: int | None, max_tokens: int | None) -> Sampling:
        """How tokens are chosen."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=None if self.seed is None else self.seed % 2**63,
            stop=stop,
            num_logprobs=num_logprobs,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
        )

    @model_validator(mode="after")
    def _check_stream_options(self) -> Writing:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` has no effect without `stream`")
        return self


class ChatRequest(Writing):
    """A conversation to answer."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("`max_tokens` and `max_completion_tokens` say the same: give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` has no effect without `logprobs`")
        return self

    def job(self) -> Job:
        """As the model sees it."""
        num_logprobs = (self.top_logprobs or 0) if self.logprobs else None
        sampling = self.sampling(num_logprobs, self.max_tokens or self.max_completion_tokens)
        return Job(self.model, CHAT, [{"messages": self.messages}], self.n, sampling, self.task_id)


class CompletionRequest(Writing):
    """Texts to continue."""

    prompt: Text | Annotated[list[Text], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def job(self) -> Job:
        """As the model sees it."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        sampling = self.sampling(self.logprobs, self.max_tokens)
        return Job(self.model, COMPLETIONS, [{"prompt": text} for text in prompts], self.n, sampling, self.task_id)


class EmbeddingRequest(Request):
    """Texts to make vectors of."""

    input: Text | Annotated[list[Text], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"

    def job(self) -> Job:
        """As the model sees it."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        return Job(self.model, EMBEDDINGS, [{"text": text} for text in texts], task_id=self.task_id)


Row = Text | dict[str, Any]


class ClassifyRequest(Request):
    """Texts, or rows with the columns of the task, to label."""

    input: Row | Annotated[list[Row], Field(min_length=1)]

    def job(self) -> Job:
        """As the model sees it."""
        given: Sequence[Row] = self.input if isinstance(self.input, list) else [self.input]
        rows: list[Mapping[str, Any]] = [{"text": row} if isinstance(row, str) else row for row in given]
        return Job(self.model, CLASSIFY, rows, task_id=self.task_id)


class AdapterRequest(BaseModel):
    """An adapter to load: its name, and its folder below that of `--adapters-dir`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Text
    path: Text


R = TypeVar("R", bound=BaseModel)


def parse(kind: type[R], body: bytes) -> R:
    """A request from its JSON.

    Raises:
        Refusal: it is none.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problems = [(_place(kind, item["loc"]), item) for item in error.errors(include_url=False, include_input=False)]
        message = "; ".join(dict.fromkeys(_sentence(place, item) for place, item in problems))
        raise Refusal(400, message, "invalid_request", param=problems[0][0] or None) from error


def require_within(job: Job, limits: Limits) -> None:
    """Raise Refusal for a job that asks for too much at once."""
    if len(job.rows) > limits.max_rows or len(job.rows) * job.copies > limits.max_rows:
        asked = f"{len(job.rows)} inputs" + (f" with {job.copies} answers each" if job.copies > 1 else "")
        raise Refusal(400, f"{asked}: this server takes {limits.max_rows} in one request", "too_many")


def _place(kind: type[BaseModel], parts: Sequence[int | str]) -> str:
    """The dotted path of a field, without the names of the alternatives that pydantic tries."""
    if not parts or parts[0] not in kind.model_fields:
        return ".".join(map(str, parts))
    return ".".join(str(part) for number, part in enumerate(parts) if number == 0 or isinstance(part, int))


def _sentence(place: str, item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return f"`{place}` is not supported here"
    text = item["msg"].removeprefix("Value error, ")
    return f"`{place}`: {text}" if place else text
