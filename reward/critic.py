"""The critic: mean and variance of the gain of an item for a user and a need, for gains that nobody observed.

A network over (history, item, need): the history is the recency-weighted mean of its items' embeddings, and a
perceptron reads it with the embeddings of item and need and their products. Several networks are an ensemble, of which
the variance is the mean variance plus the variance of the means. Gains are predicted in units of their need's
deviation, so needs of different scale share a network. Its training is `trainer.critic_training`.

Source: methods.md section 3, "Uncertainty"; ensembles: Lakshminarayanan et al., "Simple and Scalable Predictive
Uncertainty Estimation using Deep Ensembles", NeurIPS 2017.
Suffixes: `_N` sample, `_B` history, `_H` position in the history, `_D` width, `_U` need, `_M` network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from data.errors import RequestError
from data.records import FloatArray, IntArray, LongArray
from data.settings import Settings
from reward.artefact import RankerArtefact
from reward.calibration import Floats, check_variances


class CriticShape(Settings):
    """What the networks of a critic look like; stored with their weights."""

    n_items: int = Field(ge=1)
    """Items of the catalogue; ids 0 to n_items - 1."""
    needs: tuple[str, ...] = Field(min_length=1)
    """Names of the needs that it knows."""
    width: int = Field(32, ge=2, le=4096)
    """Width of the embeddings."""
    hidden: int = Field(64, ge=2, le=65536)
    """Width of the hidden layers."""
    networks: int = Field(1, ge=1, le=64)
    """Networks of the ensemble."""
    history: int = Field(50, ge=1, le=100_000)
    """Most recent items that are read."""
    recency: float = Field(0.9, gt=0, le=1)
    """Weight of a history item relative to the next newer one."""
    min_variance: float = Field(1e-4, gt=0, le=1)
    """Smallest variance, relative to that of the need's gains."""


class Prediction(NamedTuple):
    """Predicted gains, float64."""

    mean_N: Floats
    """At least 0, as gains are."""
    variance_N: Floats


class _Network(nn.Module):
    def __init__(self, shape: CriticShape) -> None:
        super().__init__()
        self.recency = shape.recency
        self.item = nn.Embedding(shape.n_items + 1, shape.width, padding_idx=shape.n_items)
        self.need = nn.Embedding(len(shape.needs), shape.width)
        self.layers = nn.Sequential(
            nn.Linear(5 * shape.width, shape.hidden),
            nn.GELU(),
            nn.Linear(shape.hidden, shape.hidden),
            nn.GELU(),
            nn.Linear(shape.hidden, 2),
        )
        nn.init.normal_(self.need.weight, std=0.5)
        with torch.no_grad():
            self.item.weight[:-1].normal_(std=0.1)

    def forward(self, history_BH: Tensor, row_N: Tensor, item_N: Tensor, need_N: Tensor) -> tuple[Tensor, Tensor]:
        # The newest has weight 1, so that no weight of a whole history underflows to 0.
        age_H = torch.arange(history_BH.shape[1] - 1, -1, -1, dtype=torch.float32)
        weight_BH = self.recency**age_H * (history_BH < self.item.num_embeddings - 1)
        weight_BH = weight_BH / weight_BH.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        user_ND = (weight_BH.unsqueeze(1) @ self.item(history_BH)).squeeze(1)[row_N]
        item_ND, need_ND = self.item(item_N), self.need(need_N)
        read = torch.cat([user_ND, item_ND, need_ND, user_ND * item_ND, item_ND * need_ND], 1)
        mean_N, raw_N = self.layers(read).unbind(1)
        return mean_N, functional.softplus(raw_N)


class Critic(nn.Module):
    """An ensemble, and the scale of each need's gains."""

    centre_U: Tensor
    scale_U: Tensor

    def __init__(self, shape: CriticShape) -> None:
        super().__init__()
        self.shape = shape
        self.networks = nn.ModuleList(_Network(shape) for _ in range(shape.networks))
        self.register_buffer("centre_U", torch.zeros(len(shape.needs)))
        self.register_buffer("scale_U", torch.ones(len(shape.needs)))

    def forward(
        self,
        history_BH: Int[Tensor, "B H"],
        row_N: Int[Tensor, " N"],
        item_N: Int[Tensor, " N"],
        need_N: Int[Tensor, " N"],
    ) -> tuple[Float[Tensor, "M N"], Float[Tensor, "M N"]]:
        """Means and variances of each network, in units of the needs' deviations.

        Args:
            history_BH: item ids, the newest last; padded on the left with `n_items`.
            row_N: which history each sample has.
        """
        each = [network(history_BH, row_N, item_N, need_N) for network in self.networks]
        mean_MN = torch.stack([mean_N for mean_N, _ in each])
        return mean_MN, torch.stack([variance_N for _, variance_N in each]) + self.shape.min_variance


def critic_loss(
    mean_MN: Float[Tensor, "M N"], variance_MN: Float[Tensor, "M N"], gain_N: Float[Tensor, " N"]
) -> Float[Tensor, ""]:
    """`mean 0.5 * [ (g - m)^2 / s2 + log s2 ]`, the mean over samples and networks. Source: methods.md section 3."""
    return 0.5 * ((gain_N - mean_MN).square() / variance_MN + variance_MN.log()).mean()


class CriticRanker:
    """A trained critic, frozen. As a `CatalogueRanker` it scores items with the mean gain for one of its needs."""

    def __init__(self, critic: Critic, need: str | None = None) -> None:
        """Freeze the critic; `need` is the one that `score` answers for, by default the first.

        Raises:
            RequestError: a need that it does not know.
        """
        self.critic = critic.eval().requires_grad_(False)
        self.shape = critic.shape
        self.n_items = self.shape.n_items
        self.needs = self.shape.needs
        self.need = self._need_code(need or self.shape.needs[0])

    def predict(self, histories: Sequence[IntArray], items: IntArray, need: str | Sequence[str]) -> Prediction:
        """Mean and variance of the gain of `items[i]` after `histories[i]`, for one need or one per sample.

        Raises:
            RequestError: an unknown need, or a variance that is zero or not finite.
        """
        names = [need] * len(items) if isinstance(need, str) else need
        need_N = torch.tensor([self._need_code(name) for name in names], dtype=torch.int64)
        return self._predict(histories, np.arange(len(items)), np.asarray(items), need_N)

    def score(self, histories: Sequence[IntArray], candidates: Sequence[IntArray]) -> list[FloatArray]:
        """See `reward.ranker.Ranker`."""
        return self.score_with_variance(histories, candidates)[0]

    def score_with_variance(
        self, histories: Sequence[IntArray], candidates: Sequence[IntArray]
    ) -> tuple[list[FloatArray], list[FloatArray]]:
        """See `reward.ranker.UncertainRanker`.

        Raises:
            RequestError: a variance that is zero or not finite.
        """
        return self.score_for_needs(histories, candidates, [self.needs[self.need]] * len(candidates))

    def score_for_needs(
        self, histories: Sequence[IntArray], candidates: Sequence[IntArray], needs: Sequence[str]
    ) -> tuple[list[FloatArray], list[FloatArray]]:
        """See `reward.ranker.NeedRanker`.

        Raises:
            RequestError: an unknown need, or a variance that is zero or not finite.
        """
        counts = [len(row) for row in candidates]
        item_N = np.concatenate([np.zeros(0, np.int32), *candidates])
        row_N = np.repeat(np.arange(len(counts)), counts)
        need_B = torch.tensor([self._need_code(need) for need in needs], dtype=torch.int64)
        found = self._predict(histories, row_N, item_N, need_B[torch.from_numpy(row_N)])

        def rows(values: Floats) -> list[FloatArray]:
            return [row.astype(np.float32) for row in np.split(values, np.cumsum(counts)[:-1])][: len(counts)]

        return rows(found.mean_N), rows(found.variance_N)

    def score_catalogue(self, histories: Sequence[IntArray]) -> FloatArray:
        """See `reward.ranker.CatalogueRanker`."""
        every = np.arange(self.n_items, dtype=np.int32)
        score_BI = np.zeros((len(histories), self.n_items), np.float32)
        for row, history in enumerate(histories):
            score_BI[row] = self.score([history], [every])[0]
        return score_BI

    def save(self, folder: Path, provenance: Mapping[str, object] | None = None) -> str:
        """Write the ranker artefact and return its digest."""
        tensors = {name: tensor.numpy() for name, tensor in self.critic.state_dict().items()}
        options = self.shape.model_dump(mode="json")
        return RankerArtefact.write(folder, kind="critic", options=options, tensors=tensors, provenance=provenance)

    @classmethod
    def from_artefact(cls, artefact: RankerArtefact, need: str | None = None) -> CriticRanker:
        """The ranker of an opened artefact of kind `critic`.

        Raises:
            ValueError: weights that are not finite, whose variances would not be either.
        """
        critic = Critic(CriticShape.model_validate(dict(artefact.options)))
        critic.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in artefact.tensors.items()})
        for name, value in artefact.tensors.items():
            if not np.isfinite(value).all():
                raise ValueError(f"{name} is not finite")
        if not bool((critic.scale_U > 0).all()):
            raise ValueError("scale_U is not above 0: all variances of a need would be zero")
        return cls(critic, need)

    def _need_code(self, name: str) -> int:
        if name not in self.shape.needs:
            raise RequestError("need", name, " | ".join(self.shape.needs))
        return self.shape.needs.index(name)

    @torch.no_grad()
    def _predict(self, histories: Sequence[IntArray], row_N: LongArray, item_N: IntArray, need_N: Tensor) -> Prediction:
        history_BH = padded_histories(histories, self.shape)
        item_id_N = torch.from_numpy(item_N.astype(np.int64))
        mean_MN, variance_MN = self.critic(history_BH, torch.from_numpy(row_N), item_id_N, need_N)
        scale_N, centre_N = self.critic.scale_U[need_N].double(), self.critic.centre_U[need_N].double()
        mean_MN, variance_MN = mean_MN.double(), variance_MN.double()
        own_N = mean_MN.mean(0)
        spread_N = (mean_MN - own_N).square().mean(0)
        mean_N = (centre_N + scale_N * own_N).clamp_min(0)
        variance_N = (scale_N.square() * (variance_MN.mean(0) + spread_N)).numpy()
        check_variances("critic", variance_N)
        return Prediction(mean_N.numpy(), variance_N)


def padded_histories(histories: Sequence[IntArray], shape: CriticShape) -> Int[Tensor, "B H"]:
    """The newest `shape.history` items of each, aligned to the right; `n_items` in the padding."""
    width = max([min(len(row), shape.history) for row in histories], default=0)
    history_BH = np.full((len(histories), max(width, 1)), shape.n_items, dtype=np.int64)
    for row, history in enumerate(histories):
        newest = np.asarray(history)[-shape.history :]
        if len(newest):
            history_BH[row, -len(newest) :] = newest
    return torch.from_numpy(history_BH)
