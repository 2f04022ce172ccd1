"""Where the reward of a run helps: its ranker beside its policy, prompt by prompt, before and after training.

The policy's group is its beams, the ground truth ranks behind all of them where they miss it; head, tail and the
ranks are those of the gate (`trainer.gate`). Strata: `reward.stratified`.

Suffixes: `_N` prompt, `_G` beam.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from data.catalogue import Catalogue
from data.records import NO_ITEM, BoolArray, Groups, IntArray, LongArray, Prompt
from reward.batch_scoring import BatchScores, score_batch
from reward.bootstrap import bootstrap_mean
from reward.ranker import Ranker
from reward.stratified import difficulty_bins, stratified_report
from trainer.gate import Gate, gate_parts
from trainer.gate_scores import gate_scores
from trainer.members import Members

DoubleArray = npt.NDArray[np.float64]
_CHUNK = 64
"""Samples per ranker call."""


@dataclass(frozen=True)
class LocalScorer:
    """A ranker in this process, as the gate asks one."""

    ranker: Ranker

    def raw_scores(self, prompts: Sequence[Prompt], wanted: Sequence[IntArray]) -> BatchScores:
        """See `trainer.gate_scores.RawScorer`."""
        return score_batch(self.ranker, [prompt.history for prompt in prompts], wanted, chunk=_CHUNK)


@dataclass(frozen=True, kw_only=True)
class RankerView:
    """What the gate finds of each prompt."""

    policy_rank_N: LongArray
    """1-based rank of the ground truth among the policy's beams; one behind the last where they miss it."""
    ranker_rank_N: LongArray
    """The same by the ranker; ties count against it."""
    discriminable_N: BoolArray
    """Head and tail: the ranker has the ground truth near the top and items of other prompts near the bottom."""
    known_N: BoolArray
    """Prompts with a ground truth that may be recommended, beams, and scores; nothing else is defined elsewhere."""

    def only(self, known_N: BoolArray) -> RankerView:
        """The same, known only where `known_N` is true as well."""
        return dataclasses.replace(self, known_N=self.known_N & known_N)

    @staticmethod
    def joined(parts: Sequence[RankerView]) -> RankerView:
        """The prompts of all parts."""
        names = ("policy_rank_N", "ranker_rank_N", "discriminable_N", "known_N")
        joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return RankerView(**joined)


def ranker_view(
    ranker: Ranker, prompts: Sequence[Prompt], groups: Groups, catalogue: Catalogue, gate: Gate, *, seed: int
) -> RankerView:
    """The gate's parts for one batch of prompts and the policy's beams for them."""
    path_id_I = catalogue.active_path_id
    target_N = np.array([prompt.target for prompt in prompts])
    allowed_N = np.array([prompt.target >= 0 and prompt.target not in prompt.exclusions for prompt in prompts])
    wanted_N = np.where(allowed_N, path_id_I[target_N], NO_ITEM)
    hit_NG = hits(groups, wanted_N, path_id_I)
    scores = gate_scores(LocalScorer(ranker), prompts, groups, gate, seed=seed)
    score_NG = groups.sequence_logp_PG
    truth_N = np.where(hit_NG, score_NG, -np.inf).max(1)
    parts = gate_parts(
        Members(
            valid_PG=torch.from_numpy(groups.valid_PG),
            kind_PG=torch.zeros(groups.valid_PG.shape, dtype=torch.int64),
            segment_PGT=torch.zeros(groups.token_PGT.shape, dtype=torch.int64),
        ),
        score_PG=torch.from_numpy(score_NG),
        truth_score_P=torch.from_numpy(truth_N),
        has_truth_P=torch.from_numpy((wanted_N != NO_ITEM) & (scores.failure_P == "")),
        hit_PG=torch.from_numpy(hit_NG),
        ranker=scores.scores,
        gate=gate,
    )
    return RankerView(
        policy_rank_N=parts.rank_policy_P.numpy(),
        ranker_rank_N=parts.rank_ranker_P.numpy(),
        discriminable_N=(parts.head_P & parts.tail_P).numpy(),
        known_N=parts.known_P.numpy(),
    )


def hits(groups: Groups, wanted_N: IntArray, path_id_I: IntArray) -> BoolArray:
    """[N, G] beams with the path of the ground truth."""
    there_NG = groups.valid_PG & (groups.item_PG != NO_ITEM)
    path_NG = np.where(there_NG, path_id_I[np.where(there_NG, groups.item_PG, 0)], NO_ITEM)
    found: BoolArray = there_NG & (path_NG == wanted_N[:, None]) & (wanted_N[:, None] != NO_ITEM)
    return found


def beam_ndcg(hit_NG: BoolArray, k: int) -> DoubleArray:
    """[N] NDCG@k of beams with one target."""
    top_NG = hit_NG[:, :k]
    return np.where(top_NG.any(1), 1 / np.log2(top_NG.argmax(1) + 2.0), 0.0)


def strata(
    view: RankerView,
    oracle_rank_N: LongArray | None,
    before_N: DoubleArray,
    after_N: DoubleArray,
    user_id_N: IntArray,
    *,
    bins: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The strata of the known prompts, with the metric before and after training and its gain, users resampled.

    Args:
        view: the run's own ranker.
        oracle_rank_N: rank of the ground truth by a ranker without the bias; None without one.
        before_N: a metric of the initial policy.
        after_N: the same of the trained one.
        bins: quantiles of the policy's rank.
        seed: of the bootstrap.
    """
    known_N = view.known_N
    policy_rank_N, discriminable_N = view.policy_rank_N[known_N], view.discriminable_N[known_N]
    gain_N = (after_N - before_N)[known_N]
    values = {"before": before_N[known_N], "after": after_N[known_N], "gain": gain_N}
    if oracle_rank_N is not None:
        values["oracle_correction"] = policy_rank_N.astype(np.float64) - oracle_rank_N[known_N]
    report = stratified_report(policy_rank_N, view.ranker_rank_N[known_N], discriminable_N, bins=bins, values=values)
    bin_N = difficulty_bins(policy_rank_N, bins)
    answer = []
    for stratum in report:
        chosen_N = (bin_N == stratum.difficulty) & (discriminable_N == stratum.discriminable)
        entry = stratum.as_json()
        entry["gain_ci95"] = None
        if chosen_N.any():
            interval = bootstrap_mean(gain_N[chosen_N], seed=seed, cluster_N=user_id_N[known_N][chosen_N])
            entry["gain_ci95"] = [interval.low, interval.high]
        answer.append(entry)
    return answer
