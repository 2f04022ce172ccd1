"""Metric names: the one file. Parts that may not import it write the same strings, and the report reads them here.

Ranking metrics at a cut-off are `NAME@K`; step metrics are `group/name`. A reason (a `StrEnum`) becomes a metric by
`count_by_reason`. Groups `time/`, `perf/` and `system/` hold what may differ between equal runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

import numpy as np
import numpy.typing as npt


class RankingMetric(StrEnum):
    """Metrics of ranked lists, at a cut-off K. Definitions: `reward.metrics` (methods.md section 7)."""

    HR = "hr"
    """Share of rows with a hit among the first K."""
    NDCG = "ndcg"
    """Normalised discounted cumulative gain, binary gains."""
    RECALL = "recall"
    """Share of the row's positives among the first K; equals hr with one target."""
    MRR = "mrr"
    """1 / rank of the first hit, 0 beyond K."""
    COVERAGE = "coverage"
    """Share of the catalogue in the union of all first K."""
    NOVELTY = "novelty"
    """Share of the tail items in the union of all first K (NCV)."""
    INVALID = "invalid"
    """Share of the generated outputs among the first K that are no catalogue item."""


PER_ROW = (RankingMetric.HR, RankingMetric.NDCG, RankingMetric.RECALL, RankingMetric.MRR)
"""Metrics that are means over rows, so that intervals can be computed."""


class PairwiseMetric(StrEnum):
    """Metrics of scored candidates. Definitions: `reward.pairwise` (methods.md section 4)."""

    AUC = "auc"
    """Share of (positive, negative) pairs in the right order, ties one half."""
    OPAUC = "opauc"
    """The same against the K highest negatives only: opauc@K."""
    WPAUC = "wpauc"
    """The same against the negatives of K's window only: wpauc@K; equals recall@K with one positive."""


class ExposureMetric(StrEnum):
    """Exposure bias at a cut-off K. Definitions: `reward.exposure` (methods.md section 7)."""

    GAP = "exposure_gap"
    """HR on targets that the log ever exposed minus HR on targets it never exposed."""
    DIVERGENCE = "exposure_divergence"
    """Jensen-Shannon divergence, in bits, between recommendations and exposures over popularity deciles."""
    REPEAT = "repeat_exposure"
    """Share of rows whose first recommendation was exposed to the user before without a response; no cut-off."""


class SessionMetric(StrEnum):
    """What recommendations are worth beside hits, at a cut-off K. Definitions: `reward.session_metrics`."""

    REWARD = "reward"
    """Mean reward (a scaled rating) of the target where it is among the first K, else 0."""
    REPETITION = "repetition"
    """Mean over sessions of the slots that show an item which the session was shown before."""
    DIVERSITY = "ild"
    """Mean distance of two items of a list, 1 - cosine of their vectors (intra-list diversity)."""


class Slice(StrEnum):
    """Rows by the popularity of their target; the prefix of a metric: `tail_recall@10`."""

    TAIL = "tail"
    """The target is a tail item (`reward.metrics.tail_items`)."""
    HEAD = "head"
    """It is not."""


class StepMetric(StrEnum):
    """Metrics of the reward side of a training step."""

    REWARD_MEAN = "reward/mean"
    """Mean reward over the valid completions of scored groups."""
    REWARD_STD = "reward/std"
    """Mean over scored groups of the standard deviation within the group."""
    REWARD_HIT = "reward/hit"
    """Share of scored groups that contain the ground truth item."""
    REWARD_LIVE = "reward/live_groups"
    """Share of scored groups whose rewards differ, so that they carry gradient."""
    REWARD_FAILED = "reward/failed_share"
    """Share of groups without a reward."""
    REWARD_PART = "reward/part"
    """Prefix of the mean of each source, unweighted: reward/part/item_match."""
    REWARD_FAIL = "reward_fail"
    """Prefix of the failed groups by reason: reward_fail/timeout."""
    GATE_FAIL = "gate_fail"
    """Prefix of the groups that the gate has no ranker scores for, by reason: gate_fail/timeout."""
    REWARD_REQUESTS = "system/reward_requests"
    """Calls of the reward service since this start, attempts included: a continued run counts anew."""


def at(metric: RankingMetric | PairwiseMetric | ExposureMetric | SessionMetric | str, k: int) -> str:
    """The name of a metric at a cut-off: `at("ndcg", 10)` is "ndcg@10"."""
    named = metric if isinstance(metric, PairwiseMetric | ExposureMetric | SessionMetric) else RankingMetric(metric)
    return f"{named.value}@{k}"


def count_by_reason(prefix: str, reasons: Iterable[StrEnum], found: npt.NDArray[np.str_]) -> dict[str, float]:
    """`PREFIX/REASON` → number of times; every reason but the empty one, so that zeros are visible."""
    return {f"{prefix}/{reason.value}": float((found == reason.value).sum()) for reason in reasons if reason.value}
