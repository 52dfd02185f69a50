"""What Prometheus reads of a server: requests, their seconds, batches, and what waits."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class ServerMetrics:
    """The figures of one server.

    Attributes:
        answered: How many requests were answered.
    """

    def __init__(self) -> None:
        self.answered = 0
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter("hf_clip_requests", "Requests answered.", ["route", "status"], **options)
        self._seconds = Histogram(
            "hf_clip_request_seconds", "Seconds of a request.", ["route"], buckets=SECONDS, **options
        )
        self._items = Counter("hf_clip_items", "Texts and images encoded.", ["kind"], **options)
        self._batches = Histogram(
            "hf_clip_batch_size", "Texts or images in a batch.", ["kind"], buckets=SIZES, **options
        )
        self._model = Counter("hf_clip_model_seconds", "Seconds in which the model computed.", ["kind"], **options)
        self._waiting = Gauge("hf_clip_waiting", "Texts and images that wait or are computed.", ["kind"], **options)

    def watch(self, kind: str, waiting: Callable[[str], int]) -> None:
        """Show how much of a kind waits whenever the figures are read."""
        self._waiting.labels(kind).set_function(lambda: waiting(kind))

    def on_batch(self, kind: str, size: int, seconds: float) -> None:
        """Count a batch."""
        self._items.labels(kind).inc(size)
        self._batches.labels(kind).observe(size)
        self._model.labels(kind).inc(seconds)

    def on_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.answered += 1
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All figures in Prometheus' format."""
        return generate_latest(self.registry)


__all__ = ["ServerMetrics"]
