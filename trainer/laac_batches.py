"""Transitions as tensors, and the rows of each step: a pure function of (seed, step), so that a run continues exactly.

Suffixes: `_N` transition, `_B` row of a batch, `_H` place in the history, `_R` answer of the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.records import FloatArray, IntArray, LongArray
from data.transitions import Sessions, Transitions
from trainer.ranks import RankPlace

_BATCH_STREAM = 41


class Batch(NamedTuple):
    """A rank's rows of a step."""

    history_BH: Tensor
    """int64 items of the state, the newest last, `n_items` before the first."""
    next_BH: Tensor
    """The same of the next state."""
    action_B: Tensor
    reward_B: Tensor
    done_B: Tensor
    answer_BR: Tensor
    """int64 items that the reference answers; 0 where there is none."""
    weight_BR: Tensor
    """Their probabilities, 0 where there is none; a masked state has zeros only."""
    last_B: Tensor
    """int64 newest item of the state."""


class Counts(NamedTuple):
    """Rows of a step over all ranks."""

    rows: int
    referenced: int
    """Rows whose state has an answer of the reference."""


@dataclass(frozen=True, kw_only=True)
class TransitionTable:
    """All transitions with the reference's answers, in memory that every rank has."""

    history_NH: IntArray
    action_N: IntArray
    reward_N: FloatArray
    done_N: np.ndarray
    answer_NR: IntArray
    weight_NR: FloatArray

    @staticmethod
    def of(
        sessions: Sessions, transitions: Transitions, answer_NR: IntArray, weight_NR: FloatArray, *, history: int
    ) -> TransitionTable:
        """The table of a job's transitions, with the answers of their states."""
        return TransitionTable(
            history_NH=histories(
                sessions.item_E, transitions.start_N, transitions.event_N, history, sessions.dataset.n_items
            ),
            action_N=sessions.item_E[transitions.event_N],
            reward_N=transitions.reward_N,
            done_N=transitions.done_N,
            answer_NR=answer_NR,
            weight_NR=weight_NR,
        )

    def __len__(self) -> int:
        return len(self.action_N)

    def batch(self, seed: int, step: int, size: int, place: RankPlace) -> tuple[Batch, Counts]:
        """This rank's share of the batch of a step (drawn with replacement), and the counts of the whole one."""
        rows = np.random.default_rng([seed, _BATCH_STREAM, step]).integers(len(self), size=size)
        referenced = int((self.weight_NR[rows].sum(1) > 0).sum())
        own = rows[place.rank :: place.ranks]
        history_BH = torch.from_numpy(self.history_NH[own].astype(np.int64))
        action_B = torch.from_numpy(self.action_N[own].astype(np.int64))
        batch = Batch(
            history_BH=history_BH,
            next_BH=torch.cat([history_BH[:, 1:], action_B[:, None]], 1),
            action_B=action_B,
            reward_B=torch.from_numpy(self.reward_N[own]),
            done_B=torch.from_numpy(self.done_N[own]),
            answer_BR=torch.from_numpy(self.answer_NR[own].astype(np.int64)),
            weight_BR=torch.from_numpy(self.weight_NR[own]),
            last_B=history_BH[:, -1],
        )
        return batch, Counts(rows=size, referenced=referenced)


def histories(item_E: IntArray, start_N: LongArray, end_N: LongArray, history: int, n_items: int) -> IntArray:
    """int32 [N, history]: the newest items of `item_E[start:end]` at the right, `n_items` before them."""
    at_NH = end_N[:, None] - np.arange(history, 0, -1)
    inside_NH = at_NH >= start_N[:, None]
    return np.where(inside_NH, item_E[np.maximum(at_NH, 0)], n_items).astype(np.int32)
