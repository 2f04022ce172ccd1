"""A thread beside the cycle that reads the journal, keeps the metrics and tells the webhook.

    REGISTRY/continual/notified.json    up to which pass the webhook was told, and how often with which outcome

The cycle does not know of it: it never waits for it, and no error here changes a decision. Metrics and messages follow
from the journal, so a decision whose process died before the message is told by the next start. A message that could
not be delivered within its deadline is counted and not sent again.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self

from data.errors import WindlassError
from launch.continual.files import Files, json_bytes, read_record
from launch.continual.journal import Journal, Pass, PassState
from launch.continual.metrics import MetricsSettings, ServiceCollector
from launch.continual.reasons import Decision
from launch.continual.registry import Registry
from launch.continual.results import Result
from launch.continual.webhook import Webhook, WebhookSettings
from reward.bearer import required_token

FORMAT: Final = 1
TICK_S: Final = 1.0


class Observer:
    """Watches one registry while its service runs; use as a context manager."""

    def __init__(
        self,
        registry: Registry,
        metrics: MetricsSettings,
        webhook: WebhookSettings,
        *,
        deliver: Webhook | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            registry: of the service; its journal is read.
            metrics: where they go.
            webhook: who is told.
            deliver: delivers the messages; by default as `webhook` says.
            clock: seconds since 1970.

        Raises:
            RequestError: a port in use, an address without a token, or a secret that is not set.
        """
        self._registry = registry
        self._journal = Journal(registry.root / "continual" / "journal", Files())
        self._state = registry.root / "continual" / "notified.json"
        self._metrics = metrics
        self._webhook = deliver or (Webhook(webhook) if webhook.url is not None else None)
        self._grace_s = webhook.deadline_s
        self._clock = clock
        self.collector = ServiceCollector()
        if metrics.port is not None:
            token = required_token("continual.metrics.host", metrics.host, metrics.token_env)
            self.collector.listen(metrics.host, metrics.port, token)
        self._seen = -1
        self._told, self._deliveries = self._begin()
        if self._webhook is not None:
            # So that a decision is told even when its process dies before anybody was.
            self._keep()
        self._stop = threading.Event()
        self._look = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="observer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End with a last look; what the deadline leaves no time for is told by the next start."""
        self._stop.set()
        self._thread.join(self._grace_s + TICK_S)

    def looked(self, results: Sequence[Result]) -> None:
        """The service worked through the log without an error."""
        waiting = Counter(one.reasons[0].reason.value for one in results if one.decision is Decision.WAITING)
        with self._look:
            self.collector.facts = replace(self.collector.facts, waiting=waiting, looked_at=self._clock())
            self._seen = -1

    def tick(self) -> None:
        """Look at the journal, if it changed."""
        folder = self._journal.root
        changed = folder.stat().st_mtime_ns if folder.exists() else 0
        with self._look:
            if changed == self._seen:
                return
            self._seen = changed
        passes = self._journal.passes()
        self._show(passes)
        for one in passes:
            if self._webhook is None or one.order <= self._told or one.state is not PassState.DONE:
                continue
            if one.decision in (Decision.PROMOTED, Decision.REJECTED):
                self._deliveries[self._webhook.deliver(self._message(one)).value] += 1
            self._told = one.order
            self._keep()
        self._show(passes)

    def _watch(self) -> None:
        while True:
            last = self._stop.wait(TICK_S)
            try:
                self.tick()
            except (OSError, WindlassError) as error:
                # Nobody's decision depends on it; the next look tries again.
                self._seen = -1
                print(f"continual: metrics or webhook: {error}", flush=True)
            if last:
                return

    def _show(self, passes: Sequence[Pass]) -> None:
        promotions = self._registry.promotions()
        with self._look:
            self.collector.facts = replace(
                self.collector.facts,
                passes=passes,
                version=self._registry.version(promotions[-1].version).name if promotions else None,
                promoted_at=promotions[-1].at if promotions else None,
                deliveries=dict(self._deliveries),
            )
        if self._metrics.textfile is not None:
            self.collector.write(self._metrics.textfile)

    def _message(self, one: Pass) -> dict[str, Any]:
        names = self._registry.numbers()
        return {
            **Result.of(one).record(),
            "registry": str(self._registry.root),
            "policy_version": self._registry.version(one.candidate).name if one.candidate in names else None,
            "decided_at": one.decided_at,
        }

    def _begin(self) -> tuple[int, Counter[str]]:
        """Where the last start stopped; the history before the first one is told to nobody."""
        if self._state.exists():
            content = read_record(self._state, FORMAT, "what the observer wrote")
            return int(content["order"]), Counter(content["deliveries"])
        passes = self._journal.passes() if self._journal.root.exists() else []
        return max((one.order for one in passes if one.state is PassState.DONE), default=-1), Counter()

    def _keep(self) -> None:
        content = {"format": FORMAT, "order": self._told, "deliveries": dict(self._deliveries)}
        self._state.parent.mkdir(parents=True, exist_ok=True)
        Files().replace_file(self._state, json_bytes(content))
