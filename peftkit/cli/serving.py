"""Commands that serve adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli.options import Base


def serve(  # noqa: PLR0913, PLR0917 - one parameter per option
    adapter: Annotated[
        list[str], typer.Option("--adapter", metavar="NAME=DIR", help="An adapter and its name; repeatable. One needs no name.")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's own need an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: one that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key that clients must know; or set PEFTKIT_API_KEY.")
    ] = None,
    adapters_dir: Annotated[
        Path | None, typer.Option(help="Let clients load adapters from below this folder (POST /v1/adapters), with the key.")
    ] = None,
    allow_adapter_changes: Annotated[
        bool, typer.Option("--allow-adapter-changes", help="Let them without a key; with --adapters-dir.")
    ] = False,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that are made together.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Answers that may wait; further ones get 429.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 2048,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Largest request, in bytes.")] = 2**20,
    request_seconds: Annotated[float, typer.Option(min=0.1, help="Longest time for a request.")] = 300.0,
    grace_seconds: Annotated[float, typer.Option(min=0, help="On SIGTERM: time to finish what was taken.")] = 30.0,
    engine: Annotated[str, typer.Option(help="peftkit, or vllm: run `vllm serve` with these adapters.")] = "peftkit",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print vLLM's command instead of running it.")] = False,
    base: Base = None,
) -> None:
    """Serve adapters on one base, by OpenAI's API, with a chat page."""
    from peftkit.commands import serve as command
    from peftkit.serving.jobs import Limits

    limits = Limits(max_batch, max_waiting, max_tokens, max_body_bytes=max_body_bytes, request_seconds=request_seconds)
    keys = (api_key_file, adapters_dir, allow_adapter_changes)
    command.serve(command.Serving(adapter, base, host, port, *keys, limits, grace_seconds, engine, dry_run))
