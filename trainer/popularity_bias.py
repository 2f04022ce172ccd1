"""A training log biased by popularity: each event is kept or not, with a probability that grows with its item's count.

It stands for the log of a system that showed popular items more often, so a ranker trained on it is AdaGRPO's reward
model with exposure bias, and the one of the whole log its oracle (methods.md section 2, "Data").

Suffixes: `_I` item, `_E` event of the sequences, `_S` sequence.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data.dataset import Sequences
from data.errors import RequestError
from data.records import LongArray
from trainer.ranker_settings import RankerBiasSettings

_BIAS_STREAM = 13
DoubleArray = npt.NDArray[np.float64]


def item_counts(sequences: Sequences, n_items: int) -> LongArray:
    """[I] events of each item in the sequences."""
    values = [sequences.values[s:e] for s, e in zip(sequences.start_S, sequences.end_S, strict=True)]
    events = np.concatenate(values) if values else np.zeros(0, np.int32)
    return np.bincount(events, minlength=n_items).astype(np.int64)


def keep_probabilities(count_I: LongArray, bias: RankerBiasSettings) -> DoubleArray:
    """[I] probability that an event of the item is kept: min(1, c count^exponent), c such that `keep` of all is kept.
    Items without events get 0.
    """
    weight_I = np.where(count_I > 0, np.maximum(count_I, 1) ** float(bias.exponent), 0.0)
    wanted = bias.keep * count_I.sum()
    # The most popular items reach 1 first; with the m heaviest at 1, the rest has to give what is still wanted.
    order = np.argsort(-weight_I, kind="stable")[: int((count_I > 0).sum())]
    weight, count = weight_I[order], count_I[order]
    saturated = np.concatenate([[0], np.cumsum(count)[:-1]])
    expected = (weight * count)[::-1].cumsum()[::-1]
    scale = (wanted - saturated) / expected
    # The first m at which the heaviest of the rest stays at or below 1.
    fits = np.flatnonzero(scale * weight <= 1 + 1e-12)
    if not len(fits):
        return (count_I > 0).astype(np.float64)
    return np.asarray(np.minimum(1.0, scale[fits[0]] * weight_I), np.float64)


def popularity_subsample(sequences: Sequences, n_items: int, bias: RankerBiasSettings, *, seed: int) -> Sequences:
    """The sequences with the events that were kept; those left with fewer than two events, or no target, are dropped.

    The draw is a function of the seed and the events, the same for every ranker kind.

    Raises:
        RequestError: nothing is left to train on.
    """
    keep_I = keep_probabilities(item_counts(sequences, n_items), bias)
    draw_E = np.random.default_rng([seed, _BIAS_STREAM]).random(len(sequences.values))
    kept_E = draw_E < keep_I[sequences.values]
    before_E = np.concatenate([[0], np.cumsum(kept_E)])
    start_S, end_S = before_E[sequences.start_S], before_E[sequences.end_S]
    loss_from_S = before_E[sequences.start_S + sequences.loss_from_S] - start_S
    # Training takes 0 and 1 for a sequence that begins where its user does, and then trains on its first event as well.
    loss_from_S = np.maximum(loss_from_S, np.minimum(sequences.loss_from_S, 2))
    usable_S = (end_S - start_S >= 2) & (loss_from_S < end_S - start_S)
    if not usable_S.any():
        raise RequestError("ranker.bias.keep", bias.keep, "a larger share: no sequence keeps two events")
    return Sequences(
        values=sequences.values[kept_E],
        start_S=start_S[usable_S].astype(np.int64),
        end_S=end_S[usable_S].astype(np.int64),
        loss_from_S=loss_from_S[usable_S].astype(np.int64),
        user_id_S=sequences.user_id_S[usable_S],
    )
