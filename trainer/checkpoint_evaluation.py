"""Evaluation of a saved model on a split, and of rankers on the same rows, for tables that compare them."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.catalogue import Catalogue
from data.dataset import Dataset
from data.errors import RequestError
from data.feedback import FeedbackLog
from data.feedback_reading import FeedbackChecks, read_feedback
from reward.bootstrap import bootstrap_mean
from reward.exposure import Exposures
from rollout.fleet import RolloutFleet
from rollout.settings import RolloutSettings
from trainer.checkpoints import open_model
from trainer.evaluation import Evaluation, Evaluator
from trainer.initial_model import CATALOGUE, check_model
from trainer.prompt_card import PromptCard
from trainer.run_settings import ScoreSettings


@dataclass(frozen=True, kw_only=True)
class EvaluatedCheckpoint:
    """What `windlass eval` answers from."""

    hf_dir: Path
    evaluation: Evaluation
    card: PromptCard
    violations: dict[str, int]
    """Completions that independent code refused, by reason; all 0 in a sound system."""
    engine: dict[str, Any]
    left_out: dict[str, int]
    """Rows of the feedback log that could not be used, by reason; empty without a log."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRows:
    """Which rows, and how deep."""

    split: str
    rows: int
    """Size of the seeded sample; 0 takes all."""
    ks: tuple[int, ...]
    seed: int
    scores: ScoreSettings
    feedback: Path | None = None
    """Feedback log that exposure bias is measured against."""
    batch: int = 64
    unconstrained_rows: int = 0


def evaluate_checkpoint(
    path: Path,
    dataset: Dataset,
    which: EvaluationRows,
    rollout: RolloutSettings,
    *,
    history: int | None = None,
    exclude_seen: bool | None = None,
) -> EvaluatedCheckpoint:
    """Evaluate a run, checkpoint or hf folder by constrained beams; Ray must be connected.

    Args:
        path: what to evaluate.
        dataset: where the rows come from; its items must be those of the model's catalogue.
        which: rows and cut-offs.
        rollout: the engines.
        history: items a prompt shows; by default as the model was trained.
        exclude_seen: by default as the model was trained.

    Raises:
        RequestError: no model there, or one of another catalogue.
    """
    hf_dir = open_model(path)
    catalogue = Catalogue.load(hf_dir / CATALOGUE)
    check_model(hf_dir, catalogue.vocabulary.size)
    check_same_items(hf_dir, catalogue, dataset)
    if max(which.ks) > catalogue.n_items:
        raise RequestError("k", list(which.ks), f"at most {catalogue.n_items}, the items of the catalogue")
    log = None if which.feedback is None else exposure_log(which.feedback, catalogue.n_items)
    card = PromptCard.read(hf_dir)
    changes = {"history": history, "exclude_seen": exclude_seen}
    card = card.model_copy(update={name: value for name, value in changes.items() if value is not None})
    evaluator = Evaluator(
        dataset,
        catalogue,
        card.builder(catalogue, hf_dir),
        split=which.split,
        rows=which.rows or len(dataset.samples(which.split)),
        ks=which.ks,
        batch=which.batch,
        seed=which.seed,
        unconstrained_rows=which.unconstrained_rows,
        scores=which.scores,
        exposures=None if log is None else Exposures.of(log),
    )
    with closing(RolloutFleet.start(rollout, hf_dir, catalogue)) as fleet:
        evaluation = evaluator.run(fleet)
        return EvaluatedCheckpoint(
            hf_dir=hf_dir,
            evaluation=evaluation,
            card=card,
            violations={str(reason): count for reason, count in fleet.violations.items()},
            engine=dict(fleet.describe()),
            left_out={} if log is None else {reason: count for reason, count in log.counts.items() if count},
        )


def exposure_log(folder: Path, n_items: int) -> FeedbackLog:
    """A feedback log for measures of exposure: deterministic exposures and retired items were shown as well.

    Raises:
        RequestError: as `data.feedback_reading.read_feedback`.
    """
    return read_feedback(folder, FeedbackChecks(n_items=n_items, propensities=False))


def check_same_items(hf_dir: Path, catalogue: Catalogue, dataset: Dataset) -> None:
    """Refuse a dataset whose items are not the catalogue's."""
    keys = tuple(dataset.items()["item_key"].to_pylist())
    if keys != catalogue.item_keys:
        raise RequestError(
            f"{hf_dir}: catalogue",
            f"{catalogue.n_items} items, others than the {dataset.n_items} of {dataset.path}",
            "the dataset the model was trained on",
        )


def answer(
    evaluated: EvaluatedCheckpoint, dataset: Dataset, which: EvaluationRows, *, with_paths: bool
) -> dict[str, Any]:
    """The answer of `windlass eval`: metrics with 95 % intervals, users resampled whole."""
    evaluation = evaluated.evaluation
    constrained = f"invalid@{max(which.ks)}"
    result: dict[str, Any] = {
        "metrics": {n: v for n, v in evaluation.items.values.items() if not n.startswith("invalid@")},
        "n": evaluation.items.n,
        "exclude_seen": evaluated.card.exclude_seen,
        "invalid": {
            "constrained": evaluation.items.values[constrained],
            "unconstrained": evaluation.unconstrained_invalid,
        },
        "ci95": intervals(evaluation, seed=which.seed),
        "split": which.split,
        "dataset": dataset.name,
        "dataset_fingerprint": dataset.fingerprint,
        "history": evaluated.card.history,
        "prompts": evaluation.counts,
        "seed": which.seed,
        "checkpoint": str(evaluated.hf_dir),
        "engine": evaluated.engine,
        "violations": sum(evaluated.violations.values()),
    }
    if evaluation.scored is not None:
        result["metrics"] |= evaluation.scored.values
        result["scored"] = {
            **which.scores.model_dump(mode="json"),
            "rows": len(evaluation.scored.scores.sample_id_N),
            "negatives": evaluation.scored.scores.score_NM.shape[1] - 1,
            "unreachable": evaluation.scored.scores.unreachable,
        }
    if which.feedback is not None:
        result["metrics"] |= evaluation.exposure
        result["feedback"] = {"path": str(which.feedback), "left_out": evaluated.left_out}
    if with_paths:
        result["paths"] = {n: v for n, v in evaluation.paths.values.items() if not n.startswith("invalid@")}
    return result


def intervals(evaluation: Evaluation, *, seed: int) -> dict[str, list[float]]:
    """95 % bootstrap interval of every per-row metric."""
    rows = {name: (values, evaluation.user_id_N) for name, values in evaluation.items.rows.items()}
    if evaluation.scored is not None:
        rows |= evaluation.scored.rows()
    found = {}
    for name, (values, user_id_N) in rows.items():
        interval = bootstrap_mean(values, seed=seed, cluster_N=user_id_N)
        found[name] = [interval.low, interval.high]
    return found
