"""Training a critic on gains whose mean and variance are known.

Checked: it finds both and is calibrated on users that it has not seen, better than a constant; needs of different
scale; the ensemble; the splits by user; repetition by seed; gains that are all equal; bad gains. Not checked: gains of
a dataset, and what the variance does to the policy (test_list_credit.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import RequestError, RunError
from reward.critic import padded_histories
from reward.ranker import load_ranker
from trainer.critic_settings import CriticSettings
from trainer.critic_training import (
    ObservedGains,
    Part,
    TrainedCritic,
    critic_users,
    split_users,
    train_critic,
)

N_ITEMS, NEEDS = 12, ("interest", "trend")
SMALL = CriticSettings(width=8, hidden=32, epochs=12, batch_rows=128)


def known_mean(taste: int | np.ndarray, item: np.ndarray, need: np.ndarray) -> np.ndarray:
    """Items of the parity of the history are liked; a hundredth of that for the second need."""
    mean: np.ndarray = np.where(item % 2 == taste, 4.0, 1.5) * np.where(need == 0, 1.0, 0.01)
    return mean


def known_deviation(item: np.ndarray, need: np.ndarray) -> np.ndarray:
    deviation: np.ndarray = np.where(item < N_ITEMS // 2, 0.1, 0.6) * np.where(need == 0, 1.0, 0.01)
    return deviation


def observed(users: int = 300, seed: int = 0) -> ObservedGains:
    random = np.random.default_rng(seed)
    user_N = np.repeat(np.arange(users), 20).astype(np.int32)
    item_N = random.integers(0, N_ITEMS, len(user_N)).astype(np.int32)
    need_N = random.integers(0, 2, len(user_N)).astype(np.int32)
    taste = random.integers(0, 2, users)
    histories = [(2 * random.integers(0, N_ITEMS // 2, 5) + taste[user]).astype(np.int32) for user in range(users)]
    mean_N = known_mean(taste[user_N], item_N, need_N)
    gain_N = np.abs(mean_N + known_deviation(item_N, need_N) * random.normal(size=len(user_N)))
    return ObservedGains(
        user_N=user_N,
        histories=[histories[user] for user in user_N],
        item_N=item_N,
        need_N=need_N,
        gain_N=gain_N,
    )


@pytest.fixture(scope="module")
def trained() -> TrainedCritic:
    return train_critic(observed(), N_ITEMS, NEEDS, SMALL, history=5, seed=3)


def test_it_finds_mean_and_variance_and_is_calibrated(trained: TrainedCritic) -> None:
    every = np.arange(N_ITEMS, dtype=np.int32)
    for code, need in enumerate(NEEDS):
        for taste in (0, 1):
            history = (np.array([0, 2, 4, 6, 8]) + taste).astype(np.int32)
            found = trained.ranker.predict([history] * N_ITEMS, every, need)
            needs = np.full(N_ITEMS, code)
            unit = (1.0, 0.01)[code]
            np.testing.assert_allclose(found.mean_N / unit, known_mean(taste, every, needs) / unit, atol=0.35)
            ratio = np.sqrt(found.variance_N) / known_deviation(every, needs)
            assert 0.5 < ratio.min() <= ratio.max() < 2
    assert trained.calibration.expected_error < 0.05
    assert trained.calibration.normalised_error < 0.3
    constant = 0.5 * (1 + np.log(observed().gain_N.var()))
    assert trained.calibration.loss < constant - 1


def test_the_best_epoch_is_kept_and_training_ends_without_improvement(trained: TrainedCritic) -> None:
    assert trained.losses[trained.epoch - 1] == min(trained.losses)
    patient = SMALL.model_copy(update={"epochs": 200, "patience": 1, "lr": 0.05})
    short = train_critic(observed(60), N_ITEMS, NEEDS, patient, history=5, seed=3)
    assert len(short.losses) < 200
    assert short.epoch == len(short.losses) - 1


def test_a_seed_repeats_and_an_artefact_holds_all_of_it(trained: TrainedCritic, tmp_path: Path) -> None:
    again = train_critic(observed(), N_ITEMS, NEEDS, SMALL, history=5, seed=3)
    digests = [
        one.ranker.save(tmp_path / name, one.calibration.report()) for name, one in (("a", trained), ("b", again))
    ]
    assert digests[0] == digests[1]
    loaded = load_ranker(tmp_path / "a", {"need": "trend"})
    histories, items = [np.array([1, 3], np.int32)], [np.arange(N_ITEMS, dtype=np.int32)]
    exact = trained.ranker.predict(histories * N_ITEMS, items[0], "trend").mean_N
    np.testing.assert_allclose(loaded.score(histories, items)[0], exact, rtol=1e-5)


def test_the_networks_of_an_ensemble_differ_and_their_disagreement_is_variance() -> None:
    gains = observed(60)
    ranker = train_critic(gains, N_ITEMS, NEEDS, SMALL.model_copy(update={"networks": 3}), history=5, seed=0).ranker
    histories, items = gains.histories[:50], gains.item_N[:50]
    mean_MN, variance_MN = ranker.critic(
        padded_histories(histories, ranker.shape),
        torch.arange(50),
        torch.from_numpy(items).long(),
        torch.zeros(50, dtype=torch.int64),
    )
    assert mean_MN.shape == (3, 50)
    assert bool((mean_MN.std(0) > 0).all())
    found = ranker.predict(histories, items, "interest").variance_N / float(ranker.critic.scale_U[0]) ** 2
    assert (found > variance_MN.mean(0).double().numpy()).all()


def test_no_user_is_in_two_parts() -> None:
    gains = observed(50)
    parts = split_users(gains, SMALL, seed=4)
    users = {part: set(rows.user_N.tolist()) for part, rows in parts.items()}
    assert {part: len(found) for part, found in users.items()} == {
        Part.FIT: 35,
        Part.VALIDATION: 5,
        Part.CALIBRATION: 10,
    }
    assert len(set.union(*users.values())) == 50
    assert sum(len(rows) for rows in parts.values()) == len(gains)
    other = split_users(gains, SMALL, seed=5)
    assert set(other[Part.FIT].user_N.tolist()) != users[Part.FIT]
    few = split_users(gains.where(gains.user_N < 3), SMALL, seed=0)
    assert [len(set(rows.user_N.tolist())) for rows in few.values()] == [1, 1, 1]
    with pytest.raises(RequestError, match="3 users or more"):
        split_users(gains.where(gains.user_N < 2), SMALL, seed=0)


def test_the_policy_keeps_the_other_users() -> None:
    user_N = observed(40).user_N
    mask_N = critic_users(user_N, 0.25, seed=1)
    own, others = set(user_N[mask_N].tolist()), set(user_N[~mask_N].tolist())
    assert (len(own), len(others), own & others) == (10, 30, set())
    assert set(user_N[critic_users(user_N, 0.25, seed=2)].tolist()) != own


def test_gains_that_are_all_equal_have_a_small_variance_and_not_none() -> None:
    gains = observed(30)
    equal = dataclasses.replace(gains, gain_N=np.full(len(gains), 3.0))
    found = train_critic(equal, N_ITEMS, NEEDS, SMALL.model_copy(update={"epochs": 2}), history=5, seed=0)
    predicted = found.ranker.predict(gains.histories[:4], gains.item_N[:4], "interest")
    assert (predicted.variance_N > 0).all()
    np.testing.assert_allclose(predicted.mean_N, 3.0, atol=1e-4)


@pytest.mark.parametrize("value", [-1.0, np.inf, np.nan])
def test_impossible_gains_are_refused(value: float) -> None:
    gains = observed(10)
    gain_N = gains.gain_N.copy()
    gain_N[7] = value
    with pytest.raises(RequestError, match="finite gains from 0"):
        train_critic(dataclasses.replace(gains, gain_N=gain_N), N_ITEMS, NEEDS, SMALL, history=5, seed=0)


def test_a_need_without_gains_is_refused() -> None:
    gains = observed(10)
    with pytest.raises(RequestError, match="need trend"):
        train_critic(gains.where(gains.need_N == 0), N_ITEMS, NEEDS, SMALL, history=5, seed=0)


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    gains = observed(10)
    wild = SMALL.model_copy(update={"lr": 1e30, "epochs": 3})
    with pytest.raises(RunError, match="a smaller learning rate"):
        train_critic(gains, N_ITEMS, NEEDS, wild, history=5, seed=0)
