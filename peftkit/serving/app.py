"""The server's endpoints."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Collection
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peftkit.serving.guard import Guard, refused
from peftkit.serving.jobs import (
    CHAT,
    CLASSIFY,
    COMPLETIONS,
    EMBEDDINGS,
    End,
    Engine,
    Event,
    Failed,
    Job,
    Piece,
    Predicted,
    Refusal,
    Ticket,
)
from peftkit.serving.metrics import Metrics
from peftkit.serving.requests import (
    AdapterRequest,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    Writing,
    parse,
    require_within,
)
from peftkit.serving.responses import Written, classify_body, embeddings_body, error_body, model_body

logger = logging.getLogger(__name__)


def make_app(
    engine: Engine, *, api_key: str | None = None, allows_changes: bool = False, hosts: Collection[str] = ()
) -> ASGIApp:
    """The server, to be run by uvicorn.

    Args:
        engine: the model.
        api_key: what clients must know; None: nothing.
        allows_changes: whether adapters may be loaded and removed.
        hosts: names that it may be called by; none: any.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # FastAPI's pages come from elsewhere
    metrics = Metrics(engine)
    _add_pages(app, engine, metrics)
    _add_models(app, engine, allows_changes)
    _add_answers(app, engine, metrics)

    async def on_refusal(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return refused(error)

    async def on_unknown(request: Request, error: Exception) -> Response:
        return refused(Refusal(404, f"there is nothing at {request.url.path}", "not_found"))

    async def on_wrong_method(request: Request, error: Exception) -> Response:
        return refused(Refusal(405, f"{request.url.path} does not take {request.method}", "method_not_allowed"))

    app.add_exception_handler(Refusal, on_refusal)
    app.add_exception_handler(404, on_unknown)
    app.add_exception_handler(405, on_wrong_method)
    guarded = Guard(app, api_key, engine.limits.max_body_bytes, hosts)
    return _Counted(guarded, metrics, frozenset(getattr(route, "path", "") for route in app.routes))


class _Counted:
    """Counts requests by endpoint and status, and answers what nobody has foreseen."""

    def __init__(self, app: ASGIApp, metrics: Metrics, known: frozenset[str]) -> None:
        self._app, self._metrics, self._known = app, metrics, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint = scope["path"] if scope["path"] in self._known else "other"
        status, started = 0, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            logger.exception("a request to %s failed", endpoint)
            if not status:
                failure = Refusal(500, "the server failed; its log says how", "internal_error")
                await refused(failure)(scope, receive, watched)
        finally:
            self._metrics.requests.labels(endpoint, str(status or 499)).inc()
            self._metrics.seconds.labels(endpoint).observe(time.monotonic() - started)


def _add_pages(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    page = files("peftkit.serving").joinpath("page.html").read_text(encoding="utf-8")
    policy = _page_policy(page)

    @app.get("/")
    async def chat_page() -> Response:
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> Response:
        waiting, running = engine.load_of_work()
        state = {"status": "ok" if engine.is_open else "shutting_down", "waiting": waiting, "running": running}
        return JSONResponse(state, 200 if engine.is_open else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


def _page_policy(page: str) -> str:
    """What a browser lets the page do: run its own script in its own style, and ask nobody but this server."""

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode("ascii") for part in parts]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    own = f"style-src {hashes('style')}; script-src {hashes('script')}; connect-src 'self'; img-src data:"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _add_models(app: FastAPI, engine: Engine, allows_changes: bool) -> None:
    created = int(time.time())

    def require_allowed() -> None:
        if not allows_changes:
            raise Refusal(403, "adapters change only with an API key, or --allow-adapter-changes", "not_allowed")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model_body(facts, created) for facts in engine.models()]})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        found = next((facts for facts in engine.models() if facts.name == name), None)
        if found is None:
            raise Refusal(404, f"there is no model `{name}`", "model_not_found")
        return JSONResponse(model_body(found, created))

    @app.post("/v1/adapters")
    async def load(request: Request) -> Response:
        require_allowed()
        wanted = parse(AdapterRequest, await request.body())
        facts = await run_in_threadpool(engine.load, wanted.name, wanted.path)
        return JSONResponse(model_body(facts, created))

    @app.delete("/v1/adapters/{name}")
    async def remove(name: str) -> Response:
        require_allowed()
        await run_in_threadpool(engine.remove, name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})


def _add_answers(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        asked = parse(ChatRequest, await request.body())
        return await _write(_Talk(engine, metrics, request), asked, asked.job())

    @app.post(COMPLETIONS)
    async def complete(request: Request) -> Response:
        asked = parse(CompletionRequest, await request.body())
        return await _write(_Talk(engine, metrics, request), asked, asked.job())

    @app.post(EMBEDDINGS)
    async def embed(request: Request) -> Response:
        asked = parse(EmbeddingRequest, await request.body())
        talk = _Talk(engine, metrics, request)
        answers = await _predict(talk, asked.job())
        return JSONResponse(embeddings_body(asked.model, answers, talk.ticket.num_prompt_tokens, asked.encoding_format))

    @app.post(CLASSIFY)
    async def classify(request: Request) -> Response:
        asked = parse(ClassifyRequest, await request.body())
        talk = _Talk(engine, metrics, request)
        answers = await _predict(talk, asked.job())
        return JSONResponse(classify_body(asked.model, answers, talk.ticket.num_prompt_tokens))


class _Talk:
    """One client's job: from here to the model's thread, and its events back."""

    def __init__(self, engine: Engine, metrics: Metrics, request: Request) -> None:
        self._engine, self._metrics, self._request = engine, metrics, request
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.ticket = Ticket(emit, time.monotonic() + engine.limits.request_seconds)

    async def begin(self, job: Job) -> None:
        """Hand in the job."""
        require_within(job, self._engine.limits)
        try:
            await run_in_threadpool(self._engine.submit, job, self.ticket)
        except BaseException:
            self.ticket.cancelled = True
            raise
        self._metrics.prompt_tokens.labels(job.model).inc(sum(self.ticket.num_prompt_tokens))

    async def written(self, job: Job, answers: Written) -> AsyncIterator[Piece | End]:
        """Pieces of text until every answer has ended.

        Raises:
            Refusal: the model gave up.
        """
        started, is_first = time.monotonic(), True
        try:
            while not answers.is_complete:
                event = await self._events.get()
                if isinstance(event, Failed):
                    raise event.refusal
                assert isinstance(event, Piece | End)
                if is_first:
                    self._metrics.first_token.labels(job.model).observe(time.monotonic() - started)
                is_first = False
                answers.add(event)
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self._metrics.gone.inc()
            raise
        finally:
            self.ticket.cancelled = True
            self._metrics.answer_tokens.labels(job.model).inc(answers.num_tokens)

    async def predicted(self, num_rows: int) -> list[dict[str, Any]]:
        """The answer of every row.

        Raises:
            Refusal: the model gave up.
        """
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < num_rows:
            event = await self._events.get()
            if isinstance(event, Failed):
                raise event.refusal
            assert isinstance(event, Predicted)
            answers[event.row] = event.answer
        return [answers[row] for row in range(num_rows)]

    async def unless_gone(self, work: Any) -> Any:
        """What the work gives; where the client leaves before that, nobody needs it any more."""
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(self._client_leaves())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0] in done:
                return tasks[0].result()
            raise Refusal(499, "the client has left", "client_closed_request")
        finally:
            self.ticket.cancelled = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _client_leaves(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass


async def _predict(talk: _Talk, job: Job) -> list[dict[str, Any]]:
    await talk.begin(job)
    answers: list[dict[str, Any]] = await talk.unless_gone(talk.predicted(len(job.rows)))
    return answers


async def _write(talk: _Talk, asked: Writing, job: Job) -> Response:
    await talk.begin(job)
    answers = Written(job.model, job.endpoint == CHAT, len(job.rows) * job.copies)
    if asked.stream:
        lines = _stream(talk, job, answers, tells_usage=asked.tells_usage)
        return StreamingResponse(lines, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    async def all_of_it() -> None:
        async for _ in talk.written(job, answers):
            pass

    await talk.unless_gone(all_of_it())
    return JSONResponse(answers.whole(talk.ticket.num_prompt_tokens))


async def _stream(talk: _Talk, job: Job, answers: Written, *, tells_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: chunks, the counts where they are wanted, and `[DONE]`."""
    for chunk in answers.first_chunks():
        yield _line(chunk)
    try:
        async for event in talk.written(job, answers):
            yield _line(answers.chunk(event))
        if tells_usage:
            yield _line(answers.last_chunk(talk.ticket.num_prompt_tokens))
    except Refusal as refusal:
        yield _line(error_body(refusal))
    yield "data: [DONE]\n\n"


def _line(data: Any) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
