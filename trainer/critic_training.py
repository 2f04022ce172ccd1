"""Training the critic on gains that were observed, apart from what the policy learns from.

Users are split three ways by a seeded draw: those that the critic fits, those that choose its best epoch, and those
that its calibration is measured on. A policy may train on the users of none of them (`critic_users`).

Source: methods.md section 3, "Train the critic on a disjoint split and freeze it".
Suffixes: `_N` sample, `_U` need.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import torch

from data.errors import RequestError, RunError
from data.feed import generator
from data.records import BoolArray, IntArray
from reward.calibration import Calibration, Floats, calibration
from reward.critic import Critic, CriticRanker, CriticShape, critic_loss, padded_histories
from trainer.critic_settings import CriticSettings

_SPLIT_STREAM = 21
_ORDER_STREAM = 22
MIN_DEVIATION = 1e-6
"""Smallest deviation that gains are divided by: a need whose gains are all equal has this scale."""


class Part(StrEnum):
    """What the users of the critic are used for."""

    FIT = "fit"
    VALIDATION = "validation"
    CALIBRATION = "calibration"


@dataclass(frozen=True, kw_only=True, eq=False)
class ObservedGains:
    """Gains that were observed, one sample each."""

    user_N: IntArray
    histories: Sequence[IntArray]
    """Item ids before the sample, the newest last."""
    item_N: IntArray
    need_N: IntArray
    """Index into the names of the needs."""
    gain_N: Floats

    def __len__(self) -> int:
        return len(self.item_N)

    def where(self, mask_N: BoolArray) -> ObservedGains:
        """The samples in the mask."""
        return ObservedGains(
            user_N=self.user_N[mask_N],
            histories=[self.histories[row] for row in np.flatnonzero(mask_N)],
            item_N=self.item_N[mask_N],
            need_N=self.need_N[mask_N],
            gain_N=self.gain_N[mask_N],
        )


class TrainingStoppedError(Exception):
    """Somebody asked training to end before it was done; nothing is kept."""


class TrainedCritic(NamedTuple):
    """A frozen critic and how well its variances fit users that it has not seen."""

    ranker: CriticRanker
    calibration: Calibration
    by_need: dict[str, Calibration]
    """The same for each need that those users have a gain for."""
    losses: list[float]
    """On the validation users, epoch by epoch."""
    epoch: int
    """Of the weights that were kept, from 1."""


def critic_users(user_N: IntArray, share: float, seed: int) -> BoolArray:
    """True for the samples of users whose gains the critic may see; a seeded share of the distinct users."""
    users, row_N = np.unique(user_N, return_inverse=True)
    chosen = np.zeros(len(users), dtype=bool)
    chosen[generator(seed, _SPLIT_STREAM).permutation(len(users))[: round(share * len(users))]] = True
    mask_N: BoolArray = chosen[row_N]
    return mask_N


def split_users(gains: ObservedGains, settings: CriticSettings, seed: int) -> dict[Part, ObservedGains]:
    """The samples by part, split by user.

    Raises:
        RequestError: too few users for one in each part.
    """
    users, row_N = np.unique(gains.user_N, return_inverse=True)
    if len(users) < len(Part):
        raise RequestError("critic", f"observed gains of {len(users)} users", f"{len(Part)} users or more")
    order = generator(seed, _SPLIT_STREAM, 1).permutation(len(users))
    validation = max(1, round(settings.validation_share * len(users)))
    measured = max(1, round(settings.calibration_share * len(users)))
    measured = min(measured, len(users) - 1 - validation)
    part = np.full(len(users), Part.FIT.value, dtype="U11")
    part[order[:validation]] = Part.VALIDATION.value
    part[order[validation : validation + measured]] = Part.CALIBRATION.value
    return {one: gains.where(part[row_N] == one.value) for one in Part}


def train_critic(
    gains: ObservedGains,
    n_items: int,
    needs: tuple[str, ...],
    settings: CriticSettings,
    *,
    history: int,
    seed: int,
    log: Callable[[int, dict[str, float]], None] = lambda epoch, metrics: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> TrainedCritic:
    """Fit a critic, keep its best epoch and measure its calibration.

    Args:
        history: most recent items that it reads.
        log: receives (epoch, metrics), epochs from 1.
        interrupted: asked after every epoch.

    Raises:
        RequestError: gains that are negative or not finite, too few users, a need without a gain to fit, or variances
            that are zero or not finite.
        RunError: a loss that is not finite.
        TrainingStoppedError: `interrupted` said so.
    """
    bad_N = ~np.isfinite(gains.gain_N) | (gains.gain_N < 0)
    if bad_N.any():
        found = f"gain {gains.gain_N[bad_N][0]:g} ({int(bad_N.sum())} of {len(gains)})"
        raise RequestError("critic", found, "finite gains from 0")
    parts = split_users(gains, settings, seed)
    shape = CriticShape(
        n_items=n_items,
        needs=needs,
        width=settings.width,
        hidden=settings.hidden,
        networks=settings.networks,
        history=history,
        min_variance=settings.min_variance,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = Critic(shape)
    _set_scales(critic, parts[Part.FIT])
    best, losses = _fit(critic, parts[Part.FIT], parts[Part.VALIDATION], settings, seed, log, interrupted)
    ranker = CriticRanker(best)
    measured = parts[Part.CALIBRATION]
    predicted = ranker.predict(measured.histories, measured.item_N, [needs[code] for code in measured.need_N])

    def fit_of(rows: BoolArray | slice) -> Calibration:
        return calibration(measured.gain_N[rows], predicted.mean_N[rows], predicted.variance_N[rows])

    by_need = {needs[code]: fit_of(measured.need_N == code) for code in np.unique(measured.need_N).tolist()}
    return TrainedCritic(ranker, fit_of(slice(None)), by_need, losses, int(np.argmin(losses)) + 1)


def _set_scales(critic: Critic, gains: ObservedGains) -> None:
    """Centre and deviation of each need's gains."""
    for code, name in enumerate(critic.shape.needs):
        own = gains.gain_N[gains.need_N == code]
        if not len(own):
            raise RequestError(f"critic: need {name}", "no observed gain among the users it fits", "at least one")
        critic.centre_U[code] = float(own.mean())
        critic.scale_U[code] = max(float(own.std()), MIN_DEVIATION)


class _Tensors(NamedTuple):
    history_NH: torch.Tensor
    item_N: torch.Tensor
    need_N: torch.Tensor
    gain_N: torch.Tensor
    """In units of the need's deviation."""

    @staticmethod
    def of(gains: ObservedGains, critic: Critic) -> _Tensors:
        need_N = torch.from_numpy(gains.need_N.astype(np.int64))
        raw_N = torch.from_numpy(gains.gain_N) - critic.centre_U[need_N].double()
        return _Tensors(
            padded_histories(gains.histories, critic.shape),
            torch.from_numpy(gains.item_N.astype(np.int64)),
            need_N,
            (raw_N / critic.scale_U[need_N].double()).float(),
        )

    def loss(self, critic: Critic, rows: torch.Tensor | slice) -> torch.Tensor:
        history_NH = self.history_NH[rows]
        mean_MN, variance_MN = critic(history_NH, torch.arange(len(history_NH)), self.item_N[rows], self.need_N[rows])
        return critic_loss(mean_MN, variance_MN, self.gain_N[rows])


def _fit(
    critic: Critic,
    fitted: ObservedGains,
    validation: ObservedGains,
    settings: CriticSettings,
    seed: int,
    log: Callable[[int, dict[str, float]], None],
    interrupted: Callable[[], bool],
) -> tuple[Critic, list[float]]:
    """The critic of the best epoch, and the validation loss of every epoch."""
    train, held = _Tensors.of(fitted, critic), _Tensors.of(validation, critic)
    optimiser = torch.optim.AdamW(critic.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    best = critic
    losses: list[float] = []
    for epoch in range(settings.epochs):
        order = torch.from_numpy(generator(seed, _ORDER_STREAM, epoch).permutation(len(fitted)))
        total = 0.0
        for rows in torch.split(order, settings.batch_rows):
            optimiser.zero_grad()
            batch_loss = train.loss(critic, rows)
            torch.autograd.backward(batch_loss)
            optimiser.step()
            total += batch_loss.item() * len(rows)
        with torch.no_grad():
            loss = float(held.loss(critic, slice(None)))
        if not np.isfinite(loss):
            raise RunError(f"critic: the loss of epoch {epoch + 1} is {loss:g}; a smaller learning rate may help")
        if not losses or loss < min(losses):
            best = copy.deepcopy(critic)
        losses.append(loss)
        log(epoch + 1, {"loss": total / len(order), "validation/loss": loss})
        if interrupted():
            raise TrainingStoppedError
        if len(losses) - int(np.argmin(losses)) > settings.patience:
            break
    return best, losses
