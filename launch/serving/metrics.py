"""What the service counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from launch.serving.refusals import Refusal

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ServiceMetrics:
    """Counters of one process; they begin at 0 when it starts."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"windlass_serve_{name}", text, labels, registry=self._registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"windlass_serve_{name}", text, labels, registry=self._registry)

        self.requests = counter("requests", "Requests by route and HTTP status", "route", "status")
        self.seconds = Histogram(
            "windlass_serve_seconds",
            "Seconds of a request, waiting included",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.batch = Histogram(
            "windlass_serve_batch_size",
            "Requests that one call of the engines answered",
            buckets=_SIZES,
            registry=self._registry,
        )
        self.engine_seconds = counter("engine_seconds", "Seconds in which the engines worked")
        self.disk_seconds = counter("disk_seconds", "Seconds until batches were on the disk")
        self.exposures = counter("exposures_written", "Requests in the feedback log, by version", "version")
        self.feedback = counter("feedback", "Responses by what became of them", "outcome")
        self.errors = counter("errors", "Requests without an answer, by reason", "reason")
        self.unknown_items = counter("unknown_items", "Items of requests that the catalogue does not have")
        self.switches = counter("switches", "Changes of the version, by outcome", "outcome")
        self.days = counter("days_closed", "Days of the log that were closed")
        self.day_errors = counter("days_failed", "Attempts to close days that the disk refused")
        self.waiting = gauge("waiting", "Requests under way")
        self.open_requests = gauge("open_requests", "Requests that may still be responded to")
        self.version = gauge("version", "1 for the version that answers", "version")
        for reason in Refusal:
            self.errors.labels(reason.value)

    def serves(self, version: str) -> None:
        """From now on this version answers."""
        self.version.clear()
        self.version.labels(version).set(1)

    def joined(self, outcomes: Mapping[str, int]) -> None:
        """What became of some responses."""
        for outcome, count in outcomes.items():
            self.feedback.labels(outcome).inc(count)

    def text(self) -> bytes:
        """In the format of Prometheus."""
        return generate_latest(self._registry)
