"""Contract: swap credit as the reward service answers it: in process over HTTP, and on real Ray Serve through the
handle and over HTTP, the credits are those of `evaluate_swaps`, with the reasons of lists that failed; scores are
remembered between calls; what a service has not is refused as a bad request; every wrong reply has a reason; settings
that make no sense and classes that cannot be loaded are refused.

Not checked: the credit itself (test_swap_evaluation.py), retries and deadlines, which scores share (test_http_api.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from data.errors import RequestError
from data.records import RewardFailure
from reward.replica import ReplicaOptions, RewardReplica
from reward.service import RewardService, check_service
from reward.settings import RewardSettings, Transport
from reward.swap_client import HttpSwapAttempt, SwapClient, parse_swaps
from reward.swap_credit import SwapForm
from reward.swap_evaluation import ScoreCache, SwapSampling, evaluate_swaps
from tests.requirements import require
from tests.reward.rankers import FaultyRanker, SmallFirst

NAME = "tests.reward.rankers:SmallFirst"
HISTORIES = [np.array(row, np.int32) for row in ([1, 2], [9001], [], [3])]
LISTS = [np.array(row, np.int32) for row in ([5, 3, 4], [1, 2], [], [7, 1, 2, 2])]


def expected(form: SwapForm, swaps: int, seed: int) -> list[list[float]]:
    found = evaluate_swaps(SmallFirst(), HISTORIES, LISTS, form, SwapSampling(swaps=swaps), ScoreCache(100), seed=seed)
    assert found.failure_N.tolist() == ["", "non_finite", "", ""]
    credit_NK = found.credit.credit_NK.numpy().astype(np.float32)
    return [credit_NK[0, :3].tolist(), [], [], credit_NK[3, :4].tolist()]


def web(**options: Any) -> TestClient:
    replica = RewardReplica(ReplicaOptions(**({"list_ranker": NAME, "deadline_s": 5.0} | options)))
    return TestClient(replica.__serve_build_asgi_app__(), raise_server_exceptions=False)


def body(**changes: Any) -> dict[str, Any]:
    lists = {"histories": [row.tolist() for row in HISTORIES], "lists": [row.tolist() for row in LISTS]}
    return lists | {"form": "all_pairs", "swaps": 2, "seed": 5} | changes


def test_credits_come_over_http_and_scores_are_remembered() -> None:
    client = web()
    answer = client.post("/swaps", json=body())
    assert answer.status_code == 200
    first = answer.json()
    assert first["failures"] == ["", "non_finite", "", ""]
    wanted = expected(SwapForm.ALL_PAIRS, 2, 5)
    assert [row or [] for row in first["credits"]] == wanted
    assert first["credits"][1] is None
    again = client.post("/swaps", json=body()).json()
    assert again["credits"] == first["credits"]
    # What was not finite is asked for again; the rest is known.
    assert again["counts"]["swaps/cached"] == first["counts"]["swaps/scored"] - again["counts"]["swaps/scored"] > 0


def test_what_a_service_has_not_is_a_bad_request() -> None:
    assert web().post("/score", json={"histories": [[1]], "candidates": [[2]]}).json()["failures"] == ["bad_request"]
    plain = RewardReplica(ReplicaOptions(ranker="given"), FaultyRanker())
    answer = TestClient(plain.__serve_build_asgi_app__()).post("/swaps", json=body())
    assert answer.json()["failures"] == ["bad_request"] * 4


@pytest.mark.parametrize(
    "changes",
    [{"form": "suffix_dcg"}, {"form": "odd"}, {"swaps": 0}, {"swaps": 5000}, {"seed": -1}, {"lists": [[1]]}, {"k": 1}],
)
def test_what_is_no_request_is_refused(changes: dict[str, Any]) -> None:
    assert web().post("/swaps", json=body(**changes)).status_code == 422


def told(reply: httpx.Response) -> list[str]:
    transport = httpx.MockTransport(lambda request: reply)
    attempt = HttpSwapAttempt("http://reward", "secret", transport=transport)
    settings = RewardSettings(list_ranker=NAME, retries=0)
    client = SwapClient(attempt, settings)
    result = client.credit(HISTORIES[:2], LISTS[:2], SwapForm.CAUSAL, seed=0)
    assert all(len(row) == 0 for row, failure in zip(result.credits, result.failure_N, strict=True) if failure)
    attempt.close()
    return [str(reason) for reason in result.failure_N]


@pytest.mark.parametrize(
    ("content", "reasons"),
    [
        ({"credits": [[1, 2, 3], [0, 1]], "failures": ["", ""], "counts": {}}, ["", ""]),
        ({"credits": [[1, 2, 3], None], "failures": ["", "timeout"]}, ["", "timeout"]),
        ({"credits": [[1, 2], [0, 1]], "failures": ["", ""], "counts": {}}, ["error", ""]),
        ({"credits": [[1, 2, 3], [0, 1]], "failures": ["odd", ""], "counts": {}}, ["error", ""]),
        ({"credits": [[1, 2, 3]], "failures": [""], "counts": {}}, ["error", "error"]),
        ({"credits": [[1, 2, 3], [0, 1e999]], "failures": ["", ""], "counts": {}}, ["", "non_finite"]),
        ({"credits": [[1, 2, 3], [[0], [1]]], "failures": ["", ""], "counts": {}}, ["error", "error"]),
        ({"credits": [[1, 2, 3], [0, 1]], "failures": ["", ""], "counts": {"swaps/lists": "x"}}, ["error", "error"]),
        ({"credits": [[1, 2, 3], [0, 1]], "failures": ["", ""], "counts": 3}, ["error", "error"]),
        ([], ["error", "error"]),
    ],
)
def test_every_wrong_reply_has_a_reason(content: Any, reasons: list[str]) -> None:
    assert told(httpx.Response(200, content=json.dumps(content).encode())) == reasons


def test_a_service_that_is_not_there_has_a_reason() -> None:
    assert told(httpx.Response(503)) == [RewardFailure.UNAVAILABLE.value] * 2
    assert parse_swaps(b"\xff") is None


def test_settings_that_make_no_sense_are_refused() -> None:
    for changes in ({"list_ranker": "there"}, {"list_ranker": NAME, "url": "http://reward"}):
        with pytest.raises(RequestError, match=r"reward\.list_ranker: .*there with reward\.url"):
            RewardSettings(**changes)
    elsewhere = RewardSettings(list_ranker="there", url="http://reward")
    assert elsewhere.asks_service
    assert not elsewhere.asks_ranker
    with pytest.raises(RequestError, match=r"reward\.list_ranker: .*score_list"):
        check_service(RewardSettings(list_ranker="tests.reward.rankers:NoRanker"))
    with pytest.raises(RequestError, match=r"reward\.list_ranker_options"):
        check_service(RewardSettings(list_ranker=NAME, list_ranker_options={"size": 1}))


@pytest.fixture
def ray_cluster() -> Iterator[None]:
    require("ray")
    import ray

    paths = {"PYTHONPATH": str(Path(__file__).parents[2])}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": paths})
    yield
    from ray import serve

    serve.shutdown()
    ray.shutdown()


def test_the_service_on_ray_serve_credits_lists_over_both_transports(ray_cluster: None) -> None:
    settings = RewardSettings(list_ranker=NAME, swaps=SwapSampling(swaps=2), num_cpus=0.5, retries=0)
    service = RewardService.start(settings)
    try:
        http = RewardService(
            settings.model_copy(update={"transport": Transport.HTTP}),
            address=service.address,
            handle=None,
            app_name=None,
        )
        for client in (service.swap_client(), http.swap_client()):
            result = client.credit(HISTORIES, LISTS, SwapForm.CAUSAL, seed=3)
            assert result.failure_N.tolist() == ["", "non_finite", "", ""]
            assert [row.tolist() for row in result.credits] == expected(SwapForm.CAUSAL, 2, 3)
            assert client.requests == 1
    finally:
        service.close()
