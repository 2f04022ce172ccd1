"""What the service did, for Prometheus: read from the journal, so that cron jobs count on."""

from __future__ import annotations

import hmac
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, generate_latest, make_wsgi_app, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer
from pydantic import Field

from data.errors import RequestError
from data.settings import Settings
from launch.continual.journal import Pass, PassState
from launch.continual.reasons import Decision
from launch.continual.webhook import Delivery

PREFIX = "windlass_continual"


class MetricsSettings(Settings):
    """Where the metrics of the service are found."""

    textfile: Path | None = None
    """File (`NAME.prom`) for the node exporter's textfile collector, replaced as a whole; null writes none."""
    port: int | None = Field(None, ge=1, le=65535)
    """Port that answers GET /metrics while the service runs; null opens none."""
    host: str = "127.0.0.1"
    """Address of that port. Any address but a loopback one requires the token."""
    token_env: str = Field("WINDLASS_METRICS_TOKEN", min_length=1)
    """Environment variable with the bearer token of whoever asks; the token itself never enters a configuration."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that the metrics are made of."""

    passes: Sequence[Pass] = ()
    version: str | None = None
    """Name of the served version."""
    promoted_at: float | None = None
    """Seconds since 1970 of the last promotion."""
    looked_at: float | None = None
    """Seconds since 1970 when the service last worked through the log without an error."""
    waiting: Mapping[str, int] = field(default_factory=dict)
    """Days that wait, by reason, at the last look."""
    deliveries: Mapping[str, int] = field(default_factory=dict)
    """Webhook messages by `Delivery`."""


class ServiceCollector:
    """Turns facts into metrics whenever somebody asks."""

    def __init__(self) -> None:
        self.facts = Facts()
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Every metric."""
        facts = self.facts
        done = [one for one in facts.passes if one.state is PassState.DONE]
        decisions = Counter(one.decision for one in done)
        rows: Counter[str] = Counter()
        for one in done:
            rows.update(one.counts)
        seconds = [one.decided_at - one.began_at for one in done if one.decided_at is not None]
        yield _counter(
            "decisions",
            "Passes by decision",
            "decision",
            {kind.value: decisions[kind] for kind in Decision if kind is not Decision.WAITING},
        )
        yield _counter(
            "reasons", "Reasons of decisions", "reason", Counter(r.reason.value for p in done for r in p.reasons)
        )
        yield _counter("rows", "Rows by what became of them", "reason", rows)
        summary = SummaryMetricFamily(
            f"{PREFIX}_partition_seconds",
            "Seconds from the beginning of a pass to its decision, interruptions included",
        )
        summary.add_metric([], count_value=len(seconds), sum_value=sum(seconds))
        yield summary
        yield _gauge("last_partition_seconds", "The same of the last pass", seconds[-1] if seconds else None)
        yield _gauge("last_success_timestamp_seconds", "When the log was last worked through", facts.looked_at)
        yield _gauge("last_promotion_timestamp_seconds", "When a version was last promoted", facts.promoted_at)
        yield _counter(
            "webhooks",
            "Webhook messages by outcome",
            "outcome",
            {kind.value: facts.deliveries.get(kind.value, 0) for kind in Delivery},
        )
        version = GaugeMetricFamily(f"{PREFIX}_version", "1 for the served version", labels=["version"])
        if facts.version is not None:
            version.add_metric([facts.version], 1)
        yield version
        waiting = GaugeMetricFamily(f"{PREFIX}_waiting_days", "Days that wait, at the last look", labels=["reason"])
        for reason, count in sorted(facts.waiting.items()):
            waiting.add_metric([reason], count)
        yield waiting

    def text(self) -> str:
        """In the format of Prometheus."""
        return generate_latest(self.registry).decode()

    def write(self, path: Path) -> None:
        """Replace a textfile as a whole."""
        write_to_textfile(str(path), self.registry)

    def listen(self, host: str, port: int, token: str | None) -> None:
        """Answer GET /metrics in a thread until the process ends, with a token only to who sends it.

        Raises:
            RequestError: an address that cannot be listened on.
        """

        class Server(ThreadingWSGIServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        try:
            server = make_server(host, port, guarded(make_wsgi_app(self.registry), token), Server, _Silent)
        except OSError as error:
            legal = "a free port of this machine"
            raise RequestError("continual.metrics.port", f"{host}:{port} ({error.strerror})", legal) from error
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


class _Silent(WSGIRequestHandler):
    """Writes no line for every scrape."""

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def guarded(app: Any, token: str | None) -> Any:
    """A WSGI application that answers 401 to who does not send the bearer token; the application itself without one."""
    if token is None:
        return app
    wanted = b"Bearer " + token.encode()

    def checked(environ: dict[str, Any], start: Any) -> Any:
        given = environ.get("HTTP_AUTHORIZATION", "").encode("latin-1")
        if hmac.compare_digest(given, wanted):
            return app(environ, start)
        start("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Type", "text/plain")])
        return [b"the bearer token is missing or wrong\n"]

    return checked


def _counter(name: str, text: str, label: str, values: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=[label])
    for value, count in sorted(values.items()):
        family.add_metric([value], count)
    return family


def _gauge(name: str, text: str, value: float | None) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", text)
    if value is not None:
        family.add_metric([], value)
    return family
