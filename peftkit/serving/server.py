"""The HTTP server: where it listens, and how it ends."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from peftkit.errors import RecipeError
from peftkit.serving.guard import LOOPBACK
from peftkit.serving.jobs import Engine

_LAST_SECONDS = 5  # for responses that are complete and not sent yet


class Server(uvicorn.Server):
    """Ends on a signal when all that was taken is answered; takes nothing new meanwhile.

    Args:
        app: the endpoints.
        engine: the model.
        grace_seconds: longest time to finish; at a second signal there is none.
        on_ready: called when clients can come.
    """

    def __init__(self, app: Any, engine: Engine, grace_seconds: float, on_ready: Callable[[], None] = lambda: None) -> None:
        options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "lifespan": "off"}
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=_LAST_SECONDS, **options))
        self._engine, self._grace_seconds, self._on_ready = engine, grace_seconds, on_ready
        self.signal_number = 0
        self.num_cut_off = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """As a signal handler: uvicorn's own would stop listening at once, and leave new clients without an answer."""
        again, self.signal_number = bool(self.signal_number), sig
        if again:
            self._grace_seconds = 0.0
        threading.Thread(target=self._finish, daemon=True).start()

    def _finish(self) -> None:
        self.num_cut_off += self._engine.close(self._grace_seconds)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address, which nobody else has.

    Raises:
        RecipeError: there is no such address here, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as error:
        raise RecipeError(f"--host {host} --port {port}: cannot listen there: {error}") from error
    return found


def require_key(host: str, api_key: str | None) -> None:
    """Raise RecipeError for a server that anybody in the network could use."""
    if host not in LOOPBACK and api_key is None:
        raise RecipeError(
            f"--host {host}: others can reach it, so it needs an API key: --api-key-file FILE, or the environment variable "
            "PEFTKIT_API_KEY"
        )


def read_key(path: Path | None, from_environment: str | None) -> str | None:
    """The API key, of a file or else of the environment.

    Raises:
        RecipeError: it cannot be read, or is no key.
    """
    key, where = from_environment, "PEFTKIT_API_KEY"
    if path is not None:
        where = f"--api-key-file {path}"
        try:
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise RecipeError(f"{where}: cannot be read: {error}") from error
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise RecipeError(f"{where}: a key has one or more printable ASCII characters, and no spaces")
    return key
