"""The server as its clients know it: OpenAI's own client, a browser, and clients that behave badly."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest

from peftkit.engine.generate import answer_rows, prompt_row
from peftkit.engine.loaded import load_adapter
from peftkit.engine.service import Service
from peftkit.engine.several import Several
from peftkit.serving.app import make_app
from peftkit.serving.guard import LOOPBACK
from peftkit.serving.jobs import Limits
from peftkit.serving.server import Server, listen
from tests.conftest import Result
from tests.runs import peftkit_process, tiny_recipe, train
from tests.serving import PROMPTS

if TYPE_CHECKING:
    from playwright.sync_api import Page

BERT: dict[str, dict[str, Any]] = {
    "intents": {"task": "SEQ_CLS"},
    "vectors": {"task": "FEATURE_EXTRACTION"},
    "names": {"task": "TOKEN_CLS"},
    "answers": {"task": "QUESTION_ANS"},
}


@contextmanager
def serving(adapters: dict[str, Path], limits: Limits = Limits(), key: str | None = None, **options: Any) -> Iterator[str]:
    """A server in a thread; its address."""
    several = Several()
    for name, path in adapters.items():
        several.load(name, path)
    service = Service(several, limits, options.pop("adapters_dir", None))
    app = make_app(service, api_key=key, hosts=() if key else LOOPBACK, **options)
    place, server = listen("127.0.0.1", 0), Server(app, service, 5)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{place.getsockname()[1]}"
    server.handle_exit(signal.SIGTERM, None)
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def url(language_adapters: dict[str, Path]) -> Iterator[str]:
    """Two LoRAs, IA3 and the base."""
    chosen = {name: language_adapters[name] for name in ("lora", "wide", "ia3")}
    with serving(chosen, Limits(max_batch=4, max_waiting=40, max_body_bytes=20_000)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    """OpenAI's own client."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def bert_adapters(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of the tasks that write nothing, on one base."""
    root = tmp_path_factory.mktemp("bert")
    for name, facts in BERT.items():
        (root / name).mkdir()
        train(tiny_recipe(facts["task"], models_dir, root / name), root / name / "run")
    return {name: root / name / "run" for name in BERT}


@pytest.fixture(scope="module")
def bert_url(bert_adapters: dict[str, Path]) -> Iterator[str]:
    """All of them."""
    with serving(bert_adapters) as address:
        yield address


def send(
    address: str, body: Any = None, *, headers: dict[str, str] | None = None, method: str | None = None
) -> tuple[int, Any, dict[str, str]]:
    """Status, JSON (or text) and headers of a response."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"} | (headers or {}), method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            status, content, found = response.status, response.read(), dict(response.headers)
    except urllib.error.HTTPError as error:
        status, content, found = error.code, error.read(), dict(error.headers)
    try:
        return status, json.loads(content), found
    except ValueError:
        return status, content.decode(), found


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def chat(model: str, text: str = PROMPTS[0], **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": user(text), **fields}


def test_models_are_listed_with_what_they_do(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["lora", "wide", "ia3", "base"]
    facts = client.models.retrieve("wide").model_dump()
    assert facts["method"] == "lora"
    assert facts["endpoints"][0] == "/v1/chat/completions"


def test_many_clients_get_what_each_adapter_says_alone(client: openai.OpenAI, answers_alone: dict[str, list[str]]) -> None:
    wanted = [(name, number) for number in range(5) for name in ("lora", "wide", "ia3", "base")]

    def answer(place: tuple[str, int]) -> str:
        response = client.chat.completions.create(model=place[0], messages=user(PROMPTS[place[1]]))
        return str(response.choices[0].message.content).strip()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, wanted)) == [answers_alone[name][number] for name, number in wanted]


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI, answers_alone: dict[str, list[str]]) -> None:
    stream = client.chat.completions.create(
        model="lora", messages=user(PROMPTS[2]), stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts).strip() == answers_alone["lora"][2]
    assert sum(map(bool, texts)) > 2
    assert chunks[-1].choices[0].finish_reason == "length"
    whole = client.chat.completions.create(model="lora", messages=user(PROMPTS[2]))
    assert last.usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12


def test_a_prompt_is_rendered_as_in_training(client: openai.OpenAI, language_adapters: dict[str, Path]) -> None:
    """The chat endpoint and the plain one agree when the latter is given what the template writes."""
    loaded = load_adapter(language_adapters["wide"])
    text = loaded.runtime.chat.prompt(prompt_row(loaded, PROMPTS[3]))  # type: ignore[attr-defined]
    by_hand = client.completions.create(model="wide", prompt=text)
    rendered = client.chat.completions.create(model="wide", messages=user(PROMPTS[3]))
    assert by_hand.usage == rendered.usage
    assert by_hand.choices[0].text == rendered.choices[0].message.content


def test_completions_of_several_prompts_with_several_answers(client: openai.OpenAI) -> None:
    response = client.completions.create(
        model="lora", prompt=["old", "two red birds"], n=2, max_tokens=3, logprobs=2, temperature=1.0, seed=3
    )
    assert [choice.index for choice in response.choices] == [0, 1, 2, 3]
    assert response.usage is not None
    assert response.usage.completion_tokens == 12
    scores = response.choices[0].logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert len(scores.tokens) == 3


def test_log_probabilities_come_with_a_chat(client: openai.OpenAI) -> None:
    response = client.chat.completions.create(model="lora", messages=user("old"), max_tokens=2, logprobs=True, top_logprobs=4)
    scores = response.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert [len(token.top_logprobs) for token in scores.content] == [4, 4]
    assert scores.content[0].logprob == scores.content[0].top_logprobs[0].logprob


@pytest.mark.parametrize("form", ["float", "base64"])
def test_vectors_are_those_of_infer(form: Any, bert_url: str, bert_adapters: dict[str, Path]) -> None:
    client = openai.OpenAI(base_url=f"{bert_url}/v1", api_key="none")
    response = client.embeddings.create(model="vectors", input=PROMPTS[:3], encoding_format=form)
    loaded = load_adapter(bert_adapters["vectors"])
    rows = [("x", prompt_row(loaded, text)) for text in PROMPTS[:3]]
    for found, wanted in zip(response.data, answer_rows(loaded, rows, {}, 1), strict=True):
        if form == "float":
            assert found.embedding == pytest.approx(wanted["prediction"], abs=1e-5)
    assert response.usage.prompt_tokens > 3


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("intents", "good film"),
        ("names", "the cat sat on a mat"),
        ("answers", {"question": "who sat?", "context": "tom sat on a mat"}),
    ],
)
def test_labels_and_spans_are_those_of_infer(name: str, given: Any, bert_url: str, bert_adapters: dict[str, Path]) -> None:
    status, body, _ = send(f"{bert_url}/v1/classify", {"model": name, "input": [given, given]})
    loaded = load_adapter(bert_adapters[name])
    row = prompt_row(loaded, given if isinstance(given, str) else json.dumps(given))
    wanted = next(answer_rows(loaded, [("x", row)], {}, 1))
    assert status == 200
    for found in body["data"]:
        assert found["prediction"] == wanted["prediction"]
        if "probabilities" in wanted:
            assert found["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)


def test_the_base_of_heads_that_were_trained_answers_where_it_can(bert_url: str) -> None:
    models = {facts["id"]: facts for facts in send(f"{bert_url}/v1/models")[1]["data"]}
    assert models["base"]["endpoints"] == ["/v1/embeddings"]
    assert models["intents"]["labels"] == ["neg", "pos"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/chat/completions", chat("nobody"), 404, "there is no model `nobody`"),
        ("/v1/chat/completions", chat("lora", tools=[{"type": "function"}]), 400, "`tools` is not supported"),
        ("/v1/chat/completions", chat("lora", "cat " * 300), 400, "longer than"),
        ("/v1/chat/completions", chat("lora", "cat " * 9000), 413, "20000 bytes"),
        ("/v1/chat/completions", chat("lora", n=200), 400, "takes 128 in one request"),
        ("/v1/chat/completions", b"{", 400, "JSON"),
        ("/v1/chat/completions", b"[" * 15000, 400, "JSON"),
        ("/v1/embeddings", {"model": "lora", "input": "x"}, 400, "ask it at /v1/chat/completions"),
        ("/v1/nothing", {}, 404, "nothing at /v1/nothing"),
        ("/health", {}, 405, "does not take POST"),
        ("/v1/adapters", {"name": "x", "path": "y"}, 403, "only with an API key"),
    ],
)
def test_bad_requests_get_an_answer_in_openais_shape(url: str, path: str, body: Any, status: int, words: str) -> None:
    found, answer, _ = send(url + path, body)
    assert found == status
    assert words in answer["error"]["message"]
    assert {*answer["error"]} == {"message", "type", "param", "code"}
    assert send(f"{url}/v1/chat/completions", chat("lora", max_tokens=1))[0] == 200


def test_pages_elsewhere_cannot_ask_in_the_readers_name(url: str) -> None:
    assert send(f"{url}/v1/models", headers={"Host": "evil.example"})[0] == 403
    assert send(f"{url}/v1/chat/completions", chat("lora"), headers={"Content-Type": "text/plain"})[0] == 415


def test_requests_beyond_the_queue_are_told_to_wait(url: str) -> None:
    status, answer, headers = send(f"{url}/v1/chat/completions", chat("lora", n=41, max_tokens=1))
    assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "queue_full", "1")


def test_a_client_that_goes_in_the_middle_of_a_stream_frees_its_place(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(chat("lora", stream=True, max_tokens=200)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\n"
    clients = [socket.create_connection((host, int(port))) for _ in range(6)]  # more than are answered together
    for connection in clients:
        connection.sendall(head.encode() + b"\r\n" + body)
    clients[0].recv(100)
    for connection in clients:
        connection.close()
    started = time.monotonic()
    assert send(f"{url}/v1/chat/completions", chat("wide", max_tokens=2))[0] == 200
    while send(f"{url}/health")[1]["running"] and time.monotonic() < started + 5:
        time.sleep(0.01)
    assert send(f"{url}/health")[1] == {"status": "ok", "waiting": 0, "running": 0}
    assert "peftkit_clients_gone_total" in send(f"{url}/metrics")[1]


def test_metrics_count_requests_and_tokens(url: str) -> None:
    send(f"{url}/v1/chat/completions", chat("wide", max_tokens=3))
    text = send(f"{url}/metrics")[1]
    assert 'peftkit_requests_total{endpoint="/v1/chat/completions",status="200"}' in text
    assert 'peftkit_answer_tokens_total{model="wide"}' in text
    assert "peftkit_waiting 0.0" in text


def test_with_a_key_only_those_who_know_it_are_answered(
    language_adapters: dict[str, Path], answers_alone: dict[str, list[str]]
) -> None:
    root = language_adapters["ia3"].parents[1]
    with serving({"lora": language_adapters["lora"]}, key="secret", allows_changes=True, adapters_dir=root) as address:
        known = {"Authorization": "Bearer secret", "Host": "some.where"}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            assert send(f"{address}/v1/models", headers=headers)[0] == 401
        assert send(f"{address}/health")[0] == 200
        assert send(f"{address}/v1/adapters", {"name": "new", "path": "ia3/run"}, headers=known)[0] == 200
        answer = send(f"{address}/v1/chat/completions", chat("new", PROMPTS[1]), headers=known)[1]
        assert answer["choices"][0]["message"]["content"].strip() == answers_alone["ia3"][1]
        status, error, _ = send(f"{address}/v1/adapters", {"name": "x", "path": "../../etc"}, headers=known)
        assert (status, error["error"]["code"]) == (403, "not_allowed")
        assert send(f"{address}/v1/adapters/new", headers=known, method="DELETE")[1]["deleted"]
        assert send(f"{address}/v1/chat/completions", chat("new"), headers=known)[0] == 404


def test_sigterm_finishes_what_runs_and_refuses_the_rest(language_adapters: dict[str, Path]) -> None:
    options = ["--adapter", f"lora={language_adapters['lora']}", "--port", "0"]
    process = peftkit_process("serve", *options)
    assert process.stderr is not None
    line = next(line for line in process.stderr if "serving at" in line)
    address = line.split()[2].rstrip("/")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(send, f"{address}/v1/chat/completions", chat("lora", max_tokens=150))
        while not send(f"{address}/health")[1]["running"]:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        while send(f"{address}/health")[0] == 200:
            time.sleep(0.005)
        assert send(f"{address}/v1/chat/completions", chat("lora"))[0] == 503
        assert running.result()[1]["usage"]["completion_tokens"] == 150
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--host", "0.0.0.0"], 2, "needs an API key"),
        (["--dry-run"], 2, "has no effect without --engine vllm"),
        (["--engine", "other"], 2, "it takes peftkit | vllm"),
        (["--allow-adapter-changes"], 2, "has no effect without --adapters-dir"),
        (["--adapters-dir", "nowhere"], 2, "there is no such folder"),
        (["--adapter", "x=nowhere"], 7, "there is no run directory or adapter folder `nowhere`"),
    ],
)
def test_what_cannot_be_served_is_told_before_anything_is_loaded(
    cli: Callable[..., Result], language_adapters: dict[str, Path], options: list[str], code: int, words: str
) -> None:
    result = cli("serve", "--adapter", f"lora={language_adapters['lora']}", "--port", "0", *options)
    assert result.code == code
    assert words in result.err


def test_what_is_not_installed_is_named(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftkit.commands.serve._PACKAGES", ("fastapi", "not_there"))
    result = cli("serve", "--adapter", "nowhere")
    assert result.code == 2
    assert "not-there is not installed; `pip install 'peftkit[serve]'` adds it" in result.err


def test_vllm_gets_its_command(cli: Callable[..., Result], language_adapters: dict[str, Path]) -> None:
    named = [part for name in ("lora", "wide") for part in ("--adapter", f"{name}={language_adapters[name]}")]
    result = cli("serve", *named, "--engine", "vllm", "--dry-run")
    assert result.out.startswith("vllm serve ")
    assert f"--lora-modules lora={language_adapters['lora']}/adapter wide=" in result.out
    result = cli("serve", *named, "--adapter", f"ia3={language_adapters['ia3']}", "--engine", "vllm", "--dry-run")
    assert result.code == 2
    assert "ia3: vLLM 0.33.0 takes LoRA adapters; this one is of the method ia3" in result.err


@pytest.fixture
def show(open_page: Callable[..., Page]) -> Callable[..., Page]:
    """Open the page of a server; no request may go elsewhere."""
    return lambda address, **options: open_page(address, lambda url: url.startswith((address, "data:")), **options)


def ask(page: Page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector("#send:enabled")


def log_of(page: Page, name: str) -> Any:
    """The column of an adapter."""
    return page.get_by_role("log", name=re.compile(f"^{name} "))


def test_the_page_shows_adapters_beside_the_base(
    show: Callable[..., Page], url: str, answers_alone: dict[str, list[str]]
) -> None:
    page = show(url)
    page.get_by_label("ia3", exact=True).check()
    ask(page, PROMPTS[1])
    for name in ("lora", "wide", "ia3", "base"):
        log = log_of(page, name)
        assert log.locator(".answer").text_content().strip() == answers_alone[name][1]
        assert "12 tokens" in str(log.locator(".note").text_content())
    page.get_by_label("wide", exact=True).uncheck()
    assert not log_of(page, "wide").is_visible()
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".answer").count() == 0


def test_escape_stops_an_answer(show: Callable[..., Page], url: str) -> None:
    page = show(url)
    page.get_by_label("Longest answer").fill("200")
    page.fill("#text", PROMPTS[0])
    page.press("#text", "Enter")
    page.locator(".answer", has_text="8").first.wait_for()
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:enabled")
    assert "stopped" in page.locator(".note").all_text_contents()


def test_what_the_model_writes_is_never_markup(show: Callable[..., Page], url: str) -> None:
    page = show(url, viewport={"width": 390, "height": 800}, color_scheme="dark")
    ask(page, "<img src=x onerror=alert(1)>")
    assert page.locator(".asked").first.text_content() == "<img src=x onerror=alert(1)>"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_labels_vectors_and_spans_have_forms_of_their_own(show: Callable[..., Page], bert_url: str) -> None:
    page = show(bert_url)
    for name in ("names", "answers"):
        page.get_by_label(name, exact=True).check()
    page.get_by_label("Context").fill("tom sat on a mat")
    ask(page, "good film")
    assert "pos" in str(log_of(page, "intents").locator("table").text_content())
    assert "numbers a text" in str(log_of(page, "vectors").text_content())
    assert log_of(page, "answers").locator("table").count() == 1
    assert "[" in str(log_of(page, "names").locator(".answer").text_content())
    assert page.locator(".wrong").count() == 0
