"""Credit for each position of a ranked list by counterfactual swaps, by evaluation: a ranker scores the swapped lists.

    r_k = mean over the compared positions j of [ score(list) - score(list with k and j swapped) ]

For a ranker whose score is the NDCG of fixed gains, and with every swap taken, this is the closed form of
`reward.swap_credit`. With fewer swaps the compared positions are drawn without replacement, so the credit is an
unbiased estimate; the draw is a function of seed, history and list alone. Every distinct list is scored once, in one
batched call, and remembered in a bounded cache.

Source: methods.md section 3. Suffixes: `N` list, `K` position, `S` swap.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from pydantic import Field

from data.records import FloatArray, IntArray, LongArray, RewardFailure
from data.settings import Settings
from reward.swap_credit import ListCredit, SwapForm

LOG = logging.getLogger(__name__)

SWAPPED = (SwapForm.CAUSAL, SwapForm.ALL_PAIRS)
"""Forms that compare swapped lists."""


class ListRanker(Protocol):
    """Scores whole lists; larger is better, and a swap is worth the difference of two scores."""

    version: str
    """Identifies the ranker in the cache; another state of it is another version."""

    def score_list(self, histories: Sequence[IntArray], lists: Sequence[IntArray]) -> FloatArray:
        """Scores `[N]` of `lists[i]` (item ids, best first) after `histories[i]`, a function of its arguments alone."""
        ...


class SwapSampling(Settings):
    """Which swaps a list-wise ranker is asked for."""

    swaps: int = Field(8, ge=1, le=4096)
    """Swaps per position, drawn without replacement; at least the length of the list takes all of them."""
    cache_lists: int = Field(1_000_000, ge=0, le=10**9)
    """Scores of lists that are remembered, about 150 bytes each; the one unused for longest goes first."""


class ScoreCache:
    """Scores of lists by (ranker version, history, list), at most `capacity`; the least recently used goes first.

    The history stands for the user, because it is all that a ranker knows of one.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.evicted = 0
        """Scores that had to go since the beginning."""
        self._score: OrderedDict[bytes, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._score)

    def get(self, key: bytes) -> float | None:
        """The score, None where it is not known; it counts as used now."""
        score = self._score.get(key)
        if score is not None:
            self._score.move_to_end(key)
        return score

    def put(self, key: bytes, score: float) -> None:
        """Remember a score."""
        self._score[key] = score
        self._score.move_to_end(key)
        if len(self._score) > self.capacity:
            self._score.popitem(last=False)
            self.evicted += 1


class EvaluatedCredit(NamedTuple):
    """Credit of lists by evaluation."""

    credit: ListCredit
    """As the closed form has it. The scale is the ranker's, so the ideal is 1, and 0 for empty and failed lists."""
    failure_N: npt.NDArray[np.str_]
    """A `RewardFailure` per list, the empty string where it has a credit; a failed list's credit is zero."""
    metrics: dict[str, float]
    """Counts: lists asked for, duplicates among them, found in the cache, scored, and evicted from the cache."""


class _Asked(NamedTuple):
    """One list and its swaps."""

    key: bytes
    """Of the list itself."""
    position_S: LongArray
    swap_keys: list[bytes]


def evaluate_swaps(
    ranker: ListRanker,
    histories: Sequence[IntArray],
    lists: Sequence[IntArray],
    form: SwapForm,
    sampling: SwapSampling,
    cache: ScoreCache,
    *,
    seed: int,
) -> EvaluatedCredit:
    """Credit of every position of a batch of lists, from one call of the ranker.

    A score that is not finite fails the lists that need it (`non_finite`); a ranker that raises, or returns another
    number of scores, fails all lists with a score that is not in the cache (`error`).

    Args:
        histories: item ids per list, oldest first.
        lists: item ids in list order; of any length, duplicates allowed.
        form: `causal` or `all_pairs`.
        cache: of earlier calls; what is scored here joins it.
        seed: of the drawn swaps.

    Raises:
        ValueError: a form without swaps.
    """
    if form not in SWAPPED:
        raise ValueError(f"{form.value} credit compares no swapped lists, so there is nothing to evaluate")
    wanted: dict[bytes, tuple[IntArray, IntArray]] = {}
    asked = [
        _ask(ranker.version, np.asarray(history, np.int32), np.asarray(items, np.int32), form, sampling, seed, wanted)
        for history, items in zip(histories, lists, strict=True)
    ]
    evicted = cache.evicted
    cached = {key: known for key in wanted if (known := cache.get(key)) is not None}
    unknown = {key: pair for key, pair in wanted.items() if key not in cached}
    score = cached | _scored(ranker, unknown)
    for key in unknown:
        if np.isfinite(score.get(key, np.nan)):
            cache.put(key, score[key])
    requested = sum(1 + len(one.swap_keys) for one in asked if len(one.key))
    metrics = {
        "swaps/lists": float(requested),
        "swaps/duplicates": float(requested - len(wanted)),
        "swaps/cached": float(len(cached)),
        "swaps/scored": float(len(unknown)),
        "swaps/evicted": float(cache.evicted - evicted),
    }
    return _credit(asked, [len(items) for items in lists], score, metrics)


def _ask(
    version: str,
    history: IntArray,
    items: IntArray,
    form: SwapForm,
    sampling: SwapSampling,
    seed: int,
    wanted: dict[bytes, tuple[IntArray, IntArray]],
) -> _Asked:
    """The swaps of one list; what has to be scored for them joins `wanted`."""
    if not len(items):
        return _Asked(b"", np.zeros(0, np.int64), [])
    prefix = b"%b\0%d\0%b" % (version.encode(), len(history), history.tobytes())

    def ask(row: IntArray) -> bytes:
        key = xxhash.xxh3_128_digest(prefix + row.tobytes())
        wanted.setdefault(key, (history, row))
        return key

    draw = xxhash.xxh3_128_intdigest(b"%d\0%b%b" % (seed, prefix, items.tobytes()))
    position_S, other_S = _swapped_positions(len(items), form, sampling.swaps, draw)
    swapped_SK = np.repeat(items[None], len(position_S), 0)
    rows_S = np.arange(len(position_S))
    swapped_SK[rows_S, position_S] = items[other_S]
    swapped_SK[rows_S, other_S] = items[position_S]
    return _Asked(ask(items), position_S, [ask(row) for row in swapped_SK])


def _swapped_positions(length: int, form: SwapForm, swaps: int, draw: int) -> tuple[LongArray, LongArray]:
    """Positions and what each is swapped with, at most `swaps` per position, by the counter-based draw of one key."""
    allowed_KK = ~np.eye(length, dtype=bool)
    if form is SwapForm.CAUSAL:
        allowed_KK = np.triu(allowed_KK, 1)
    if swaps < length - 1:
        order_KK = np.random.Generator(np.random.Philox(key=draw)).random((length, length))
        order_KK[~allowed_KK] = np.inf
        chosen_KS = np.argpartition(order_KK, swaps - 1, axis=1)[:, :swaps]
        drawn_KK = np.zeros_like(allowed_KK)
        np.put_along_axis(drawn_KK, chosen_KS, values=True, axis=1)
        allowed_KK &= drawn_KK
    position_S, other_S = allowed_KK.nonzero()
    return position_S, other_S


def _scored(ranker: ListRanker, unknown: dict[bytes, tuple[IntArray, IntArray]]) -> dict[bytes, float]:
    """Scores by key; empty where the ranker failed."""
    if not unknown:
        return {}
    histories, lists = zip(*unknown.values(), strict=True)
    try:
        found = np.asarray(ranker.score_list(histories, lists), np.float64)
    except Exception:  # a ranker is foreign code: whatever it raises becomes the reason `error` of its lists
        LOG.exception("the list-wise ranker failed on %d lists", len(lists))
        return {}
    if found.shape != (len(lists),):
        LOG.error("the list-wise ranker returned scores of shape %s for %d lists", found.shape, len(lists))
        return {}
    return dict(zip(unknown, found.tolist(), strict=True))


def _credit(
    asked: Sequence[_Asked], lengths: Sequence[int], score: dict[bytes, float], metrics: dict[str, float]
) -> EvaluatedCredit:
    credit_NK = np.zeros((len(asked), max(lengths, default=0)))
    ideal_N = np.zeros(len(asked))
    failure_N = np.full(len(asked), RewardFailure.NONE.value, dtype="U16")
    for row, (one, length) in enumerate(zip(asked, lengths, strict=True)):
        if not length:
            continue
        if any(key not in score for key in (one.key, *one.swap_keys)):
            failure_N[row] = RewardFailure.ERROR.value
            continue
        delta_S = score[one.key] - np.array([score[key] for key in one.swap_keys])
        if not np.isfinite(delta_S).all() or not np.isfinite(score[one.key]):
            failure_N[row] = RewardFailure.NON_FINITE.value
            continue
        compared_K = np.bincount(one.position_S, minlength=length)
        credit_NK[row, :length] = np.bincount(one.position_S, delta_S, length) / np.maximum(compared_K, 1)
        ideal_N[row] = 1.0
    return EvaluatedCredit(ListCredit(torch.from_numpy(credit_NK), torch.from_numpy(ideal_N)), failure_N, metrics)
