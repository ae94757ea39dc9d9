"""Load on `peftkit serve`: many clients at a time, good ones and bad ones, on loopback.

    python benchmarks/serve.py --adapter a=RUN --adapter b=RUN

Starts a server for each setting, asks every adapter (and the base) each prompt alone, and then all of it again by many clients
at once, streaming, in a random order. An answer that differs from the one alone counts as wrong. With bad clients, as many
more send what is huge, malformed or for nobody, or leave in the middle of a stream. Prints a Markdown table. Needs `openai`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import openai
import psutil

PROMPTS = [
    "Tom has three apples and buys four more. How many apples has he?",
    "Write a short poem about a cat.",
    "A train goes 60 miles in an hour. How far does it go in 4 hours, and how long does it need for 300 miles?",
    "List the colours of the rainbow.",
    "Why is the sky blue?",
    "Sum up this sentence: the parcel came on Tuesday, but the lamp in it was broken, and so it went back.",
]
Place = tuple[str, int]


@dataclass
class Load:
    """What one setting came to."""

    answers: dict[Place, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_wrong: int = 0
    num_lost: int = 0
    bad: Counter[str] = field(default_factory=Counter)


@contextmanager
def served(arguments: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """A server of its own, ended by SIGTERM: its address and process."""
    command = [sys.executable, "-m", "peftkit", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = next((line for line in process.stderr if line.startswith("serving at")), None)
    if line is None:
        raise SystemExit("the server did not start")
    yield line.split()[2].rstrip("/"), psutil.Process(process.pid)
    process.terminate()
    if process.wait(60):
        raise SystemExit(f"the server ended with {process.returncode}")


async def answer(client: openai.AsyncOpenAI, place: Place, max_tokens: int, load: Load) -> str:
    """One streamed answer, measured."""
    started, first, text = time.monotonic(), 0.0, ""
    stream = await client.chat.completions.create(
        model=place[0],
        messages=[{"role": "user", "content": PROMPTS[place[1]]}],
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        if chunk.usage is not None:
            load.num_tokens += chunk.usage.completion_tokens
        elif content := chunk.choices[0].delta.content:
            first = first or time.monotonic() - started
            text += content
    load.seconds.append(time.monotonic() - started)
    load.first_seconds.append(first)
    return text


async def misbehave(client: openai.AsyncOpenAI, url: str, kind: int, name: str) -> str:
    """One bad request; what came of it."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    message = {"model": name, "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 200}
    words, bodies = (
        ("huge", "malformed", "wrong adapter", "gone mid-stream", "too many tokens"),
        [b"x" * 2_000_000, b'{"model": '],
    )
    bodies += [json.dumps(message | change).encode() for change in ({"model": "nobody"}, {}, {"max_tokens": 10**6})]
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(bodies[kind])}\r\n\r\n".encode() + bodies[kind])
    status = (await reader.readline()).decode().split()
    if words[kind] == "gone mid-stream":
        await reader.read(300)
    writer.close()
    return f"{words[kind]}: {status[1] if len(status) > 1 else 'no answer'}"


async def ask_all(url: str, places: list[Place], options: argparse.Namespace, *, with_bad: bool) -> tuple[Load, float]:
    """Every place alone, then all of them by many clients at a time; the load and its wall seconds."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    alone, load = Load(), Load()
    for place in sorted(set(places)):
        alone.answers[place] = await answer(client, place, options.max_tokens, alone)
    queue, started = list(places), time.monotonic()

    async def good() -> None:
        while queue:
            place = queue.pop()
            try:
                load.num_wrong += await answer(client, place, options.max_tokens, load) != alone.answers[place]
            except openai.APIError:
                load.num_lost += 1

    async def bad(kind: int) -> None:
        while queue:
            load.bad[await misbehave(client, url, kind % 5, places[0][0])] += 1
            await asyncio.sleep(0.05)

    bad_ones = [bad(kind) for kind in range(options.clients)] if with_bad else []
    await asyncio.gather(*(good() for _ in range(options.clients)), *bad_ones)
    seconds = time.monotonic() - started
    await client.close()
    return load, seconds


def measured(
    name: str, arguments: list[str], places: list[Place], options: argparse.Namespace, *, with_bad: bool = False
) -> str:
    """A line of the table."""
    with served(arguments) as (url, process):
        before = sum(process.cpu_times()[:2])
        load, seconds = asyncio.run(ask_all(url, places, options, with_bad=with_bad))
        cpu = sum(process.cpu_times()[:2]) - before
    for what, count in sorted(load.bad.items()):
        print(f"  {what} ({count} times)", file=sys.stderr)
    ranked, first = sorted(load.seconds), sorted(load.first_seconds)
    figures = [
        f"{len(ranked)}",
        f"{load.num_lost}",
        f"{load.num_wrong}",
        f"{load.num_tokens / seconds:.0f}",
        f"{statistics.median(first):.2f}",
        f"{statistics.median(ranked):.2f}",
        f"{ranked[int(0.95 * len(ranked))]:.2f}",
        f"{cpu:.0f}",
    ]
    return f"| {name} | " + " | ".join(figures) + " |"


def main() -> None:
    """Measure a server that answers one at a time, one that answers many together, and that one among bad clients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=48)
    options = parser.parse_args()
    names = [*(text.partition("=")[0] for text in options.adapter), "base"]
    places = [(names[number % len(names)], number % len(PROMPTS)) for number in range(options.requests)]
    random.Random(0).shuffle(places)
    adapters = [part for text in options.adapter for part in ("--adapter", text)]
    print("| | answered | lost | wrong | tokens/s | first token (s, median) | whole (s, median) | whole (s, 95%) | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|")
    single = [*adapters, "--max-batch", "1"]
    print(measured("one answer at a time (`--max-batch 1`)", single, places, options), flush=True)
    print(measured("16 together", adapters, places, options), flush=True)
    print(measured("16 together, among bad clients", adapters, places, options, with_bad=True), flush=True)


if __name__ == "__main__":
    main()
