"""LAAC jobs: sessions, the reference's answers, the learner, evaluations, checkpoints, and rankers at the end.

Of the evaluated checkpoints the one with the best validation metric is the result; it is exported as two rankers,
`RUN/ranker` (the policy) and `RUN/critic` (the twin critics, of LAAC alone), and evaluated on the test rows. Without
evaluations between (`evaluation.every: 0`) the result is the last one. Critics that diverge end the run: the last
checkpoint before stays, and the error says which term grew.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import Dataset
from data.errors import RequestError, RunError
from data.records import FloatArray, IntArray
from data.split import Chronological
from data.transitions import Sessions
from reward.artefact import RankerArtefact
from reward.laac import LaacRanker, LaacShape
from reward.metrics import tail_items
from trainer.checkpoints import CheckpointStore, Facts, check_own, open_checkpoint, open_model, read_manifest
from trainer.durable import write_text
from trainer.jobs import LaacJob
from trainer.laac_batches import TransitionTable
from trainer.laac_evaluation import SessionEvaluation, answer_lists, invalid_rate, sampled, without_invalid
from trainer.laac_group import LaacGroup
from trainer.laac_learner import DivergedError, critic_networks, policy_networks
from trainer.laac_settings import Method, ReferenceKind
from trainer.ranker_training import compute_threads
from trainer.reference_answers import AnswerCount, ReferenceAnswers, weighted
from trainer.reference_policy import description, model_answers, model_digest, random_answers

LOG_EVERY = 100
"""Steps of a line of metrics.jsonl, which holds their means."""
CACHE = "reference.parquet"
PROGRESS = "progress.json"
DIVERGED = "diverged.txt"
"""File of a run whose critics diverged: the line that it ended with. The same start would end so again."""
POLICY, CRITIC = "ranker", "critic"
Log = Callable[[int, Mapping[str, float]], None]


@dataclass
class _Progress:
    """Where the run stands."""

    stale: int = 0
    """Evaluations since the last improvement."""
    best: float = -1.0
    """Best value of the selection metric; all of them are at least 0."""
    hours_before: float = 0.0
    """Wall time of earlier starts."""
    seconds: float = 0.0
    """Of steps alone, in this start."""
    steps: int = 0
    """Taken in this start."""
    begun: float = field(default_factory=time.monotonic)

    @property
    def hours(self) -> float:
        """Wall time of all starts."""
        return self.hours_before + (time.monotonic() - self.begun) / 3600

    def write(self, path: Path) -> None:
        """Keep in a checkpoint what a continued run needs."""
        path.write_text(json.dumps({"best": self.best, "stale": self.stale, "hours": self.hours}) + "\n")

    def read(self, path: Path) -> None:
        """Continue from a checkpoint."""
        content = json.loads(path.read_text())
        self.best, self.stale, self.hours_before = content["best"], content["stale"], content["hours"]


class LaacRun:
    """One job in its folder."""

    def __init__(
        self, job: LaacJob, folder: Path, log: Log, *, say: Callable[[str], None] = lambda message: None
    ) -> None:
        """
        Args:
            folder: of the run.
            log: receives (step, metrics).
            say: tells the person who watches how far the reference is.

        Raises:
            RequestError: the sessions that the job names cannot be had.
        """
        self.job = job
        self.folder = folder
        self.log = log
        self.say = say
        self.sessions = Sessions(Dataset.open(job.data.dataset), job.data)
        if job.laac.method is not Method.REFERENCE:
            self.sessions.rows("valid")  # the last step is evaluated on them: none is an error before the first
        self.evaluation = SessionEvaluation(self.sessions)
        self.store = CheckpointStore(folder / "checkpoints", job.checkpoints)
        self.shape = LaacShape(
            n_items=self.sessions.dataset.n_items,
            width=job.laac.width,
            history=job.data.history,
            encoder=job.laac.encoder,
        )
        self.facts = Facts(
            catalogue_digest=self.sessions.dataset.fingerprint, vocabulary_size=self.sessions.dataset.n_items
        )
        self._progress = _Progress()

    # -- the reference

    def reference(self) -> tuple[IntArray, FloatArray, dict[str, int], ReferenceAnswers | None]:
        """Answers and weights of the training states, counts, and the answers as they were given.

        Raises:
            RequestError: no model, a cache that was asked otherwise, or one without an answer for these states.
        """
        settings, transitions = self.job.laac.reference, self.sessions.transitions
        if not self.job.laac.method.asks:
            none = (len(transitions), 1)
            return np.zeros(none, np.int32), np.zeros(none, np.float32), {}, None
        if settings.kind is ReferenceKind.LOGGED:
            actions = self.sessions.item_E[transitions.event_N][:, None]
            return actions, np.ones(actions.shape, np.float32), {}, None
        answers = self._answers()
        given_NR, not_asked = answers.of(transitions.event_N)
        item_NR, weight_NR, counts = weighted(given_NR, self.sessions.dataset.n_items, settings.weighting)
        counts[AnswerCount.NOT_ASKED.value] = not_asked
        counts[AnswerCount.MASKED.value] = len(transitions) - not_asked - counts[AnswerCount.STATES.value]
        if not counts[AnswerCount.STATES.value] and self.job.laac.method is Method.LAAC:
            found = f"no answer for {len(transitions)} training states"
            raise RequestError(str(self.cache), found, "a cache of these sessions, or another laac.reference.cache")
        return item_NR, weight_NR, counts, answers

    @property
    def cache(self) -> Path:
        """Where the answers are kept."""
        return self.job.laac.reference.cache or self.folder / CACHE

    def _answers(self) -> ReferenceAnswers:
        settings = self.job.laac.reference
        digest = None
        if settings.kind is ReferenceKind.LLM and settings.model is not None:
            digest = model_digest(open_model(settings.model))
        if self.cache.is_file():
            return ReferenceAnswers.read(self.cache, description(self.sessions, settings, digest))
        if settings.kind is ReferenceKind.RANDOM:
            answers = random_answers(self.sessions, settings)
        else:
            answers = model_answers(
                self.sessions,
                settings,
                self.job.rollout,
                lambda done, total: self.say(f"reference: {done} of {total} states answered"),
            )
        answers.write(self.cache)
        return ReferenceAnswers.read(self.cache, answers.asked)

    # -- training

    def run(self, interrupted: Callable[[], bool]) -> dict[str, Any]:
        """Train to a limit, export and evaluate; returns the summary.

        Raises:
            RunError: the critics diverged; the last checkpoint stays.
        """
        job = self.job
        (self.folder / DIVERGED).unlink(missing_ok=True)
        item_NR, weight_NR, counts, answers = self.reference()
        facts: dict[str, Any] = {"sessions": dict(self.sessions.counts)}
        if job.laac.method.asks:
            facts["reference"] = self._reference_facts(counts)
        if job.laac.method is Method.REFERENCE:
            if answers is None:
                raise RequestError("laac.reference.kind", "logged", "random or llm with method reference")
            test = self.sessions.rows("test").event_N
            _, missing = answers.of(test)
            if missing:
                found = f"{missing} of {len(test)} test rows were not asked"
                raise RequestError(str(self.cache), found, "a cache asked with laac.reference.test_rows true")
            return facts | {"stages": {"reference": self._test(answers=answers)}, "ended_by": "no training"}
        table = TransitionTable.of(
            self.sessions, self.sessions.transitions, item_NR, weight_NR, history=job.data.history
        )
        arguments = {
            "settings": job.laac,
            "shape": self.shape,
            "table": table,
            "seed": job.seed,
            "novel_I": tail_items(self.evaluation.train_count_I),
            "unit_ID": _unit(self.evaluation.vector_ID),
        }
        with compute_threads(job.laac.threads), closing(LaacGroup.open(job.laac, arguments)) as group:
            ended_by = self._train(group, interrupted)
            step = group.step
        facts["steps"] = step
        if ended_by == "interrupted":
            return facts | {"ended_by": ended_by}
        chosen = self._chosen()
        self._export(chosen)
        facts["selection"] = {
            "metric": job.evaluation.metric,
            "best_step": read_manifest(chosen).step,
            "best_score": read_manifest(chosen).score,
        }
        if self._progress.steps:
            facts["seconds_per_1000_steps"] = 1000 * self._progress.seconds / self._progress.steps
        with compute_threads(job.laac.threads):
            stage = self._test(ranker=self._policy(self.folder / POLICY))
        return facts | {"stages": {job.laac.method.value: stage}, "ended_by": ended_by}

    def _reference_facts(self, counts: dict[str, int]) -> dict[str, Any]:
        """Counts, and how many test rows lie before the boundary that the model of the reference was trained up to."""
        facts: dict[str, Any] = {"kind": self.job.laac.reference.kind.value, **counts}
        split = self.sessions.dataset.split
        if self.job.laac.reference.kind is ReferenceKind.LLM and isinstance(split, Chronological):
            time_N = self.sessions.rows("test").samples.timestamp_N
            facts["test_rows_before_its_boundary"] = int((time_N < split.valid_from).sum())
        return facts

    def _train(self, group: LaacGroup, interrupted: Callable[[], bool]) -> str:
        """Steps, evaluations and checkpoints up to a limit; returns why it ended."""
        job, progress = self.job, self._progress
        newest = self.store.latest()
        if newest is not None:
            check_own(self.store.root, newest)
            open_checkpoint(newest, self.facts)
            group.load(newest / "state")
            progress.read(newest / PROGRESS)
        step = group.step
        limit = job.limits.max_steps
        while True:
            if limit is not None and step >= limit:
                ended_by = "max_steps"
            elif job.limits.max_hours is not None and progress.hours >= job.limits.max_hours:
                ended_by = "max_hours"
            elif job.early_stopping.patience and progress.stale >= job.early_stopping.patience:
                ended_by = "early_stopping"
            elif interrupted():
                ended_by = "interrupted"
            else:
                step = self._segment(group, step, limit)
                continue
            if not self.store.path(step).is_dir():
                self._checkpoint(group, step)
            return ended_by

    def _segment(self, group: LaacGroup, step: int, limit: int | None) -> int:
        """Steps up to the next line of the log, and what is due there."""
        job, progress = self.job, self._progress
        marks = [LOG_EVERY, job.checkpoints.interval, *([job.evaluation.every] if job.evaluation.every else [])]
        until = min((step // mark + 1) * mark for mark in marks)
        until = until if limit is None else min(until, limit)
        begun = time.monotonic()
        try:
            metrics = group.run(until - step)
        except DivergedError as error:
            newest = self.store.latest()
            last = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
            write_text(self.folder / DIVERGED, f"{error}; {last}\n")
            raise RunError(f"{error}; {last}") from error
        progress.seconds += time.monotonic() - begun
        progress.steps += until - step
        metrics["time/step"] = (time.monotonic() - begun) / (until - step)
        last_step = limit is not None and until == limit
        due = bool(job.evaluation.every and until % job.evaluation.every == 0) or last_step
        if due or until % job.checkpoints.interval == 0:
            metrics |= self._checkpoint(group, until, evaluate=due)
        self.log(until, metrics)
        return until

    def _checkpoint(self, group: LaacGroup, step: int, *, evaluate: bool = False) -> dict[str, float]:
        """Write a checkpoint with both rankers in it; returns the validation metrics where it was evaluated."""
        players = ("critics", "actor") if self.job.laac.method is Method.LAAC else ("supervised",)
        weights = {player: group.weights(player) for player in players}
        policy = LaacRanker(*policy_networks(self.job.laac, self.shape, weights))
        values = self._validate(policy) if evaluate else {}
        score = values.get(self.job.evaluation.metric)
        with self.store.writing(step, self.facts, metric=self.job.evaluation.metric, score=score) as folder:
            group.save(folder / "state")
            self._progress.write(folder / PROGRESS)
            provenance = self._provenance(step)
            policy.save(folder / POLICY, provenance)
            if self.job.laac.method is Method.LAAC:
                LaacRanker(*critic_networks(self.shape, weights)).save(folder / CRITIC, provenance)
        return values

    def _validate(self, policy: LaacRanker) -> dict[str, float]:
        rows = sampled(self.sessions.rows("valid"), self.job.evaluation.rows, self.job.seed)
        ks = self.job.evaluation.k
        values = without_invalid(self.evaluation.metrics(self.evaluation.lists(policy, rows, max(ks)), rows, ks))
        value, progress = values[self.job.evaluation.metric], self._progress
        if value > progress.best + self.job.early_stopping.min_improvement:
            progress.best, progress.stale = value, 0
        else:
            progress.stale += 1
        return values

    def _provenance(self, step: int) -> dict[str, object]:
        return {
            "dataset": self.sessions.dataset.fingerprint,
            "method": self.job.laac.method.value,
            "step": step,
            "sessions": self.job.data.model_dump(mode="json", exclude={"dataset"}),
        }

    # -- the end

    def _chosen(self) -> Path:
        best = self.store.best() if self.job.evaluation.every else None
        chosen = best or self.store.latest()
        if chosen is None:
            raise RunError(f"{self.store.root}: no checkpoint was written")
        return chosen

    def _export(self, checkpoint: Path) -> None:
        """Copy the rankers of a checkpoint to where a reward service is told to look."""
        for name in (POLICY, CRITIC):
            if (checkpoint / name).is_dir():
                shutil.copytree(checkpoint / name, self.folder / name, dirs_exist_ok=True)

    def _policy(self, folder: Path) -> LaacRanker:
        return LaacRanker.from_artefact(RankerArtefact.open(folder))

    def _test(self, *, ranker: LaacRanker | None = None, answers: ReferenceAnswers | None = None) -> dict[str, Any]:
        """Metrics on all test rows, as a stage of the summary."""
        rows, ks = self.sessions.rows("test"), self.job.evaluation.k
        if ranker is not None:
            item_NK = self.evaluation.lists(ranker, rows, max(ks))
        elif answers is not None:
            item_NK = answer_lists(answers, rows, max(ks))
        values = self.evaluation.metrics(item_NK, rows, ks)
        return {
            "n": len(rows.event_N),
            **without_invalid(values),
            "invalid": {"constrained": invalid_rate(values, ks), "unconstrained": None},
            "ci95": self.evaluation.intervals(item_NK, rows, ks, self.job.seed),
        }


def needs_cluster(job: LaacJob, folder: Path) -> bool:
    """Whether a job starts processes: more ranks than one, or a model that has not answered yet."""
    if job.laac.ranks > 1 and job.laac.method is not Method.REFERENCE:
        return True
    reference = job.laac.reference
    return (
        job.laac.method.asks
        and reference.kind is ReferenceKind.LLM
        and not (reference.cache or folder / CACHE).is_file()
    )


def _unit(vector_ID: FloatArray) -> FloatArray:
    length_I = np.linalg.norm(vector_ID, axis=1, keepdims=True)
    unit_ID: FloatArray = (vector_ID / np.where(length_I > 0, length_I, 1.0)).astype(np.float32)
    return unit_ID
