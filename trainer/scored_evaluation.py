"""What an evaluation measures with scores: AUC and its windows on the target and its negatives, and the legal mass.

Negatives are bounded in number: random ones, so that AUC estimates that of the whole catalogue, or the row's best
beams, which are the hardest negatives of the catalogue (methods.md section 4). Scores are log-probabilities of whole
paths over the full vocabulary, as the model itself gives them.

Suffixes: `_N` row, `_M` candidate, `_T` token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from data.catalogue import Catalogue
from data.dataset import Samples
from data.prompts import PromptBuilder
from data.records import Decode, DecodeSpec, FloatArray, Groups, IntArray, LongArray, Prompt
from reward.names import PairwiseMetric, at
from reward.pairwise import PairwiseRows, auc, partial_auc, recall_window, window_auc
from trainer.row_scores import RowScores, Scorer, beam_candidates, random_candidates, score_rows
from trainer.run_settings import NegativeSource, ScoreSettings

DoubleArray = npt.NDArray[np.float64]
LEGAL_MASS: Final = "legal_mass"


class ScoringGenerator(Scorer, Protocol):
    """What answers prompts and scores completions: a fleet, or one engine."""

    def generate(self, prompts: Sequence[Prompt], spec: DecodeSpec) -> Groups:
        """Completions of the prompts, in their order."""
        ...


@dataclass(frozen=True, kw_only=True)
class ScoredRows:
    """Scores of one evaluation, and what follows from them."""

    scores: RowScores
    metrics: dict[str, PairwiseRows]
    """AUC, and its windows at every cut-off that the negatives reach, by name."""
    mass_N: DoubleArray
    """Mean legal mass of the tokens of each row's first completion; NaN where nothing is legal."""
    mass_user_id_N: IntArray

    @property
    def values(self) -> dict[str, float]:
        """Every value by name; what no row defines is left out."""
        values = {name: rows.mean for name, rows in self.metrics.items() if rows.defined_N.any()}
        if np.isfinite(self.mass_N).any():
            values[LEGAL_MASS] = float(np.nanmean(self.mass_N))
        return values

    def rows(self) -> dict[str, tuple[DoubleArray, IntArray]]:
        """Values per row and their users, by name, for intervals."""
        found = {
            name: (rows.value_N[rows.defined_N], self.scores.user_id_N[rows.defined_N])
            for name, rows in self.metrics.items()
            if rows.defined_N.any()
        }
        there_N = np.isfinite(self.mass_N)
        if there_N.any():
            found[LEGAL_MASS] = self.mass_N[there_N], self.mass_user_id_N[there_N]
        return found


@dataclass(frozen=True, kw_only=True)
class ScoredEvaluation:
    """Scores the same rows of a split, whatever generates."""

    catalogue: Catalogue
    builder: PromptBuilder
    samples: Samples
    rows: LongArray
    """[N] rows of the split."""
    settings: ScoreSettings
    ks: tuple[int, ...]
    batch: int
    """Prompts per request."""
    seed: int

    def run(self, engine: ScoringGenerator) -> ScoredRows:
        """Score every row.

        Raises:
            RequestError: no row has a target that may be recommended and enough negatives.
        """
        prompts: list[Prompt] = []
        drawn: list[IntArray | None] = []
        mass: list[DoubleArray] = []
        for first in range(0, len(self.rows), self.batch):
            part = self.builder.build(self.samples, self.rows[first : first + self.batch]).prompts
            groups = engine.generate(part, self._spec())
            drawn += self._candidates(part, groups)
            mass.append(legal_mass(engine, part, groups))
            prompts += part
        scores = score_rows(engine, prompts, drawn, self.catalogue, batch=self.batch)
        return ScoredRows(
            scores=scores,
            metrics=pairwise_metrics(scores.score_NM, self.ks),
            mass_N=np.concatenate(mass),
            mass_user_id_N=np.array([prompt.user_id for prompt in prompts], np.int32),
        )

    def _spec(self) -> DecodeSpec:
        """Beams: one for the legal mass, or one more than negatives, as the target may be among them."""
        width = self._negatives + 1 if self.settings.source is NegativeSource.BEAM else 1
        return DecodeSpec(decode=Decode.BEAM, width=width, seed=self.seed)

    @property
    def _negatives(self) -> int:
        """Half of the catalogue at most, so that rows with a long history have as many as the others."""
        return min(self.settings.negatives, max(1, self.catalogue.n_items // 2))

    def _candidates(self, prompts: Sequence[Prompt], groups: Groups) -> list[IntArray | None]:
        catalogue, negatives = self.catalogue, self._negatives
        if self.settings.source is NegativeSource.RANDOM:
            return [random_candidates(prompt, catalogue, negatives, self.seed) for prompt in prompts]
        beams = zip(prompts, groups.item_PG, groups.valid_PG, strict=True)
        return [beam_candidates(prompt, items[valid], catalogue, negatives) for prompt, items, valid in beams]


def pairwise_metrics(score_NM: FloatArray, ks: Sequence[int]) -> dict[str, PairwiseRows]:
    """AUC, and opauc@K and wpauc@K for every K up to the number of negatives, of rows whose target is candidate 0."""
    wide_NM = score_NM.astype(np.float64)
    positive_NM = np.zeros(wide_NM.shape, np.bool_)
    positive_NM[:, 0] = True
    found = {PairwiseMetric.AUC.value: auc(wide_NM, positive_NM)}
    for k in (k for k in ks if k < wide_NM.shape[1]):
        found[at(PairwiseMetric.OPAUC, k)] = partial_auc(wide_NM, positive_NM, k)
        found[at(PairwiseMetric.WPAUC, k)] = window_auc(wide_NM, positive_NM, recall_window(k))
    return found


def legal_mass(engine: Scorer, prompts: Sequence[Prompt], groups: Groups) -> DoubleArray:
    """Mean full-vocabulary probability of the legal set along each prompt's first completion; NaN without one.

    A completion has log-probability log p over the full vocabulary and log p - log mass over the legal set, so their
    difference tells the mass of every step without a look at the logits. `groups` were decoded at temperature 1.
    """
    mass_P = np.full(len(prompts), np.nan)
    there = np.flatnonzero(groups.valid_PG[:, 0])
    length_P = groups.length_PG[:, 0]
    completions = [groups.token_PGT[row, 0, : length_P[row]] for row in there]
    if not completions:
        return mass_P
    full = engine.score([prompts[row].token_ids for row in there], completions)
    for row, logp_T in zip(there, full, strict=True):
        renormalised_T = groups.logp_PGT[row, 0, : length_P[row]].astype(np.float64)
        # Rounding may put the mass of a set that holds everything a hair above 1.
        mass_P[row] = np.minimum(1.0, np.exp(logp_T.astype(np.float64) - renormalised_T)).mean()
    return mass_P
