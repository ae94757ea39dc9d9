"""Adapters to serve, trained on tiny models, and a way to ask the model's thread as the server does."""

from __future__ import annotations

import queue
import time
from pathlib import Path
from typing import Any

from peftkit.engine.generate import answer_rows, prompt_row
from peftkit.engine.loaded import LoadedAdapter, load_adapter
from peftkit.engine.service import Service
from peftkit.serving.jobs import CHAT, End, Event, Failed, Job, Piece, Predicted, Sampling, Ticket
from tests.runs import tiny_recipe, train

PROMPTS = [
    "the cat sat on a mat",
    "two red birds",
    "how many apples are left if tom has three",
    "old",
    "seven small dogs ran home",
]
_TURN = "<|im_start|>assistant"
# Name -> adapter section; rates at which six steps change what is said.
LANGUAGE: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 4, "lora_alpha": 16},
    "wide": {"method": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "ia3": {"method": "ia3"},
    "prefix": {"method": "prefix_tuning", "num_virtual_tokens": 4},
    "dora": {"method": "lora", "r": 4, "use_dora": True},
    "alora": {"method": "lora", "r": 8, "lora_alpha": 64, "target_modules": "all-linear", "alora_invocation_text": _TURN},
    "full": {"method": "full"},
}
_SEEDS = ("dora", "full", "ia3", "lora", "prefix", "wide", "alora")  # with which `lora` and `prefix` write on and on


def train_language(models_dir: Path, root: Path, name: str, task: str = "CAUSAL_LM") -> Path:
    """An adapter of LANGUAGE; each of another seed."""
    folder = root / name
    folder.mkdir(parents=True)
    rates = {"full": 0.01, "prefix": 0.3}
    settings = {"learning_rate": rates.get(name, 0.1), "seed": _SEEDS.index(name)}
    recipe = tiny_recipe(
        task,
        models_dir,
        folder,
        adapter=LANGUAGE[name],
        training=settings,
        data={"max_length": 200},
        generation={"max_new_tokens": 12},
    )
    train(recipe, folder / "run")
    return folder / "run"


def alone(path: Path, prompts: list[str], **settings: Any) -> list[str]:
    """What an adapter answers that is loaded by itself, a prompt at a time."""
    return answers_of(load_adapter(path), prompts, **settings)


def answers_of(loaded: LoadedAdapter, prompts: list[str], **settings: Any) -> list[str]:
    """What a loaded adapter answers, a prompt at a time."""
    rows = [(f"row {number}", prompt_row(loaded, text)) for number, text in enumerate(prompts)]
    return [str(answer["prediction"]) for row in rows for answer in answer_rows(loaded, [row], settings, 1)]


class Asked:
    """A job that was handed in, and what has come of it.

    Args:
        service: the model's thread.
        job: what is asked.
        seconds: longest time.
    """

    def __init__(self, service: Service, job: Job, seconds: float = 60.0) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.ticket = Ticket(self.events.put, time.monotonic() + seconds)
        self.num_answers = len(job.rows) * job.copies
        self.texts = [""] * self.num_answers
        self.reasons: list[str | None] = [None] * self.num_answers
        self.pieces: list[Piece] = []
        service.submit(job, self.ticket)

    def next(self) -> Event:
        """The next event, taken over; what the model refused is raised."""
        event = self.events.get(timeout=60)
        if isinstance(event, Failed):
            raise event.refusal
        if isinstance(event, Piece):
            self.pieces.append(event)
            self.texts[event.row] += event.text
        if isinstance(event, End):
            self.reasons[event.row] = event.reason
        return event

    def answers(self) -> list[str]:
        """All texts, as `infer` would print them."""
        while None in self.reasons:
            self.next()
        return [text.strip() for text in self.texts]

    def predicted(self) -> list[dict[str, Any]]:
        """What the task made of each row."""
        found: dict[int, dict[str, Any]] = {}
        while len(found) < self.num_answers:
            event = self.next()
            assert isinstance(event, Predicted)
            found[event.row] = event.answer
        return [found[row] for row in range(self.num_answers)]


def chat_job(name: str, text: str, copies: int = 1, **sampling: Any) -> Job:
    """A question of a user."""
    return Job(name, CHAT, [{"messages": [{"role": "user", "content": text}]}], copies, Sampling(**sampling))
