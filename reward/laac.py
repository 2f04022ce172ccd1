"""The networks of LAAC: a light policy and critics, each a history encoder and a row per item.

A state's last coordinate is 1, so the last weight of an item's row is its bias, and a score is one inner product:
`f(s,a) = state . item_a`. The same rows are what the encoder reads, unless the network has no encoder of its own.

Both serve in the reward service: `windlass train` writes the policy to `RUN/ranker` and the critics to `RUN/critic`.

Source: methods.md section 5, "Encoder". Suffixes: `_B` row, `_H` place in the history, `_D` width, `_N` item.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from data.records import FloatArray, IntArray
from data.settings import Settings
from reward.artefact import RankerArtefact
from reward.item_attention import attended, item_rows

HEADS = 2
"""Attention heads of the `attention` encoder."""
KIND = "laac"


class Encoder(StrEnum):
    """How a history becomes a state."""

    GRU = "gru"
    """A gated recurrent unit."""
    ATTENTION = "attention"
    """One block of self-attention, read at the newest item."""


class LaacShape(Settings):
    """What the networks look like; stored with the weights."""

    n_items: int = Field(ge=1)
    """Items of the catalogue; ids 0 to n_items - 1."""
    width: int = Field(64, ge=4, le=4096, multiple_of=2)
    """Width of item rows and states."""
    history: int = Field(10, ge=1, le=10_000)
    """Latest items that are read."""
    encoder: Encoder = Encoder.ATTENTION
    """gru or attention."""


class StateEncoder(nn.Module):
    """Histories to states `[B, D]`, from embedded items `[B, H, D]`."""

    def __init__(self, shape: LaacShape) -> None:
        super().__init__()
        width = shape.width
        self.kind = shape.encoder
        if self.kind is Encoder.GRU:
            self.recurrent = nn.GRU(width, width, batch_first=True)
        else:
            self.position = nn.Parameter(torch.randn(shape.history, width) * 0.02)
            self.query = nn.Linear(width, HEADS * width)
            self.mixed = nn.Linear(HEADS * width, width)
            self.feed_norm = nn.LayerNorm(width)
            self.feed_in = nn.Linear(width, 2 * width)
            self.feed_out = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, item_BHD: Tensor, absent_BH: Tensor) -> Tensor:
        """States; `absent_BH` marks places before the first item, whose embeddings are not looked at."""
        if self.kind is Encoder.GRU:
            _, last_1BD = self.recurrent(item_BHD.masked_fill(absent_BH[..., None], 0.0))
            state_BD = last_1BD[0]
        else:
            state_BD = self._attend(item_BHD, absent_BH)
        state_BD = self.norm(state_BD)
        return torch.cat([state_BD[:, :-1], state_BD.new_ones(len(state_BD), 1)], 1)

    def _attend(self, item_BHD: Tensor, absent_BH: Tensor) -> Tensor:
        """One block, computed for the newest place alone: keys and values are the items themselves."""
        rows, length, width = item_BHD.shape
        read_BHD = item_BHD + self.position[-length:]
        newest_BD = read_BHD[:, -1]
        query_BKD = self.query(newest_BD).view(rows, HEADS, width)
        # An empty history hides every place: its state is set to 0.
        state_BD = newest_BD + self.mixed(attended(query_BKD, read_BHD, absent_BH).flatten(1))
        state_BD = state_BD.masked_fill(absent_BH[:, -1:], 0.0)
        fed_BD: Tensor = self.feed_out(functional.gelu(self.feed_in(self.feed_norm(state_BD))))
        out_BD: Tensor = state_BD + fed_BD
        return out_BD


class ItemNetwork(nn.Module):
    """A policy or a critic: scores of items in a state."""

    def __init__(self, shape: LaacShape, *, own_encoder: bool = True) -> None:
        super().__init__()
        self.shape = shape
        self.item_ND = nn.Parameter(torch.randn(shape.n_items, shape.width) * shape.width**-0.5)
        """Rows of the items; the last weight is the item's bias."""
        with torch.no_grad():
            self.item_ND[:, -1] = 0.0
        self.encoder = StateEncoder(shape) if own_encoder else None

    def state(self, history_BH: Tensor) -> Tensor:
        """States `[B, D]` of histories: item ids, the newest last, `n_items` in places before the first.

        Raises:
            ValueError: the network reads the states of another one.
        """
        if self.encoder is None:
            raise ValueError("this network has no encoder of its own")
        absent_BH = history_BH == self.shape.n_items
        embedded_BHD = item_rows(self.item_ND, history_BH.masked_fill(absent_BH, 0))
        state_BD: Tensor = self.encoder(embedded_BHD, absent_BH)
        return state_BD

    def values(self, state_BD: Tensor, item_BR: Tensor) -> Tensor:
        """`f(s,a)` `[B, R]` of some items of each row."""
        return (item_rows(self.item_ND, item_BR) * state_BD[:, None]).sum(-1)


def padded(histories: Sequence[IntArray], shape: LaacShape) -> Tensor:
    """int64 `[B, shape.history]`: the newest items of each history at the right, `n_items` before them."""
    history_BH = np.full((len(histories), shape.history), shape.n_items, dtype=np.int64)
    for row, history in enumerate(histories):
        newest = np.asarray(history)[-shape.history :]
        if len(newest):
            history_BH[row, -len(newest) :] = newest
    return torch.from_numpy(history_BH)


class LaacRanker:
    """A trained policy, or the twin critics, as a `CatalogueRanker`.

    The score of an item is the smallest among its scoring networks: the logit of a policy, the smaller value of two
    critics. Exactly one network has an encoder, whose states all of them read.
    """

    def __init__(self, networks: nn.ModuleList, scoring: Sequence[int], *, chunk: int = 256) -> None:
        """
        Args:
            networks: what the artefact holds.
            scoring: numbers of those that score; one that only lends its encoder does not.
            chunk: histories at once.
        """
        self.networks = networks.eval().requires_grad_(False)
        self.scoring = tuple(scoring)
        self.chunk = chunk
        each: list[Any] = list(networks)
        self._lender: ItemNetwork = next(network for network in each if network.encoder is not None)
        self._scorers: list[ItemNetwork] = [each[number] for number in self.scoring]
        self.shape = self._lender.shape
        self.n_items = self.shape.n_items

    @torch.inference_mode()
    def score_catalogue(self, histories: Sequence[IntArray]) -> FloatArray:
        """See `reward.ranker.CatalogueRanker`."""
        score_BN = np.empty((len(histories), self.n_items), np.float32)
        for first in range(0, len(histories), self.chunk):
            part = histories[first : first + self.chunk]
            state_BD = self._lender.state(padded(part, self.shape))
            scores = torch.stack([state_BD @ network.item_ND.T for network in self._scorers])
            score_BN[first : first + len(part)] = scores.amin(0).numpy()
        return score_BN

    @torch.inference_mode()
    def score(self, histories: Sequence[IntArray], candidates: Sequence[IntArray]) -> list[FloatArray]:
        """See `reward.ranker.Ranker`."""
        counts = [len(items) for items in candidates]
        item_Q = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *candidates]).astype(np.int64))
        row_Q = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.long))
        state_QD = self._lender.state(padded(histories, self.shape))[row_Q]
        scores = torch.stack([(state_QD * network.item_ND[item_Q]).sum(1) for network in self._scorers])
        return [part.numpy() for part in torch.split(scores.amin(0), counts)]

    def save(self, folder: Path, provenance: dict[str, object] | None = None) -> str:
        """Write the ranker artefact and return its digest."""
        own: list[Any] = list(self.networks)
        return RankerArtefact.write(
            folder,
            kind=KIND,
            options={
                "scoring": list(self.scoring),
                "own_encoder": [network.encoder is not None for network in own],
                "shape": self.shape.model_dump(mode="json"),
            },
            tensors={name: tensor.detach().cpu().numpy() for name, tensor in self.networks.state_dict().items()},
            provenance=provenance,
        )

    @classmethod
    def from_artefact(cls, artefact: RankerArtefact) -> LaacRanker:
        """The ranker of an opened artefact of kind `laac`."""
        shape = LaacShape.model_validate(artefact.options["shape"])
        networks = nn.ModuleList(ItemNetwork(shape, own_encoder=bool(own)) for own in artefact.options["own_encoder"])
        networks.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in artefact.tensors.items()})
        return cls(networks, [int(number) for number in artefact.options["scoring"]])
