"""Contract: the reward service on real Ray Serve, through the handle and over HTTP: equal scores for equal calls beside
other callers; a replica that sleeps meets the deadline, one that returns NaN fails its sample, one that dies is
replaced and the call is repeated; another address than loopback needs a token; a ranker that cannot be loaded or a port
in use stops the start with one line.

Not checked here: the reasons of every kind of reply (test_http_api).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from data.errors import RequestError
from reward.critic import Critic, CriticRanker, CriticShape
from reward.sasrec import SASRec, SASRecRanker, SASRecShape
from reward.service import RewardService
from reward.settings import RewardSettings, Transport
from tests.requirements import require
from tests.reward.rankers import plain_scores

FAULTY = "tests.reward.rankers:FaultyRanker"


def arrays(rows: list[list[int]]) -> list[np.ndarray]:
    return [np.array(row, np.int32) for row in rows]


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    require("ray")
    import ray

    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},
    )
    yield
    from ray import serve

    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def flag(tmp_path: Path) -> str:
    return str(tmp_path / "triggered")


def settings(**changes: Any) -> RewardSettings:
    given = {"ranker": FAULTY, "ranker_score": 1.0, "num_cpus": 0.5, "backoff_s": 0.1, "chunk": 4}
    return RewardSettings(**(given | changes))


def test_scores_reasons_and_equal_results_beside_other_callers(ray_cluster: None, tmp_path: Path) -> None:
    torch.manual_seed(1)
    ranker = SASRecRanker(SASRec(SASRecShape(n_items=50, width=32)))
    ranker.save(tmp_path / "ranker")
    service = RewardService.start(settings(ranker=str(tmp_path / "ranker"), chunk=16))
    try:
        random = np.random.default_rng(0)
        histories = [random.integers(0, 50, n, dtype=np.int32) for n in random.integers(0, 60, 40)]
        candidates = [random.integers(0, 50, n, dtype=np.int32) for n in random.integers(0, 20, 40)]
        handle = service.client()
        alone = handle.score(histories, candidates)
        assert set(alone.failure_N.tolist()) == {""}
        for expected, got in zip(ranker.score(histories, candidates), alone.scores, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)

        http = RewardService(
            settings(ranker=str(tmp_path / "ranker"), transport=Transport.HTTP),
            address=service.address,
            handle=None,
            app_name=None,
        ).client()
        with ThreadPoolExecutor(4) as others:
            noise = [others.submit(http.score, histories[i : i + 9], candidates[i : i + 9]) for i in range(12)]
            beside = handle.score(histories, candidates)
            over_http = http.score(histories, candidates)
            assert all(set(call.result().failure_N.tolist()) == {""} for call in noise)
        for result in (beside, over_http):
            assert [row.tobytes() for row in result.scores] == [row.tobytes() for row in alone.scores]

        web = httpx.Client(base_url=service.address, trust_env=False)
        answer = web.post("/score", json={"histories": [[1], [2]], "candidates": [[3], [50]]}).json()
        assert answer["failures"] == ["", "bad_request"]
        assert answer["scores"][1] is None
        assert web.get("/healthz").text == "ok"
        assert "windlass_reward_calls_total" in web.get("/metrics").text
        assert "/score" in web.get("/openapi.json").json()["paths"]
    finally:
        service.close()


def test_a_critic_answers_with_variances_over_both_transports(ray_cluster: None, tmp_path: Path) -> None:
    torch.manual_seed(2)
    critic = CriticRanker(Critic(CriticShape(n_items=9, needs=("interest", "trend"), width=4, hidden=8)), "trend")
    critic.save(tmp_path / "critic")
    asked = settings(ranker=str(tmp_path / "critic"), ranker_options={"need": "trend"})
    service = RewardService.start(asked)
    try:
        histories, candidates = arrays([[1, 2], [], [3]]), arrays([[4, 5], [6], []])
        own = critic.score_with_variance(histories, candidates)[1]
        http = RewardService(
            asked.model_copy(update={"transport": Transport.HTTP}), address=service.address, handle=None, app_name=None
        )
        for client in (service.client(), http.client()):
            result = client.score(histories, candidates)
            assert result.failure_N.tolist() == ["", "", ""]
            assert result.variances is not None
            for expected, got in zip(own, result.variances, strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-5)
            each = client.score(histories, candidates, ["interest", "trend", "trend"])
            exact = critic.predict([histories[0]] * 2, candidates[0], "interest")
            assert each.variances is not None
            np.testing.assert_allclose(each.scores[0], exact.mean_N, rtol=1e-5)
            np.testing.assert_allclose(each.variances[0], exact.variance_N, rtol=1e-5)
            np.testing.assert_allclose(each.variances[1], own[1], rtol=1e-5)
    finally:
        service.close()


def test_a_sleeping_a_lying_and_a_dying_replica(ray_cluster: None, flag: str) -> None:
    options: dict[str, Any] = {"flag": flag, "seconds": 4.0}
    service = RewardService.start(settings(ranker_options=options, deadline_s=1.0, retries=0))
    try:
        client = service.client()
        histories, candidates = arrays([[1], [9001], [2], [3], [4]]), arrays([[5, 6]] * 5)
        result = client.score(histories, candidates)
        assert result.failure_N.tolist() == ["", "non_finite", "", "", ""]
        assert result.scores[2].tolist() == plain_scores(histories, candidates)[2].tolist()

        assert set(client.score(arrays([[9006]]), arrays([[5]])).failure_N.tolist()) == {"timeout"}
        assert Path(flag).exists()
    finally:
        service.close()
    Path(flag).unlink()

    service = RewardService.start(settings(ranker_options=options, deadline_s=30.0, retries=3))
    try:
        client = service.client()
        result = client.score(arrays([[1], [9004]]), arrays([[5], [6]]))
        assert result.failure_N.tolist() == ["", ""]
        # A replica died. Who asked again depends on whether Serve's router had seen it take the request: the router, or
        # our client (tests/reward/test_http_api.py).
        assert Path(flag).exists()
    finally:
        service.close()
    assert set(client.score(arrays([[1]]), arrays([[5]])).failure_N.tolist()) <= {"unavailable", "timeout", "error"}


def test_another_address_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WINDLASS_REWARD_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(RequestError, match="a bearer token in the environment variable WINDLASS_REWARD_TOKEN"):
            RewardService.start(settings(host=host))
    monkeypatch.setenv("WINDLASS_REWARD_TOKEN", "  ")
    with pytest.raises(RequestError, match="bearer token"):
        RewardService.start(settings(host="0.0.0.0"))


def test_what_cannot_start_is_refused_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing to score with"):
        RewardService.start(RewardSettings())
    with pytest.raises(RequestError, match="ranker"):
        RewardService.start(settings(ranker=str(tmp_path)))
    from reward.service import check_port

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RequestError, match="a free port, or 0"):
            check_port("127.0.0.1", taken.getsockname()[1])


def test_a_service_elsewhere_is_called_over_http() -> None:
    service = RewardService.start(RewardSettings(url="http://127.0.0.1:9", ranker_score=1.0, retries=0))
    assert service.client().score(arrays([[1]]), arrays([[2]])).failure_N.tolist() == ["unavailable"]
    service.close()
