"""What the guard knows of an updated model: both models on the held-out rows, and the log alone.

    hr@K, ndcg@K, recall@K, mrr@K     the target is the organic interaction after the request, where the log tells of
                                      any; without any, of positive exposures, and the evidence names `exposed_hr@K`
    exposed_hr@K, ...                 the target is the shown item that had a response
    invalid@K, coverage@K, novelty@K  of the same lists
    exposure_gap@K, exposure_divergence@K, repeat_exposure    of the same lists, against what the update was trained on
    ips, snips, dr                    off-policy value of a sampled recommendation (`reward.off_policy`)
    effective_sample_size             of the off-policy estimates
    policy_gap                        mean distance of the engine's log-probabilities from those of transformers

What cannot be measured is left out: a condition on it does not hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from data.catalogue import Catalogue
from data.dataset import Dataset, Samples
from data.errors import RequestError
from data.faults import fault_point
from data.feedback import FeedbackLog, PropensityKind
from data.feedback_reading import FeedbackChecks, read_feedback
from data.records import Decode, DecodeSpec, Prompt
from data.settings import Settings
from launch.continual.guard import Evidence, Range
from launch.continual.organic import organic_samples
from reward.bootstrap import Interval, bootstrap_mean, paired_bootstrap
from reward.direct_model import cross_fitted
from reward.exposure import Exposures
from reward.names import ExposureMetric, RankingMetric
from reward.off_policy import Estimator, LoggedExposures, PolicyValue, policy_value, value_difference
from reward.ranker import Ranker, load_ranker
from trainer.evaluation import Evaluation, Evaluator, sample_rows
from trainer.initial_model import CATALOGUE, check_model
from trainer.logged_policy import LoggedScores, logged_scores
from trainer.prompt_card import PromptCard
from trainer.scored_evaluation import ScoringGenerator

EXPOSED: Final = "exposed_"
SAMPLE_SIZE: Final = "effective_sample_size"
POLICY_GAP: Final = "policy_gap"
LISTS: Final = {*(metric.value for metric in RankingMetric), *(metric.value for metric in ExposureMetric)}


class MeasureSettings(Settings):
    """How the held-out rows are measured."""

    k: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 5, 10), min_length=1)
    """Cut-offs; the largest is the number of beams."""
    rows: int = Field(2000, ge=1)
    """Rows that are decoded, and rows that off-policy values are estimated from, each drawn by the seed."""
    seed: int = Field(0, ge=0)
    """Of the sample and of the resamples."""
    resamples: int = Field(2000, ge=100)
    """Bootstrap resamples, of whole users."""
    batch: int = Field(128, ge=1)
    """Prompts per request to the fleet."""
    weight_clip: float = Field(100.0, gt=0)
    """Importance weights of off-policy values are cut to it."""
    ranker: Path | None = None
    """Ranker whose scores are the direct model of `dr`; without one `dr` is not measured."""
    ranker_history: int = Field(50, ge=1)
    """Latest items of a history that the ranker is shown."""
    draws: int = Field(16, ge=1)
    """Draws per context from each model, over which the direct model is averaged."""


class ClosingGenerator(ScoringGenerator, Protocol):
    """What serves a model: a fleet, or one engine."""

    def close(self) -> None:
        """Let go of what it holds."""
        ...


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model on the held-out rows."""

    evaluations: Mapping[str, Evaluation]
    """By what the targets are: `organic`, `exposed`; those that were asked for and have rows."""
    scores: LoggedScores | None = None
    policy_gap: float | None = None
    drawn_NM: npt.NDArray[np.integer] | None = None
    """Items that the model draws in the contexts of the off-policy rows."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The held-out rows, by what they can tell."""

    log: FeedbackLog
    """With the rows of items that the candidate has retired: it shows those with probability 0, so they weigh nothing
    in its off-policy values, and without them both values would be of other rows than were logged."""
    trained: Path
    """Feedback log that the candidate was trained on."""
    checks: FeedbackChecks
    """Of the candidate."""
    settings: MeasureSettings

    @staticmethod
    def read(folder: Path, *, trained: Path, checks: FeedbackChecks, settings: MeasureSettings) -> HeldOut:
        """Read the log in `folder`.

        Raises:
            RequestError: as `data.feedback_reading.read_feedback`.
        """
        log = read_feedback(folder, dataclasses.replace(checks, active_I=None))
        return HeldOut(log=log, trained=trained, checks=checks, settings=settings)

    @cached_property
    def exposures(self) -> Exposures:
        """What the candidate's log has shown."""
        return Exposures.of(read_feedback(self.trained, self.checks))

    @cached_property
    def organic(self) -> Samples:
        """Requests with an organic interaction after them, as their target; one that both models can show."""
        return self._possible(organic_samples(self.log))

    @cached_property
    def exposed(self) -> Samples:
        """Requests with a response; the target is what was shown, if the candidate can show it."""
        samples = self.log.samples()
        return self._possible(samples.take(np.flatnonzero(self.log.anchors().response_N > 0)))

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """Rows with a propensity that off-policy values are estimated from."""
        kind_N = self.log.table["propensity_kind"].to_numpy(zero_copy_only=False)
        logp0_N = self.log.anchors().logp0_N
        usable = np.flatnonzero((kind_N != PropensityKind.NONE.value) & np.isfinite(logp0_N) & (logp0_N <= 0))
        return usable[sample_rows(len(usable), self.settings.rows, self.settings.seed)]

    def _possible(self, samples: Samples) -> Samples:
        known_N = samples.target_N < self.checks.n_items
        if self.checks.active_I is not None:
            known_N[known_N] = self.checks.active_I[samples.target_N[known_N]]
        return samples.take(np.flatnonzero(known_N))

    def samples(self, name: str) -> Samples:
        """`organic` or `exposed`."""
        return self.organic if name == "organic" else self.exposed

    @property
    def main(self) -> str:
        """Whose targets the ranking metrics have."""
        return "organic" if len(self.organic) else "exposed"


class Measurer:
    """Measures two models on the same held-out rows."""

    def __init__(
        self, start: Callable[[Path, Catalogue], ClosingGenerator], dataset: Dataset | None, held_out: HeldOut
    ) -> None:
        """
        Args:
            start: starts what serves a model; it is closed after the measurement.
            dataset: tells which items are popular, for ranked lists; off-policy values need none.
            held_out: rows that neither model was trained on.
        """
        self._start = start
        self._dataset = dataset
        self._held_out = held_out
        self._settings = held_out.settings

    def measure(
        self, candidate: Path, parent: Path, wanted: Sequence[tuple[str, float]]
    ) -> dict[tuple[str, float], Evidence]:
        """Evidence by metric and confidence; what cannot be measured is left out."""
        metrics = {metric for metric, _ in wanted}
        ours = self._measured(candidate, metrics)
        fault_point("measure")
        theirs = self._measured(parent, metrics)
        ranker = self._ranker() if Estimator.DR in metrics else None
        found = {(metric, level): self._evidence(metric, level, ours, theirs, ranker) for metric, level in wanted}
        return {asked: evidence for asked, evidence in found.items() if evidence is not None}

    def value(self, model: Path, *, level: float) -> PolicyValue:
        """Off-policy estimates of one model; the doubly robust one where there is a ranker.

        Raises:
            RequestError: no row of the log has a propensity.
        """
        if not len(self._held_out.rows):
            raise RequestError("log", "no row with a propensity", "rows that were sampled")
        catalogue = Catalogue.load(model / CATALOGUE)
        prompts, ranker = self._prompts(model, catalogue), self._ranker()
        drawn_NM = None
        if ranker is not None:
            with closing(self._start(model, catalogue)) as fleet:
                drawn_NM = self._draws(fleet, prompts)
        measured = Measured(evaluations={}, scores=self._scores(model, catalogue, prompts), drawn_NM=drawn_NM)
        how: dict[str, Any] = self._how(level) | {"weight_clip": self._settings.weight_clip}
        return policy_value(self._logged(measured, ranker), **how)

    # --- one model ---

    def _measured(self, model: Path, metrics: set[str]) -> Measured:
        catalogue = Catalogue.load(model / CATALOGUE)
        check_model(model, catalogue.vocabulary.size)
        if max(self._settings.k) > catalogue.n_items:
            legal = f"at most {catalogue.n_items}, the items"
            raise RequestError("continual.measure.k", list(self._settings.k), legal)
        targets = {self._targets(metric) for metric in metrics} - {None}
        names = [name for name in ("organic", "exposed") if name in targets and len(self._held_out.samples(name))]
        off_policy = bool(metrics & {*Estimator, SAMPLE_SIZE, POLICY_GAP}) and len(self._held_out.rows) > 0
        prompts = self._prompts(model, catalogue) if off_policy else []
        scores = self._scores(model, catalogue, prompts) if off_policy else None
        with closing(self._start(model, catalogue)) as fleet:
            return Measured(
                evaluations={name: self._evaluator(model, catalogue, name, metrics).run(fleet) for name in names},
                scores=scores,
                policy_gap=self._gap(fleet, catalogue, prompts, scores) if POLICY_GAP in metrics else None,
                drawn_NM=self._draws(fleet, prompts) if off_policy and Estimator.DR in metrics else None,
            )

    def _targets(self, metric: str) -> str | None:
        """Which rows a metric is of; none for those that need no ranked lists."""
        name, exposed = metric.removeprefix(EXPOSED), metric.startswith(EXPOSED)
        if name.partition("@")[0] not in LISTS:
            return None
        return "exposed" if exposed else self._held_out.main

    def _evaluator(self, model: Path, catalogue: Catalogue, name: str, metrics: set[str]) -> Evaluator:
        assert self._dataset is not None, "ranked lists need a dataset"
        of_exposure = {metric.removeprefix(EXPOSED).partition("@")[0] for metric in metrics} & set(ExposureMetric)
        return Evaluator(
            self._dataset,
            catalogue,
            PromptCard.read(model).builder(catalogue, model),
            split="train",
            rows=self._settings.rows,
            ks=self._settings.k,
            batch=self._settings.batch,
            seed=self._settings.seed,
            samples=self._held_out.samples(name),
            exposures=self._held_out.exposures if of_exposure else None,
        )

    def _prompts(self, model: Path, catalogue: Catalogue) -> list[Prompt]:
        builder = PromptCard.read(model).builder(catalogue, model)
        return builder.build(self._held_out.log.samples(), self._held_out.rows).prompts

    def _scores(self, model: Path, catalogue: Catalogue, prompts: list[Prompt]) -> LoggedScores:
        rows = self._held_out.rows
        temperature_N = self._held_out.log.table["temperature"].to_numpy()[rows]
        item_N = self._held_out.log.anchors().item_N[rows]
        return logged_scores(model, catalogue, prompts, item_N, temperature_N, batch=self._settings.batch)

    def _gap(
        self, fleet: ClosingGenerator, catalogue: Catalogue, prompts: list[Prompt], scores: LoggedScores | None
    ) -> float | None:
        """Mean distance per token, over the shown items."""
        if scores is None:
            return None
        item_N = self._held_out.log.anchors().item_N[self._held_out.rows]
        served = fleet.score([prompt.token_ids for prompt in prompts], [catalogue.tokens(int(i)) for i in item_N])
        return float(np.abs(np.concatenate(served) - np.concatenate(scores.token_logp)).mean())

    def _draws(self, fleet: ClosingGenerator, prompts: list[Prompt]) -> npt.NDArray[np.integer]:
        temperature_N = self._held_out.log.table["temperature"].to_numpy()[self._held_out.rows]
        drawn_NM = np.zeros((len(prompts), self._settings.draws), np.int32)
        for temperature in np.unique(temperature_N):
            rows = np.flatnonzero(temperature_N == temperature)
            for first in range(0, len(rows), self._settings.batch):
                part = rows[first : first + self._settings.batch]
                spec = DecodeSpec(
                    decode=Decode.SAMPLE,
                    width=self._settings.draws,
                    temperature=float(temperature),
                    seed=self._settings.seed,
                )
                drawn_NM[part] = fleet.generate([prompts[row] for row in part], spec).item_PG
        return drawn_NM

    # --- both ---

    def _evidence(
        self, metric: str, level: float, ours: Measured, theirs: Measured, ranker: Ranker | None
    ) -> Evidence | None:
        if metric in set(Estimator) or metric == SAMPLE_SIZE:
            return self._off_policy(metric, level, ours, theirs, ranker)
        if metric == POLICY_GAP:
            if ours.policy_gap is None or theirs.policy_gap is None:
                return None
            return exact(ours.policy_gap, theirs.policy_gap, level, len(self._held_out.rows))
        targets = self._targets(metric)
        if targets is None or targets not in ours.evaluations:
            return None
        found = self._listed(metric, level, ours.evaluations[targets], theirs.evaluations[targets])
        if found is None or metric.startswith(EXPOSED) or targets == "organic":
            return found
        return dataclasses.replace(found, measured=EXPOSED + metric)

    def _listed(self, metric: str, level: float, ours: Evaluation, theirs: Evaluation) -> Evidence | None:
        """A metric of ranked lists."""
        name, n = metric.removeprefix(EXPOSED), len(ours.rows)
        if name in ours.items.rows:
            rows_N, before_N, user_N = ours.items.rows[name], theirs.items.rows[name], ours.user_id_N
            how = self._how(level) | {"cluster_N": user_N}
            return Evidence(
                candidate=interval_range(bootstrap_mean(rows_N, **how)),
                parent=interval_range(bootstrap_mean(before_N, **how)),
                difference=interval_range(paired_bootstrap(rows_N, before_N, **how)),
                confidence=level,
                n=n,
            )
        # Of the whole sample and without an interval.
        values, before = ours.items.values | ours.exposure, theirs.items.values | theirs.exposure
        return exact(values[name], before[name], level, n) if name in values and name in before else None

    def _off_policy(
        self, metric: str, level: float, ours: Measured, theirs: Measured, ranker: Ranker | None
    ) -> Evidence | None:
        if ours.scores is None or theirs.scores is None:
            return None
        mine, other = self._logged(ours, ranker), self._logged(theirs, ranker)
        how: dict[str, Any] = self._how(level) | {"weight_clip": self._settings.weight_clip}
        value, before = policy_value(mine, **how), policy_value(other, **how)
        n = len(self._held_out.rows)
        if metric == SAMPLE_SIZE:
            return exact(value.effective_sample_size, before.effective_sample_size, level, n)
        estimator = Estimator(metric)
        if estimator not in value.estimates:
            return None
        return Evidence(
            candidate=interval_range(value.estimates[estimator]),
            parent=interval_range(before.estimates[estimator]),
            difference=interval_range(value_difference(mine, other, **how)[estimator]),
            confidence=level,
            n=n,
        )

    def _logged(self, measured: Measured, ranker: Ranker | None) -> LoggedExposures:
        rows = self._held_out.rows
        anchors, samples = self._held_out.log.anchors(), self._held_out.log.samples()
        shown_N = policy_N = None
        if ranker is not None and measured.drawn_NM is not None:
            shown_N, policy_N = self._direct_model(ranker, samples, measured.drawn_NM)
        assert measured.scores is not None
        return LoggedExposures(
            response_N=(anchors.response_N[rows] > 0).astype(np.float64),
            # Rounding must not make a probability larger than 1.
            logp_N=np.minimum(measured.scores.logp_N, 0.0),
            logp0_N=anchors.logp0_N[rows].astype(np.float64),
            model_shown_N=shown_N,
            model_policy_N=policy_N,
            user_N=samples.user_id_N[rows],
        )

    def _direct_model(
        self, ranker: Ranker, samples: Samples, drawn_NM: npt.NDArray[np.integer]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        rows, anchors = self._held_out.rows, self._held_out.log.anchors()
        histories = [samples.history(int(row), self._settings.ranker_history) for row in rows]
        asked_NM = np.concatenate([anchors.item_N[rows][:, None], drawn_NM], axis=1).astype(np.int32)
        score_NM = np.stack([np.asarray(one, np.float64) for one in ranker.score(histories, list(asked_NM))])
        response_N, user_N = anchors.response_N[rows], samples.user_id_N[rows]
        return cross_fitted(score_NM[:, 0], response_N, user_N, score_NM[:, 1:])

    def _ranker(self) -> Ranker | None:
        return None if self._settings.ranker is None else load_ranker(self._settings.ranker)

    def _how(self, level: float) -> dict[str, Any]:
        return {"seed": self._settings.seed, "resamples": self._settings.resamples, "level": level}


def exact(value: float, before: float, level: float, n: int) -> Evidence:
    """Values of a whole sample, without an interval."""
    candidate, parent, difference = (Range(value=one, low=one, high=one) for one in (value, before, value - before))
    return Evidence(candidate=candidate, parent=parent, difference=difference, confidence=level, n=n)


def interval_range(interval: Interval) -> Range:
    """A bootstrap interval as the guard takes it."""
    return Range(value=interval.mean, low=interval.low, high=interval.high)
