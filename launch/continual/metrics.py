"""What the service did, for Prometheus: read from the journal, so that cron jobs count on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest, start_http_server, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
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
    """Address of that port."""


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

    def listen(self, host: str, port: int) -> None:
        """Answer GET /metrics in a thread until the process ends.

        Raises:
            RequestError: an address that cannot be listened on.
        """
        try:
            start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            legal = "a free port of this machine"
            raise RequestError("continual.metrics.port", f"{host}:{port} ({error.strerror})", legal) from error


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
