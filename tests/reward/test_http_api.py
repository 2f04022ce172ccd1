"""Contract: the HTTP face in process: scores as the ranker's, reasons per sample, 401 without the token, 413 beyond the
body limit before the body is read whole, 422 for what is no request, health, metrics, OpenAPI; deadlines and a hanging
ranker. The client over the same face: retries, reasons, foreign replies.

Not checked here: Ray Serve (test_service).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from data.records import RewardFailure
from reward.client import HttpAttempt, RewardClient, checked, parse_response
from reward.replica import ReplicaOptions, RewardReplica
from reward.settings import RewardSettings
from reward.wire import ScoreCall, ScoreReply
from tests.reward.rankers import FaultyRanker


def replica(*, seconds: float = 30.0, **options: Any) -> RewardReplica:
    defaults = {"ranker": "given", "chunk": 2, "deadline_s": 5.0}
    return RewardReplica(ReplicaOptions(**(defaults | options)), FaultyRanker(seconds=seconds))


def web(**options: Any) -> TestClient:
    return TestClient(replica(**options).__serve_build_asgi_app__(), raise_server_exceptions=False)


def test_score_gives_scores_and_reasons_per_sample() -> None:
    answer = web().post("/score", json={"histories": [[1, 2], [9001], []], "candidates": [[3, 4], [5], [6]]})
    assert answer.status_code == 200
    assert answer.json() == {"scores": [[2003.0, 2004.0], None, [-994.0]], "failures": ["", "non_finite", ""]}


def test_health_metrics_and_openapi() -> None:
    with web() as client:
        client.post("/score", json={"histories": [[1], [9001]], "candidates": [[3], [5]]})
        assert client.get("/healthz").text == "ok"
        text = client.get("/metrics").text
        assert 'windlass_reward_calls_total{transport="http"} 1.0' in text
        assert 'windlass_reward_samples_total{outcome="scored"} 1.0' in text
        assert 'windlass_reward_samples_total{outcome="non_finite"} 1.0' in text
        schema = client.get("/openapi.json").json()
        assert set(schema["paths"]) == {"/score", "/swaps", "/healthz", "/metrics"}
        assert set(schema["components"]["schemas"]["ScoreResponse"]["properties"]) == {
            "scores",
            "failures",
            "variances",
        }


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"histories": [[1]]}',
        b'{"histories": [[1]], "candidates": []}',
        b'{"histories": [[1.5]], "candidates": [[1]]}',
        b'{"histories": [["1"]], "candidates": [[1]]}',
        b'{"histories": [[99999999999]], "candidates": [[1]]}',
        b'{"histories": [[1]], "candidates": [[1]], "more": 1}',
        b"\xff\x00",
    ],
)
def test_what_is_no_request_is_refused(body: bytes) -> None:
    answer = web().post("/score", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)


def test_token_is_required_everywhere_but_for_health() -> None:
    client = web(token="secret")
    body = {"histories": [[1]], "candidates": [[3]]}
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        assert client.post("/score", json=body, headers=header).status_code == 401
        assert client.get("/metrics", headers=header).status_code == 401
        assert client.get("/openapi.json", headers=header).status_code == 401
    assert client.get("/healthz").status_code == 200
    assert client.post("/score", json=body, headers={"Authorization": "Bearer secret"}).status_code == 200


def test_nothing_is_read_of_a_body_that_comes_without_the_token() -> None:
    app = replica(token="secret").__serve_build_asgi_app__()
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/score", "method": "POST", "headers": []}
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 401


def test_a_body_beyond_the_limit_is_refused_before_it_is_read_whole() -> None:
    app = replica(max_body_bytes=1000).__serve_build_asgi_app__()
    received = 0

    async def receive() -> dict[str, Any]:
        nonlocal received
        received += 1
        return {"type": "http.request", "body": b"x" * 400, "more_body": True}

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/score", "method": "POST", "headers": []}
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 413
    assert received == 3
    declared = TestClient(app).post("/score", content=b"x" * 1001)
    assert declared.status_code == 413
    assert "1000 bytes" in declared.json()["detail"]


def test_a_slow_ranker_meets_the_deadline_and_is_reported_as_hanging() -> None:
    slow = replica(deadline_s=0.2, seconds=1.2)
    client = TestClient(slow.__serve_build_asgi_app__())
    start = time.monotonic()
    answer = client.post("/score", json={"histories": [[9006], [1]], "candidates": [[1], [1]]})
    assert answer.json()["failures"] == ["timeout", "timeout"]
    assert time.monotonic() - start < 1
    slow.check_health()
    time.sleep(0.4)
    assert client.get("/healthz").status_code == 503
    with pytest.raises(RuntimeError, match="hangs"):
        slow.check_health()
    time.sleep(0.9)
    slow.check_health()
    answer = client.post("/score", json={"histories": [[1]], "candidates": [[1]]})
    assert answer.json()["failures"] == [""]


def caller(handler: Callable[[httpx.Request], httpx.Response], **settings: Any) -> tuple[RewardClient, list[float]]:
    pauses: list[float] = []
    attempt = HttpAttempt("http://reward", "secret", transport=httpx.MockTransport(handler))
    return RewardClient(attempt, RewardSettings(**settings), sleep=pauses.append), pauses


HISTORIES = [np.array([1, 2], np.int32), np.array([], np.int32)]
CANDIDATES = [np.array([3, 4], np.int32), np.array([5], np.int32)]


def answer_with(request: httpx.Request) -> httpx.Response:
    assert request.headers["authorization"] == "Bearer secret"
    assert json.loads(request.content) == {"histories": [[1, 2], []], "candidates": [[3, 4], [5]]}
    return httpx.Response(200, json={"scores": [[0.1, 2.0], None], "failures": ["", "non_finite"]})


def test_client_returns_exact_float32_scores_and_does_not_repeat_what_cannot_pass() -> None:
    client, pauses = caller(answer_with)
    result = client.score(HISTORIES, CANDIDATES)
    assert result.scores[0].tobytes() == np.array([0.1, 2.0], np.float32).tobytes()
    assert result.failure_N.tolist() == ["", "non_finite"]
    assert (client.requests, pauses) == (1, [])


def test_client_repeats_with_growing_pauses_and_then_gives_up_with_a_reason() -> None:
    def down(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    client, pauses = caller(down, retries=3, backoff_s=0.5)
    assert client.score(HISTORIES, CANDIDATES).failure_N.tolist() == ["unavailable"] * 2
    assert (client.requests, pauses) == (4, [0.5, 1.0, 2.0])


def test_client_recovers_when_a_later_attempt_succeeds() -> None:
    replies = [httpx.Response(503), httpx.Response(200, content=b"not json")]
    client, _ = caller(lambda request: replies.pop(0) if replies else answer_with(request))
    assert client.score(HISTORIES, CANDIDATES).failure_N.tolist() == ["", "non_finite"]
    assert client.requests == 3


def with_variances(variances: Any) -> httpx.Response:
    body = {"scores": [[1.0, 2.0], [1.0]], "failures": ["", ""], "variances": variances}
    return httpx.Response(200, json=body)


def test_variances_come_beside_the_scores() -> None:
    client, _ = caller(lambda request: with_variances([[0.1, 3], [4]]), retries=0)
    result = client.score(HISTORIES, CANDIDATES)
    assert result.failure_N.tolist() == ["", ""]
    assert result.variances is not None
    assert result.variances[0].tobytes() == np.array([0.1, 3], np.float32).tobytes()
    for again in (ScoreReply.pack(result).unpack(), checked(result, ScoreCall.pack(HISTORIES, CANDIDATES))):
        assert again.variances is not None
        assert [row.tolist() for row in again.variances] == [row.tolist() for row in result.variances]
    plain, _ = caller(answer_with)
    assert plain.score(HISTORIES, CANDIDATES).variances is None


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (httpx.Response(401), "bad_request"),
        (httpx.Response(413), "bad_request"),
        (httpx.Response(500), "error"),
        (httpx.Response(504), "timeout"),
        (httpx.Response(502), "unavailable"),
        (httpx.Response(200, content=b"[]"), "error"),
        (httpx.Response(200, json={"scores": [[1.0]], "failures": [""]}), "error"),
        (httpx.Response(200, json={"scores": [[1.0], [1.0]], "failures": ["", "odd"]}), "error"),
        (httpx.Response(200, content=b'{"scores": [[NaN, 1], [Infinity]], "failures": ["", ""]}'), "non_finite"),
        (httpx.Response(200, json={"scores": [[[1]], [1.0]], "failures": ["", ""]}), "error"),
        (httpx.Response(200, json={"scores": [["x"], [1.0]], "failures": ["", ""]}), "error"),
        (with_variances([[1, 0], [0]]), "non_finite"),
        (with_variances([[1, -1], [-1]]), "non_finite"),
        (with_variances([[1], [1, 2]]), "error"),
        (with_variances([[1, 2]]), "error"),
        (with_variances([None, None]), "error"),
        (with_variances([[[1]], [1]]), "error"),
        (with_variances(3), "error"),
    ],
)
def test_every_wrong_reply_has_a_reason(reply: httpx.Response, reason: str) -> None:
    client, _ = caller(lambda request: reply, retries=0)
    result = client.score(HISTORIES, CANDIDATES)
    assert set(result.failure_N.tolist()) == {reason}
    assert all(len(row) == 0 for row in result.scores)


def test_a_slow_reply_is_cut_at_the_deadline() -> None:
    class Dribble(httpx.SyncByteStream):
        def __iter__(self) -> Any:
            for _ in range(50):
                time.sleep(0.05)
                yield b" "

    client, _ = caller(lambda request: httpx.Response(200, stream=Dribble()), retries=0, deadline_s=0.2)
    start = time.monotonic()
    assert set(client.score(HISTORIES, CANDIDATES).failure_N.tolist()) == {RewardFailure.TIMEOUT.value}
    assert time.monotonic() - start < 1.5


def test_random_bytes_are_no_reply() -> None:
    random = np.random.default_rng(0)
    call = ScoreCall.pack(HISTORIES, CANDIDATES)
    for _ in range(300):
        parsed = parse_response(random.bytes(int(random.integers(0, 60))))
        assert parsed is None or set(checked(parsed, call).failure_N.tolist()) <= {"error"}
