"""The model's thread: answers of many jobs at a time are those of each alone, and none disturbs another."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.engine.generate import answer_rows, prompt_row
from peftkit.engine.loaded import load_adapter
from peftkit.engine.sampling import Chooser
from peftkit.engine.service import Service
from peftkit.engine.several import BASE, Several
from peftkit.serving.jobs import CHAT, CLASSIFY, COMPLETIONS, End, Job, Limits, Piece, Refusal, Sampling
from tests.conftest import rows_of, write_jsonl
from tests.runs import tiny_recipe, train
from tests.serving import LANGUAGE, PROMPTS, Asked, alone, chat_job, train_language


@pytest.fixture(scope="module")
def service(language_adapters: dict[str, Path]) -> Iterator[Service]:
    """The adapters of LANGUAGE behind a thread that makes four answers at a time."""
    several = Several()
    for name, path in language_adapters.items():
        several.load(name, path)
    running = Service(several, Limits(max_batch=4, max_waiting=80))
    yield running
    running.close(10)


def test_answers_are_those_of_each_adapter_alone_however_they_are_mixed(
    service: Service, answers_alone: dict[str, list[str]]
) -> None:
    wanted = [(name, number) for name in (*LANGUAGE, BASE) for number in range(len(PROMPTS))]
    random.Random(0).shuffle(wanted)
    asked = [Asked(service, chat_job(name, PROMPTS[number])) for name, number in wanted]
    found = {place: job.answers()[0] for place, job in zip(wanted, asked, strict=True)}
    assert found == {(name, number): answers_alone[name][number] for name, number in wanted}


def test_rows_join_and_leave_a_batch_without_a_trace(service: Service, answers_alone: dict[str, list[str]]) -> None:
    long = [Asked(service, chat_job(name, PROMPTS[2], max_tokens=60)) for name in ("wide", "lora")]
    for number in range(8):
        name = ("lora", "wide", BASE)[number % 3]
        job = Asked(service, chat_job(name, PROMPTS[number % 5], max_tokens=1 + number))
        text = job.answers()[0]
        assert answers_alone[name][number % 5].startswith(text.rstrip("\ufffd"))
    by_itself = [Asked(service, chat_job(name, PROMPTS[2], max_tokens=60)).answers() for name in ("wide", "lora")]
    assert [job.answers() for job in long] == by_itself


def test_a_long_answer_lets_others_pass(service: Service) -> None:
    long = Asked(service, chat_job("prefix", PROMPTS[0], max_tokens=150))
    short = Asked(service, chat_job("ia3", PROMPTS[0], max_tokens=2))
    short.answers()
    assert long.reasons == [None]
    seen = sum(isinstance(long.next(), Piece) for _ in range(long.events.qsize()))
    assert seen < 100
    long.ticket.cancelled = True


def test_temperature_seed_and_copies(service: Service) -> None:
    job = chat_job("wide", PROMPTS[0], 3, temperature=1.0, seed=7, max_tokens=8)
    first, second = (Asked(service, job).answers() for _ in range(2))
    assert first == second
    assert len({*first}) > 1
    other = chat_job("wide", PROMPTS[0], 3, temperature=1.0, seed=8, max_tokens=8)
    assert Asked(service, other).answers() != first


def test_top_p_near_zero_is_the_likeliest_token(service: Service, answers_alone: dict[str, list[str]]) -> None:
    asked = Asked(service, chat_job("wide", PROMPTS[1], temperature=2.0, top_p=1e-6))
    assert asked.answers() == [answers_alone["wide"][1]]


def test_an_answer_ends_before_a_stop_text(service: Service, answers_alone: dict[str, list[str]]) -> None:
    whole = answers_alone["lora"][0]
    asked = Asked(service, chat_job("lora", PROMPTS[0], stop=(whole[4:6], "never")))
    assert asked.answers() == [whole[: whole.index(whole[4:6])]]
    assert asked.reasons == ["stop"]


def test_log_probabilities_are_those_of_the_model(service: Service, language_adapters: dict[str, Path]) -> None:
    asked = Asked(service, Job("wide", COMPLETIONS, [{"prompt": "old"}], 1, Sampling(num_logprobs=3, max_tokens=4)))
    asked.answers()
    scores = [score for piece in asked.pieces for score in piece.scores]
    assert len(scores) == 4
    assert all(score.logprob == score.top[0][1] and len(score.top) == 3 for score in scores)
    loaded = service._known["wide"]
    with loaded.chosen() as adapter, adapter.inference():
        ids = torch.tensor([adapter.runtime.tokenizer("old")["input_ids"]])
        logits = adapter.model(input_ids=ids).logits[0, -1].log_softmax(-1)
    assert scores[0].logprob == pytest.approx(float(logits.max()), abs=1e-4)


@pytest.mark.parametrize(
    ("penalties", "tokens"),
    [({}, [5, 5, 5]), ({"presence_penalty": 1.0}, [5, 6, 5]), ({"frequency_penalty": 0.4}, [5, 5, 6])],
)
def test_penalties_are_openais(service: Service, penalties: dict[str, float], tokens: list[int]) -> None:
    """Once said: 3 - 1 = 2 against 2.5, then 1.5 again against 2; said twice: 3 - 0.8 against 2.5."""
    named = service._known["full"]
    chooser = Chooser(named.loaded.model, service._config_of(named), Sampling(**penalties), [], torch.device("cpu"))
    logits = torch.zeros(300)
    logits[5], logits[6] = 3.0, 2.5
    assert [chooser.choose(logits).token for _ in tokens] == tokens


@pytest.mark.parametrize(
    ("job", "status", "words"),
    [
        (chat_job("nobody", "x"), 404, "there are lora, wide"),
        (chat_job("lora", "cat " * 200), 400, "longer than 256 tokens"),
        (chat_job("lora", "x", max_tokens=5000), 400, "at most 2048"),
        (chat_job("lora", "x", max_tokens=255), 400, "has room for"),
        (Job("lora", CLASSIFY, [{"text": "x"}]), 400, "ask it at /v1/chat/completions"),
        (Job("lora", CHAT, [{"messages": [{"role": "wizard", "content": "x"}]}]), 400, "role"),
        (Job("lora", CHAT, [{"messages": [{"role": "user", "content": "x"}]}], task_id="one"), 400, "`task_id` has no effect"),
    ],
)
def test_what_cannot_be_answered_is_refused(service: Service, job: Job, status: int, words: str) -> None:
    with pytest.raises(Refusal, match=words) as refusal:
        Asked(service, job)
    assert refusal.value.status == status
    assert service.load_of_work()[0] == 0


def test_too_many_waiting_are_refused_and_the_others_answered(service: Service) -> None:
    jobs = [Asked(service, chat_job("ia3", PROMPTS[0], 20, temperature=1.0, max_tokens=4)) for _ in range(3)]
    with pytest.raises(Refusal, match="wait already") as refusal:
        Asked(service, chat_job("ia3", PROMPTS[0], 81, max_tokens=4))
    assert (refusal.value.status, refusal.value.retry_after) == (429, 1)
    assert all(len(job.answers()) == 20 for job in jobs)


def test_a_client_that_leaves_frees_its_place(service: Service, answers_alone: dict[str, list[str]]) -> None:
    jobs = [Asked(service, chat_job("lora", PROMPTS[0], max_tokens=200)) for _ in range(4)]
    jobs[0].next()
    for job in jobs:
        job.ticket.cancelled = True
    assert Asked(service, chat_job("lora", PROMPTS[0], max_tokens=2)).answers()[0] in answers_alone["lora"][0]
    assert all(End not in map(type, [job.events.get() for _ in range(job.events.qsize())]) for job in jobs)


def test_a_job_ends_when_its_time_is_over(service: Service) -> None:
    asked = Asked(service, chat_job("lora", PROMPTS[0], max_tokens=200), seconds=0.01)
    with pytest.raises(Refusal, match="not done within") as refusal:
        asked.answers()
    assert refusal.value.status == 504


def test_a_failure_of_the_model_ends_its_own_answers_only(
    service: Service, monkeypatch: pytest.MonkeyPatch, answers_alone: dict[str, list[str]]
) -> None:
    other = Asked(service, chat_job("wide", PROMPTS[1]))
    monkeypatch.setattr(service._known["ia3"].host, "using", None)
    with pytest.raises(Refusal, match="the model failed") as refusal:
        Asked(service, chat_job("ia3", PROMPTS[0])).answers()
    assert refusal.value.status == 500
    assert other.answers() == [answers_alone["wide"][1]]


def test_an_adapter_is_exchanged_while_it_answers(
    language_adapters: dict[str, Path], answers_alone: dict[str, list[str]]
) -> None:
    several = Several()
    several.load("one", language_adapters["lora"])
    several.load("other", language_adapters["wide"])
    service = Service(several, Limits(), adapters_dir=language_adapters["ia3"].parents[1])
    running = Asked(service, chat_job("one", PROMPTS[0], max_tokens=100))
    running.next()
    service.load("one", "ia3/run")
    assert Asked(service, chat_job("one", PROMPTS[1])).answers() == [answers_alone["ia3"][1]]
    assert running.answers() == alone(language_adapters["lora"], PROMPTS[:1], max_new_tokens=100)
    service.remove("other")
    assert [facts.name for facts in service.models()] == ["one", BASE]
    for name, status in (("other", 404), ("one", 409), (BASE, 404)):
        with pytest.raises(Refusal) as refusal:
            service.remove(name)
        assert refusal.value.status == status
    service.close(5)
    assert all(not host.keys or host is several["one"].host for host in several._mixing.values())


@pytest.mark.parametrize("path", ["../secret", "/etc", "ia3/run/../../../x", "\x00", "x" * 5000])
def test_adapters_come_from_below_their_folder_alone(language_adapters: dict[str, Path], path: str) -> None:
    several = Several()
    several.load("one", language_adapters["lora"])
    root = language_adapters["ia3"].parents[1]
    service = Service(several, Limits(), adapters_dir=root)
    with pytest.raises(Refusal) as refusal:
        service.load("two", path)
    assert refusal.value.status in (400, 403)
    service.close(0)
    with pytest.raises(Refusal, match="shutting down"):
        service.load("two", "ia3/run")


def test_closing_finishes_what_was_taken_and_takes_nothing_more(language_adapters: dict[str, Path]) -> None:
    several = Several()
    several.load("one", language_adapters["lora"])
    service = Service(several, Limits(max_batch=1))
    asked = [Asked(service, chat_job("one", PROMPTS[0], max_tokens=20)) for _ in range(3)]
    assert service.close(30) == 0
    assert [job.answers() for job in asked] == [alone(language_adapters["lora"], PROMPTS[:1], max_new_tokens=20)] * 3
    with pytest.raises(Refusal, match="shutting down") as refusal:
        Asked(service, chat_job("one", "x"))
    assert refusal.value.status == 503


def test_what_is_not_done_in_the_time_of_grace_is_cut_off(language_adapters: dict[str, Path]) -> None:
    several = Several()
    several.load("one", language_adapters["lora"])
    service = Service(several, Limits(max_batch=1))
    asked = [Asked(service, chat_job("one", PROMPTS[0], max_tokens=200)) for _ in range(3)]
    started = time.monotonic()
    assert service.close(0.05) >= 2
    assert time.monotonic() - started < 5
    with pytest.raises(Refusal, match="shut down"):
        asked[-1].answers()


def test_each_job_names_its_task_where_an_adapter_knows_several(models_dir: Path, tmp_path: Path) -> None:
    section = {"method": "poly", "n_tasks": 2, "n_skills": 2}
    recipe = tiny_recipe("CAUSAL_LM", models_dir, tmp_path, adapter=section, training={"learning_rate": 0.1})
    rows = [row | {"task_id": ("one", "two")[number % 2]} for number, row in enumerate(rows_of("CAUSAL_LM", 21))]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    train(recipe, tmp_path / "run")
    several = Several()
    several.load("poly", tmp_path / "run")
    loaded = load_adapter(tmp_path / "run")  # another model than the thread's
    service = Service(several, Limits())
    with pytest.raises(Refusal, match="no task is named"):
        Asked(service, chat_job("poly", PROMPTS[0]))
    messages = [{"role": "user", "content": PROMPTS[0]}]
    jobs = {task: Asked(service, Job("poly", CHAT, [{"messages": messages}], task_id=task)) for task in ("one", "two")}
    for task, job in jobs.items():
        row = ("x", prompt_row(loaded, PROMPTS[0], task_id=task))
        assert job.answers()[0] == next(answer_rows(loaded, [row], {}, 1))["prediction"]
    service.close(1)


def test_an_encoder_decoder_serves_prompts(models_dir: Path, tmp_path: Path) -> None:
    paths = {name: train_language(models_dir, tmp_path, name, "SEQ_2_SEQ_LM") for name in ("lora", "wide")}
    wanted = {name: alone(path, PROMPTS) for name, path in paths.items()}
    several = Several()
    for name, path in paths.items():
        several.load(name, path)
    service = Service(several, Limits(max_batch=3))
    jobs: dict[tuple[str, int], Any] = {
        (name, number): Asked(service, Job(name, COMPLETIONS, [{"prompt": text}]))
        for number, text in enumerate(PROMPTS)
        for name in paths
    }
    assert {key: job.answers()[0] for key, job in jobs.items()} == {(name, n): wanted[name][n] for name, n in jobs}
    service.close(1)
