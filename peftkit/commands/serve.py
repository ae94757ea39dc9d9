"""`peftkit serve`: an OpenAI-compatible server for several adapters on one base."""

from __future__ import annotations

import importlib.util
import shlex
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peftkit import console
from peftkit.errors import RecipeError, Stopped
from peftkit.launch import api_key_of_environment, become
from peftkit.serving.jobs import Engine, Limits
from peftkit.stop import stops_at_once

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True)
class Serving:
    """What the command line says.

    Attributes:
        adapters: `name=DIR`, or one folder alone.
        base: base model, where the one that the adapters name cannot be found.
        host: address to listen at.
        port: port; 0: any that is free.
        api_key_file: file with the key.
        adapters_dir: folder below which adapters may be loaded.
        allows_changes: whether that goes without a key.
        limits: what is taken.
        grace_seconds: time to finish on a signal.
        engine: `peftkit` or `vllm`.
        dry_run: print vLLM's command instead of running it.
    """

    adapters: Sequence[str]
    base: str | None
    host: str
    port: int
    api_key_file: Path | None
    adapters_dir: Path | None
    allows_changes: bool
    limits: Limits
    grace_seconds: float
    engine: str
    dry_run: bool


def serve(options: Serving) -> None:
    """Check, load, serve until a signal."""
    from peftkit.serving.server import read_key

    _check(options)
    key = read_key(options.api_key_file, api_key_of_environment())
    if options.engine == "vllm":
        _serve_by_vllm(options, key)
        return
    _serve(options, key)


def _check(options: Serving) -> None:
    if options.engine not in ("peftkit", "vllm"):
        raise RecipeError(f"--engine: `{options.engine}` is not allowed; it takes peftkit | vllm")
    if options.dry_run and options.engine == "peftkit":
        raise RecipeError("--dry-run: has no effect without --engine vllm")
    missing = [name.replace("_", "-") for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"serve: {', '.join(missing)} is not installed; `pip install 'peftkit[serve]'` adds it")
    if options.adapters_dir is not None and not options.adapters_dir.is_dir():
        raise RecipeError(f"--adapters-dir {options.adapters_dir}: there is no such folder")
    if options.allows_changes and options.adapters_dir is None:
        raise RecipeError("--allow-adapter-changes: has no effect without --adapters-dir, the folder that they come from")


def _serve(options: Serving, key: str | None) -> None:
    from peftkit.serving.server import listen, require_key

    require_key(options.host, key)
    place = listen(options.host, options.port)
    with stops_at_once("while the adapters were loaded; nothing was served yet"):
        from peftkit.engine.guard import answering_remedies, explain_exhaustion, memory_text
        from peftkit.engine.service import Service
        from peftkit.engine.several import Several, name_adapters, survey

        adapters = name_adapters(options.adapters)
        survey(adapters, options.base)
        several = Several(options.base)
        with explain_exhaustion(lambda: memory_text("while the adapters were loaded", answering_remedies(1))):
            for name, path in adapters.items():
                several.load(name, path)
        service = Service(several, options.limits, options.adapters_dir)
    for line in several.description():
        console.print_note(line)
    _run(options, key, service, place)


def _run(options: Serving, key: str | None, service: Engine, place: socket.socket) -> None:
    from peftkit.serving.app import make_app
    from peftkit.serving.guard import LOOPBACK
    from peftkit.serving.server import Server

    allows = options.adapters_dir is not None and (key is not None or options.allows_changes)
    hosts = LOOPBACK if key is None else ()
    app = make_app(service, api_key=key, allows_changes=allows, hosts=hosts)
    host, port = place.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    ready = f"serving at {address}/ (chat page), {address}/v1 (API), {address}/metrics"
    server = Server(app, service, options.grace_seconds, lambda: console.print_note(ready))
    server.run(sockets=[place])
    if server.num_cut_off:
        console.print_note(f"{server.num_cut_off} answers were cut off: --grace-seconds is {options.grace_seconds:g}")
    if server.signal_number == signal.SIGINT:
        raise Stopped("interrupted", 130)


def _serve_by_vllm(options: Serving, key: str | None) -> None:
    from peftkit.adapters import adapter_folder
    from peftkit.engine.several import name_adapters, survey
    from peftkit.exports.subject import read_subject
    from peftkit.serving.server import require_key
    from peftkit.serving.vllm import require_vllm, vllm_command

    require_key(options.host, key)
    adapters = {name: adapter_folder(path) for name, path in name_adapters(options.adapters).items()}
    survey(adapters, options.base)
    subjects = {name: read_subject(folder, options.base) for name, folder in adapters.items()}
    command = vllm_command(subjects, options.host, options.port)
    if options.dry_run:
        console.print_text(shlex.join(command))
        return
    require_vllm()
    become(command, {} if key is None else {"VLLM_API_KEY": key})
