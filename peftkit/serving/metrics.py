"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from peftkit.serving.jobs import Engine

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Requests, tokens and the work that waits.

    Args:
        engine: whose work it is.
    """

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        told = "Requests by endpoint and HTTP status."
        self.requests = Counter("peftkit_requests", told, ["endpoint", "status"], registry=registry)
        told = "Time of a request."
        self.seconds = Histogram("peftkit_request_seconds", told, ["endpoint"], registry=registry, buckets=_SECONDS)
        told = "Time to the first piece of text."
        self.first_token = Histogram("peftkit_first_token_seconds", told, ["model"], registry=registry, buckets=_SECONDS)
        self.prompt_tokens = Counter("peftkit_prompt_tokens", "Tokens read.", ["model"], registry=registry)
        self.answer_tokens = Counter("peftkit_answer_tokens", "Tokens written.", ["model"], registry=registry)
        self.gone = Counter("peftkit_clients_gone", "Requests whose client left before the end.", registry=registry)
        waiting = Gauge("peftkit_waiting", "Answers that wait.", registry=registry)
        waiting.set_function(lambda: engine.load_of_work()[0])
        running = Gauge("peftkit_running", "Answers that are being made.", registry=registry)
        running.set_function(lambda: engine.load_of_work()[1])

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
