"""The critic as a network and as a ranker.

Checked: the loss against torch's own Gaussian loss, the ensemble's moments by hand, padding and order of samples,
saved and loaded bits, the service's scoring path for each need, refused needs and broken variances. Not checked:
training (tests/trainer/test_critic_training.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from torch.nn import functional

from data.errors import RequestError
from data.records import FloatArray, IntArray, RewardFailure
from reward.artefact import RankerArtefact
from reward.batch_scoring import score_batch
from reward.client import HttpAttempt, RewardClient
from reward.critic import Critic, CriticRanker, CriticShape, critic_loss, padded_histories
from reward.ranker import CatalogueRanker, load_ranker
from reward.replica import ReplicaOptions, RewardReplica
from reward.settings import RewardSettings
from reward.wire import ScoreCall

SHAPE = CriticShape(n_items=9, needs=("interest", "trend"), width=4, hidden=8, networks=3, history=4)
HISTORIES = [np.array([1, 2, 3, 4, 5, 6], np.int32), np.zeros(0, np.int32), np.array([8], np.int32)]
ITEMS = np.array([0, 4, 8], np.int32)


@pytest.fixture
def ranker() -> CriticRanker:
    torch.manual_seed(1)
    critic = Critic(SHAPE)
    critic.centre_U[:] = torch.tensor([3.0, 0.5])
    critic.scale_U[:] = torch.tensor([2.0, 0.1])
    return CriticRanker(critic)


def test_the_loss_is_the_gaussian_one() -> None:
    mean, variance, gain = torch.randn(3, 5), torch.rand(3, 5) + 0.1, torch.randn(5)
    exact = functional.gaussian_nll_loss(mean, gain.expand(3, 5), variance)
    torch.testing.assert_close(critic_loss(mean, variance, gain), exact)


def test_the_ensemble_is_a_mixture(ranker: CriticRanker) -> None:
    found = ranker.predict(HISTORIES, ITEMS, ["interest", "trend", "trend"])
    histories = padded_histories(HISTORIES, SHAPE)
    mean, variance = (
        part.double().numpy()
        for part in ranker.critic(histories, torch.arange(3), torch.from_numpy(ITEMS).long(), torch.tensor([0, 1, 1]))
    )
    assert mean.shape == (3, 3)
    centre, scale = np.array([3.0, 0.5, 0.5]), np.array([2.0, 0.1, 0.1])
    np.testing.assert_allclose(found.mean_N, centre + scale * mean.mean(0), rtol=1e-6)
    mixture = (variance + mean**2).mean(0) - mean.mean(0) ** 2
    np.testing.assert_allclose(found.variance_N, scale**2 * mixture, rtol=1e-6)
    assert (variance.mean(0) * scale**2 <= found.variance_N).all()


def test_means_are_gains_and_not_below_zero(ranker: CriticRanker) -> None:
    ranker.critic.centre_U[:] = -50.0
    assert not ranker.predict(HISTORIES, ITEMS, "interest").mean_N.any()


def test_neither_padding_nor_neighbours_nor_old_items_matter(ranker: CriticRanker) -> None:
    together = ranker.predict(HISTORIES, ITEMS, "trend")
    for row in range(3):
        alone = ranker.predict(HISTORIES[row : row + 1], ITEMS[row : row + 1], "trend")
        np.testing.assert_allclose(alone.mean_N, together.mean_N[row : row + 1], rtol=1e-5)
        np.testing.assert_allclose(alone.variance_N, together.variance_N[row : row + 1], rtol=1e-5)
    longer = [np.concatenate([[7, 7], HISTORIES[0]]).astype(np.int32), *HISTORIES[1:]]
    np.testing.assert_array_equal(ranker.predict(longer, ITEMS, "trend").mean_N, together.mean_N)
    older = ranker.predict([HISTORIES[0][::-1]], ITEMS[:1], "trend")
    assert older.mean_N[0] != together.mean_N[0]


def test_saved_and_loaded_it_is_a_ranker_for_each_of_its_needs(ranker: CriticRanker, tmp_path: Path) -> None:
    digest = ranker.save(tmp_path, {"dataset": "d"})
    assert RankerArtefact.open(tmp_path).digest == digest
    candidates = [np.arange(9, dtype=np.int32), np.zeros(0, np.int32), np.array([4, 4], np.int32)]
    for need, options in (("interest", None), ("interest", {"need": "interest"}), ("trend", {"need": "trend"})):
        loaded = load_ranker(tmp_path, options)
        assert isinstance(loaded, CatalogueRanker)
        scored = score_batch(loaded, HISTORIES, candidates, chunk=2)
        assert scored.failure_N.tolist() == ["", "", ""]
        for row, items in enumerate(candidates):
            exact = ranker.predict([HISTORIES[row]] * len(items), items, need).mean_N if len(items) else np.zeros(0)
            np.testing.assert_allclose(scored.scores[row], exact, rtol=1e-5)
        np.testing.assert_allclose(loaded.score_catalogue(HISTORIES)[0], scored.scores[0], rtol=1e-5)
    assert load_ranker(tmp_path).score([], []) == []


def test_the_service_gives_its_variances_beside_the_means(ranker: CriticRanker) -> None:
    app = RewardReplica(ReplicaOptions(ranker="given", chunk=2), ranker).__serve_build_asgi_app__()
    candidates = [[0, 4], [], [8], [99]]
    histories = [row.tolist() for row in HISTORIES] + [[1]]
    answer = TestClient(app).post("/score", json={"histories": histories, "candidates": candidates}).json()
    assert answer["failures"] == ["", "", "", RewardFailure.BAD_REQUEST.value]
    assert (answer["scores"][3], answer["variances"][3]) == (None, None)
    for row in (0, 2):
        items = np.array(candidates[row], np.int32)
        exact = ranker.predict([HISTORIES[row]] * len(items), items, "interest")
        np.testing.assert_allclose(answer["scores"][row], exact.mean_N, rtol=1e-5)
        np.testing.assert_allclose(answer["variances"][row], exact.variance_N, rtol=1e-5)
    assert (answer["scores"][1], answer["variances"][1]) == ([], [])


def test_one_call_asks_for_several_needs(ranker: CriticRanker) -> None:
    needs, candidates = ["trend", "interest", "trend", "niche"], [ITEMS] * 4
    histories = [*HISTORIES, HISTORIES[0]]
    exact = [ranker.predict([histories[row]] * 3, ITEMS, needs[row]) for row in range(3)]
    found = score_batch(ranker, histories, candidates, chunk=3, needs=needs)
    app = RewardReplica(ReplicaOptions(ranker="given", chunk=2), ranker).__serve_build_asgi_app__()
    with TestClient(app) as client:
        attempt = HttpAttempt("http://testserver")
        attempt._http._client = client
        told = RewardClient(attempt, RewardSettings(retries=0)).score(histories, candidates, needs)
        wrong = {"histories": [[1]], "candidates": [[1]], "needs": ["trend", "trend"]}
        assert client.post("/score", json=wrong).status_code == 422
    for result in (found, told):
        assert result.failure_N.tolist() == ["", "", "", RewardFailure.BAD_REQUEST.value]
        assert result.variances is not None
        for row, one in enumerate(exact):
            np.testing.assert_allclose(result.scores[row], one.mean_N, rtol=1e-5)
            np.testing.assert_allclose(result.variances[row], one.variance_N, rtol=1e-5)
    assert not np.allclose(exact[0].mean_N, ranker.predict([HISTORIES[0]] * 3, ITEMS, "interest").mean_N)
    with pytest.raises(ValueError, match="3 needs"):
        ScoreCall.pack(histories, candidates, needs[:3])


def test_a_ranker_without_needs_gives_every_need_the_same(ranker: CriticRanker) -> None:
    boastful = Boastful([[1.0], [2.0]])
    found = score_batch(boastful, [ITEMS, ITEMS], [ITEMS[:1], ITEMS[:1]], chunk=2, needs=["interest", "unheard"])
    assert found.failure_N.tolist() == ["", ""]
    assert [row.tolist() for row in found.variances or []] == [[1.0], [2.0]]


class Boastful:
    """Sure beyond measure of some scores, or silent about them."""

    def __init__(self, variances: list[list[float]]) -> None:
        self.variances = variances

    def score(self, histories: Sequence[IntArray], candidates: Sequence[IntArray]) -> list[FloatArray]:
        return [np.zeros(len(row), np.float32) for row in candidates]

    def score_with_variance(
        self, histories: Sequence[IntArray], candidates: Sequence[IntArray]
    ) -> tuple[list[FloatArray], list[FloatArray]]:
        return self.score(histories, candidates), [np.array(row, np.float32) for row in self.variances]


@pytest.mark.parametrize(
    ("variances", "failures"),
    [
        ([[1.0], [0.0]], ["", "non_finite"]),
        ([[float("inf")], [2.0]], ["non_finite", ""]),
        ([[-1.0], [float("nan")]], ["non_finite", "non_finite"]),
        ([[1.0], [1.0, 1.0]], ["error", "error"]),
        ([[1.0]], ["error", "error"]),
    ],
)
def test_variances_that_cannot_be_fail_their_sample(variances: list[list[float]], failures: list[str]) -> None:
    found = score_batch(Boastful(variances), [ITEMS, ITEMS], [ITEMS[:1], ITEMS[:1]], chunk=2)
    assert found.failure_N.tolist() == failures
    assert found.variances is not None
    assert [len(row) for row in found.variances] == [int(reason == "") for reason in failures]


def test_what_it_does_not_know_is_refused(ranker: CriticRanker, tmp_path: Path) -> None:
    ranker.save(tmp_path)
    with pytest.raises(RequestError, match=r"need: found niche; legal: interest \| trend|interest \| trend"):
        load_ranker(tmp_path, {"need": "niche"})
    for options in ({"need": 3}, {"needs": "trend"}):
        with pytest.raises(RequestError, match="it holds its own"):
            load_ranker(tmp_path, options)
    with pytest.raises(RequestError, match="interest"):
        ranker.predict(HISTORIES, ITEMS, "niche")


@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan")])
def test_zero_and_infinite_variances_are_refused_by_reason(ranker: CriticRanker, tmp_path: Path, scale: float) -> None:
    ranker.critic.scale_U[:] = scale
    with pytest.raises(RequestError, match="finite variances above 0"):
        ranker.predict(HISTORIES, ITEMS, "interest")
    failed = score_batch(ranker, HISTORIES, [ITEMS] * 3, chunk=4)
    assert set(failed.failure_N.tolist()) == {RewardFailure.ERROR.value}
    ranker.save(tmp_path)
    with pytest.raises(RequestError, match="does not fit its kind"):
        load_ranker(tmp_path)
