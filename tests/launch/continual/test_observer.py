"""Contract: promotions and rejections are told once each, in order, signed, also when the process that decided died
before; a receiver that fails, hangs or refuses costs its deadline and a count, and changes neither a decision nor what
is on the disk; metrics are those of the journal, in a textfile and on a port, which others reach with a token only.

The updater is the stub of world.py; messages travel over real HTTP to a server of this process. `windlass continual`
with these settings: tests/launch/serving/test_whole_circle.py.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from data.errors import RequestError
from launch.continual.metrics import MetricsSettings
from launch.continual.observer import Observer
from launch.continual.registry import Registry
from launch.continual.webhook import SIGNATURE, Delivery, Webhook, WebhookSettings, signature
from reward.service import free_port
from tests.launch.continual.world import content, cycle, first_model, first_name, write_log


class Receiver:
    """A server that answers with the given statuses, then 200."""

    def __init__(self, statuses: list[int]) -> None:
        self.statuses = statuses
        self.messages: list[tuple[dict[str, Any], str | None, bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status = receiver.statuses.pop(0) if receiver.statuses else 200
                if status == 200:
                    receiver.messages.append((json.loads(body), self.headers[SIGNATURE], body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                return None

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver([])
    yield made
    made.server.shutdown()
    made.server.server_close()


def run_cycle(folder: Path) -> Registry:
    """Work through the log of world.py."""
    write_log(folder / "log", first_name(folder))
    cycle(folder / "log", folder / "root", first_model(folder / "model")).run()
    return Registry(folder / "root")


def test_decisions_are_told_once_and_signed(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_SECRET", "s3cret")
    hook = WebhookSettings(url=receiver.url, secret_env="HOOK_SECRET", deadline_s=10)
    write_log(tmp_path / "log", first_name(tmp_path))
    service = cycle(tmp_path / "log", tmp_path / "root", first_model(tmp_path / "model"))
    registry = Registry(tmp_path / "root")
    Observer(registry, MetricsSettings(), hook)
    # That process died; the next one decides, and dies before it tells.
    service.run()
    receiver.statuses = [500, 429]
    for _ in range(2):
        observer = Observer(registry, MetricsSettings(), hook)
        observer.tick()
        observer.tick()
    told = [(message["day"], message["decision"]) for message, _, _ in receiver.messages]
    decided = [
        (one.day, one.decision.value)
        for one in service._journal.passes()
        if one.decision is not None and one.decision.value in ("promoted", "rejected")
    ]
    assert told == decided
    assert {decision for _, decision in told} == {"promoted", "rejected"}
    for message, signed, body in receiver.messages:
        assert signed == signature(b"s3cret", body)
        assert registry.resolve(message["policy_version"]).number == message["version"]
        assert message["reasons"]
    assert 'webhooks_total{outcome="delivered"} ' + f"{len(told)}.0" in observer.collector.text()


def test_history_is_told_to_nobody(tmp_path: Path, receiver: Receiver) -> None:
    registry = run_cycle(tmp_path)
    Observer(registry, MetricsSettings(), WebhookSettings(url=receiver.url)).tick()
    assert not receiver.messages


class Clock:
    """Time that passes only by sleeping, and by attempts that take their timeout."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("status", "outcome", "attempts"),
    [(204, Delivery.DELIVERED, 1), (410, Delivery.REFUSED, 1), (500, Delivery.FAILED, 5), (0, Delivery.FAILED, 3)],
)
def test_a_message_costs_at_most_its_deadline(status: int, outcome: Delivery, attempts: int) -> None:
    clock = Clock()
    tried: list[float] = []

    def post(url: str, body: bytes, headers: Any, timeout_s: float) -> int:
        tried.append(clock.now)
        if status == 0:
            clock.sleep(timeout_s)
            raise OSError("no answer")
        return status

    hook = Webhook(WebhookSettings(url="http://x", deadline_s=12), post=post, clock=clock, sleep=clock.sleep)
    assert hook.deliver({}) is outcome
    assert len(tried) == attempts
    assert clock.now <= 12


def test_a_dead_receiver_changes_nothing(tmp_path: Path) -> None:
    plain = run_cycle(tmp_path)
    # The same log, because the journal knows when its files changed.
    service = cycle(tmp_path / "log", tmp_path / "observed", first_model(tmp_path / "model"))
    registry = Registry(tmp_path / "observed")
    # Nobody listens there, and the textfile cannot be written.
    hook = WebhookSettings(url=f"http://127.0.0.1:{free_port('127.0.0.1')}", deadline_s=0.2)
    with Observer(registry, MetricsSettings(textfile=tmp_path / "no" / "folder.prom"), hook) as observer:
        observer.looked(service.run())
    observer._metrics = MetricsSettings()
    observer.tick()
    state = json.loads((registry.root / "continual" / "notified.json").read_text())
    assert state["deliveries"]["failed"] >= 2
    (registry.root / "continual" / "notified.json").unlink()
    assert content(registry.root) == content(plain.root)


def test_metrics_are_those_of_the_journal(tmp_path: Path) -> None:
    write_log(tmp_path / "log", first_name(tmp_path))
    service = cycle(tmp_path / "log", tmp_path / "root", first_model(tmp_path / "model"))
    registry = Registry(tmp_path / "root")
    port = free_port("127.0.0.1")
    textfile = tmp_path / "windlass.prom"
    metrics = MetricsSettings(textfile=textfile, port=port)
    with Observer(registry, metrics, WebhookSettings(), clock=lambda: 1234.0) as observer:
        observer.looked(service.run())
        observer.tick()
        page = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    current = registry.current()
    assert current is not None
    passes = service._journal.passes()
    text = textfile.read_text()
    for wanted in (
        *(
            f'windlass_continual_decisions_total{{decision="{kind}"}} '
            f"{float(sum(one.decision is not None and one.decision.value == kind for one in passes))}"
            for kind in ("promoted", "rejected", "skipped")
        ),
        f'windlass_continual_rows_total{{reason="train"}} {float(sum(one.counts.get("train", 0) for one in passes))}',
        f'windlass_continual_rows_total{{reason="duplicate_request"}} '
        f"{float(sum(one.counts.get('duplicate_request', 0) for one in passes))}",
        'windlass_continual_reasons_total{reason="missing_day"} 1.0',
        f"windlass_continual_partition_seconds_count {float(len(passes))}",
        f'windlass_continual_version{{version="{current.name}"}} 1.0',
        "windlass_continual_last_success_timestamp_seconds 1234.0",
    ):
        assert wanted in text, text
        assert wanted in page
    with pytest.raises(RequestError, match=r"continual\.metrics\.port"):
        Observer(registry, MetricsSettings(port=port), WebhookSettings())


def test_a_port_for_others_wants_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, port = run_cycle(tmp_path), free_port("0.0.0.0")
    metrics = MetricsSettings(port=port, host="0.0.0.0", token_env="SCRAPE")
    monkeypatch.delenv("SCRAPE", raising=False)
    with pytest.raises(
        RequestError, match=r"continual\.metrics\.host: 0\.0\.0\.0; legal: 127\.0\.0\.1, .* variable SCRAPE"
    ):
        Observer(registry, metrics, WebhookSettings())
    monkeypatch.setenv("SCRAPE", "s3cret")
    Observer(registry, metrics, WebhookSettings())
    url = f"http://127.0.0.1:{port}/metrics"
    for given, status in ((None, 401), ("Bearer other", 401), ("Bearer s3cret", 200)):
        headers = {} if given is None else {"Authorization": given}
        answer = httpx.get(url, headers=headers, trust_env=False)
        assert answer.status_code == status
        assert ("windlass_continual" in answer.text) == (status == 200)


def test_a_secret_that_is_not_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_SECRET", raising=False)
    with pytest.raises(RequestError, match="NO_SUCH_SECRET is not set"):
        Webhook(WebhookSettings(url="http://x", secret_env="NO_SUCH_SECRET"))
