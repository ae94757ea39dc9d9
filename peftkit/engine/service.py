"""The model behind the server: one thread that has it, and a queue of what is asked.

Answers that are made together get a token each in turn, and new ones begin between two tokens: nobody waits for another's
whole answer. Adapters are loaded and removed between two tokens too.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from peftkit.engine.asked import canonical_row, endpoints, facts_of, wrong_endpoint
from peftkit.engine.cohort import Answer, Cohort, must_be_alone
from peftkit.engine.generate import encode_prompts, generation_config, predict
from peftkit.engine.guard import is_out_of_memory, reclaim
from peftkit.engine.several import BASE, Named, Several, require_name
from peftkit.errors import CertificateError, DataError, LoadError, RecipeError
from peftkit.serving.jobs import Failed, Job, Limits, ModelFacts, Predicted, Refusal, Ticket
from peftkit.tasks.example import Example

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Question:
    """A row that waits for what its task makes of it."""

    ticket: Ticket
    row: int
    named: Named
    example: Example

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for it."""
        return not self.ticket.cancelled


class Service:
    """See `peftkit.serving.jobs.Engine`.

    Args:
        several: the adapters.
        limits: what is taken.
        adapters_dir: the folder below which adapters may be loaded from; None: none may.
    """

    def __init__(self, several: Several, limits: Limits, adapters_dir: Path | None = None) -> None:
        self.limits = limits
        self._several, self._adapters_dir = several, adapters_dir
        self._configs: weakref.WeakKeyDictionary[Named, GenerationConfig] = weakref.WeakKeyDictionary()
        self._known: dict[str, Named] = {}
        self._change = threading.Condition()
        self._tokenizing = threading.Lock()  # tokenizers change settings of theirs while they work
        self._waiting: deque[Answer | _Question] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._cohorts: list[Cohort] = []
        self._leaving: list[Named] = []
        self._gone: weakref.WeakSet[Named] = weakref.WeakSet()
        self._is_open, self._works, self._ends = True, False, False
        self._look_up()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    # What the server calls.

    @property
    def is_open(self) -> bool:
        """Whether it takes jobs."""
        return self._is_open

    def models(self) -> list[ModelFacts]:
        """What it can be asked."""
        return [facts_of(named) for named in self._known.values()]

    def load_of_work(self) -> tuple[int, int]:
        """Answers that wait, and answers that are being made."""
        with self._change:
            return self._num_waiting(), sum(cohort.size for cohort in self._cohorts)

    def submit(self, job: Job, ticket: Ticket) -> None:
        """Take a job; what comes of it goes to the ticket.

        Raises:
            Refusal: it cannot be done, or not now.
        """
        named = self._known.get(job.model)
        if named is None:
            raise Refusal(404, f"there is no model `{job.model}`; there are {', '.join(self._known)}", "model_not_found")
        self._refuse_if_full(len(job.rows) * job.copies)
        examples = self._encoded(named, job)
        ticket.num_prompt_tokens = [example.num_input_tokens for example in examples]
        work = list(self._work(ticket, named, job, examples))
        with self._change:
            self._refuse_if_full(len(work))
            is_gone = named in self._gone
            self._waiting.extend(() if is_gone else work)
            self._change.notify()
        if is_gone:  # meanwhile; there may be another of this name
            self.submit(job, ticket)

    def load(self, name: str, path: str) -> ModelFacts:
        """Load an adapter from below the folder for that, in place of one of this name.

        Raises:
            Refusal: it cannot.
        """
        folder = self._allowed(path)
        try:
            require_name(name)
            return facts_of(self._on_thread(lambda: self._load(name, folder)))
        except (RecipeError, LoadError, DataError, CertificateError) as error:
            raise Refusal(400, str(error), "adapter_not_loaded") from error

    def remove(self, name: str) -> None:
        """Take an adapter out; answers that are being made with it are finished.

        Raises:
            Refusal: there is none of this name, or it is the last one.
        """
        self._on_thread(lambda: self._remove(name))

    def close(self, grace_seconds: float) -> int:
        """Take nothing more, finish what was taken in so many seconds, and end. How many answers were cut off."""
        deadline = time.monotonic() + grace_seconds
        with self._change:
            self._is_open = False
            while (self._works or self._waiting) and time.monotonic() < deadline:
                self._change.wait(min(0.1, max(0.0, deadline - time.monotonic())))
            num_left = self._num_waiting() + sum(cohort.size for cohort in self._cohorts)
            self._ends = True
            self._change.notify()
        self._thread.join()
        return num_left

    # What happens before a job waits.

    def _refuse_if_full(self, num_answers: int) -> None:
        if not self._is_open:
            raise Refusal(503, "the server is shutting down", "shutting_down")
        if self._num_waiting() + num_answers > self.limits.max_waiting:
            message = f"{self._num_waiting()} answers wait already, and at most {self.limits.max_waiting} may"
            raise Refusal(429, message, "queue_full", retry_after=1)

    def _num_waiting(self) -> int:
        return sum(item.is_wanted for item in list(self._waiting))

    def _encoded(self, named: Named, job: Job) -> list[Example]:
        loaded = named.loaded
        if job.endpoint not in endpoints(named):
            raise Refusal(400, wrong_endpoint(named), "wrong_endpoint", param="model")
        try:
            rows = [canonical_row(loaded, row, job.task_id) for row in job.rows]
            with self._tokenizing:
                return encode_prompts(loaded, [(f"input {number}", row) for number, row in enumerate(rows, 1)])
        except DataError as error:
            raise Refusal(400, str(error), "invalid_input") from error

    def _work(self, ticket: Ticket, named: Named, job: Job, examples: Sequence[Example]) -> Iterator[Answer | _Question]:
        for number, example in enumerate(examples):
            if not named.loaded.task.generates:
                yield _Question(ticket, number, named, example)
                continue
            most = self._most_tokens(named, example, job.sampling.max_tokens)
            for copy in range(job.copies):
                yield Answer(ticket, number * job.copies + copy, named, example, job.sampling, most)

    def _most_tokens(self, named: Named, example: Example, asked: int | None) -> int:
        room = named.loaded.room_after(example.length)
        if asked is None:
            return max(1, min(self._config_of(named).max_new_tokens, room, self.limits.max_tokens))
        if asked > self.limits.max_tokens:
            raise Refusal(400, f"max_tokens is {asked}; this server writes at most {self.limits.max_tokens}", "too_long")
        if asked > room:
            message = f"max_tokens is {asked}; after this prompt of {example.length} tokens the model has room for {room}"
            raise Refusal(400, message, "context_length_exceeded", param="max_tokens")
        return asked

    def _config_of(self, named: Named) -> GenerationConfig:
        if named not in self._configs:
            self._configs[named] = generation_config(named.loaded, {"cache_implementation": "dynamic"})
        return self._configs[named]

    def _allowed(self, path: str) -> Path:
        """The folder of an adapter that may be loaded.

        Raises:
            Refusal: it is not below the operator's folder; no word on what is elsewhere.
        """
        if self._adapters_dir is None:
            raise Refusal(403, "this server was started without --adapters-dir: it loads no adapters", "not_allowed")
        try:
            folder = (self._adapters_dir / path).resolve()
            inside = folder.is_relative_to(self._adapters_dir.resolve()) and folder.is_dir()
        except (OSError, ValueError, RuntimeError):
            inside = False
        if not inside:
            raise Refusal(403, "`path` names no folder below that of --adapters-dir", "not_allowed", param="path")
        return folder

    # What only the model's thread does.

    def _on_thread(self, call: Callable[[], Any]) -> Any:
        future: Future[Any] = Future()
        with self._change:
            if not self._is_open:
                raise Refusal(503, "the server is shutting down", "shutting_down")
            self._calls.append((call, future))
            self._change.notify()
        return future.result()

    def _run(self) -> None:
        while True:
            with self._change:
                while not (self._calls or self._waiting or self._cohorts or self._ends):
                    self._change.wait()
                calls = [self._calls.popleft() for _ in range(len(self._calls))]
                if self._ends:
                    break
                self._works = True
            for call, future in calls:
                _complete(future, call)
            self._begin()
            for cohort in list(self._cohorts):
                self._advance(cohort)
            self._tidy()
        for item in [*self._waiting, *(answer for cohort in self._cohorts for answer in cohort.present)]:
            item.ticket.emit(Failed(Refusal(503, "the server has shut down", "shutting_down")))
        for _, future in [*calls, *self._calls]:
            future.set_exception(Refusal(503, "the server is shutting down", "shutting_down"))

    def _begin(self) -> None:
        """Answer questions, and let as many answers begin as there is room for."""
        questions, answers = self._next_batch()
        groups: dict[Any, list[_Question]] = {}
        for question in questions:
            groups.setdefault(question.named, []).append(question)
        for named, asked in groups.items():
            with self._failing_alone(asked):
                for question, answer in zip(asked, self._predicted(named, asked), strict=True):
                    question.ticket.emit(Predicted(question.row, answer))
        together: dict[Any, list[Answer]] = {}
        for written in answers:
            place = written if must_be_alone(written.named) else written.named.host
            together.setdefault(place, []).append(written)
        for beginning in together.values():
            with self._failing_alone(beginning):
                self._start(beginning)

    def _next_batch(self) -> tuple[list[_Question], list[Answer]]:
        questions: list[_Question] = []
        answers: list[Answer] = []
        with self._change:
            room = self.limits.max_batch - sum(cohort.size for cohort in self._cohorts)
            later: deque[Answer | _Question] = deque()
            for item in self._waiting:
                if not item.is_wanted:
                    continue
                if item.ticket.is_late:
                    _fail(item.ticket, _too_late(self.limits))
                elif isinstance(item, _Question) and len(questions) < self.limits.max_batch:
                    questions.append(item)
                elif isinstance(item, Answer) and len(answers) < room:
                    answers.append(item)
                else:
                    later.append(item)
            self._waiting = later
        return questions, answers

    def _predicted(self, named: Named, questions: Sequence[_Question]) -> list[dict[str, Any]]:
        with named.chosen() as loaded:
            size = 1 if must_be_alone(named) else len(questions)
            parts = [questions[start : start + size] for start in range(0, len(questions), size)]
            return [answer for part in parts for answer in predict(loaded, [question.example for question in part])]

    def _start(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            answer.begin(self._config_of(answer.named))
        cohort = Cohort(answers, self._config_of(answers[0].named))
        cohort.step()
        other = next((other for other in self._cohorts if other.host is cohort.host and other.is_open), None)
        if cohort.is_open and other is not None:
            with self._failing_alone([*answers, *other.present]):
                other.take_in(cohort)
        elif cohort.size:
            self._cohorts.append(cohort)

    def _advance(self, cohort: Cohort) -> None:
        answers = cohort.present
        for answer in answers:
            if answer.ticket.is_late:
                _fail(answer.ticket, _too_late(self.limits))
        with self._failing_alone(answers):
            cohort.step()
        if not cohort.size or not any(answer.is_wanted for answer in answers):
            self._cohorts.remove(cohort)

    @contextlib.contextmanager
    def _failing_alone(self, items: Sequence[Answer | _Question]) -> Iterator[None]:
        """What goes wrong here ends these answers, and no others."""
        try:
            yield
        except Exception as error:
            memory = is_out_of_memory(error)
            message = "out of memory: ask for less at a time" if memory else "the model failed; the server's log says how"
            logger.exception("%d answers failed", len(items))
            for item in items:
                _fail(item.ticket, Refusal(503 if memory else 500, message, "out_of_memory" if memory else "internal_error"))
            if memory:
                reclaim()

    def _load(self, name: str, folder: Path) -> Named:
        before = self._known.get(name)
        named = self._several.load(name, folder)
        self._leaving += [before] if before is not None else []
        self._look_up()
        return named

    def _remove(self, name: str) -> None:
        if name == BASE or name not in self._known:
            raise Refusal(404, f"there is no adapter `{name}`", "model_not_found")
        if len([other for other in self._known if other != BASE]) == 1:
            raise Refusal(409, f"`{name}` is the only adapter", "last_adapter")
        self._leaving.append(self._several.remove(name))
        self._look_up()

    def _look_up(self) -> None:
        """Take over the names; those that jobs refer to stay with what they meant."""
        known: dict[str, Named] = {}
        for name in self._several.names:
            with contextlib.suppress(KeyError):  # the base may turn out to have no head
                known[name] = self._several[name]
        self._known = known

    def _tidy(self) -> None:
        """Free the memory of adapters that were removed, as soon as no answer needs them; tell those who wait for an end."""
        with self._change:
            items = [*self._waiting, *(answer for cohort in self._cohorts for answer in cohort.present)]
            self._works = bool(items)
            self._change.notify_all()
            used = {item.named for item in items}
            unused = [named for named in self._leaving if named not in used]
            self._gone.update(unused)
        for named in unused:
            self._leaving.remove(named)
            with self._failing_alone(()):
                self._several.release(named)


def _complete(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)


def _fail(ticket: Ticket, refusal: Refusal) -> None:
    """End a job, once."""
    if not ticket.cancelled:
        ticket.cancelled = True
        ticket.emit(Failed(refusal))


def _too_late(limits: Limits) -> Refusal:
    return Refusal(504, f"not done within {limits.request_seconds:g} s, this server's limit for a request", "timeout")
