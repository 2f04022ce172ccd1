"""`windlass eval` of a LAAC job or a baseline: its policy on the sessions it was trained from, by the same split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.dataset import Dataset
from data.errors import RequestError
from data.session_settings import SessionSettings
from data.transitions import Sessions
from launch.published import table
from reward.artefact import DESCRIPTION, RankerArtefact
from reward.laac import KIND, LaacRanker
from trainer.checkpoints import best_checkpoint, latest_checkpoint
from trainer.laac_evaluation import SessionEvaluation, invalid_rate, sampled, without_invalid

PARTS = ("valid", "test")
SHOWN = ("recall", "ndcg", "reward", "coverage", "novelty", "ild", "repetition", "tail_recall")


def laac_artefact(path: Path) -> RankerArtefact | None:
    """The policy that a run, checkpoint or artefact folder of a LAAC job means; None where it means something else."""
    root = path / "checkpoints"
    checkpoint = best_checkpoint(root) or latest_checkpoint(root) if root.is_dir() else None
    folders = [path, path / "ranker", *([checkpoint / "ranker"] if checkpoint else [])]
    for folder in folders:
        if (folder / DESCRIPTION).is_file():
            artefact = RankerArtefact.open(folder)
            return artefact if artefact.kind == KIND else None
    return None


def evaluate_laac(
    artefact: RankerArtefact, dataset: Dataset, split: str, ks: Sequence[int], *, rows: int, seed: int
) -> dict[str, Any]:
    """The answer of `windlass eval` on a split of the sessions; 0 rows take all.

    Raises:
        RequestError: another dataset, another split, or cut-offs beyond the catalogue.
    """
    if split not in PARTS:
        raise RequestError(
            "--split", split, f"{' or '.join(PARTS)}: a policy is evaluated on sessions it did not learn"
        )
    told = artefact.provenance.get("dataset")
    if told != dataset.fingerprint:
        found = f"{dataset.path} is the dataset {dataset.fingerprint}"
        raise RequestError("--data", found, f"{told}, which {artefact.folder} was trained on")
    if max(ks) > dataset.n_items:
        raise RequestError("--k", list(ks), f"at most {dataset.n_items}, the items of the dataset")
    settings = SessionSettings.model_validate({**artefact.provenance["sessions"], "dataset": dataset.path})
    evaluation = SessionEvaluation(Sessions(dataset, settings))
    own = evaluation.sessions.rows(split)
    chosen = sampled(own, rows or len(own.event_N), seed)
    item_NK = evaluation.lists(LaacRanker.from_artefact(artefact), chosen, max(ks))
    values = evaluation.metrics(item_NK, chosen, ks)
    return {
        "metrics": without_invalid(values),
        "n": len(chosen.event_N),
        "exclude_seen": settings.exclude_seen,
        "invalid": {"constrained": invalid_rate(values, ks), "unconstrained": None},
        "ci95": evaluation.intervals(item_NK, chosen, ks, seed),
        "split": split,
        "dataset": dataset.name,
        "dataset_fingerprint": dataset.fingerprint,
        "history": settings.history,
        "seed": seed,
        "method": artefact.provenance["method"],
        "sessions": dict(evaluation.sessions.counts),
        "checkpoint": str(artefact.folder),
    }


def show(answer: dict[str, Any], ks: Sequence[int]) -> None:
    """Print the metrics by cut-off, and what they were measured on."""
    metrics = answer["metrics"]
    rows = {
        name: {f"@{k}": metrics[f"{name}@{k}"] for k in ks if f"{name}@{k}" in metrics}
        for name in SHOWN
        if any(f"{name}@{k}" in metrics for k in ks)
    }
    print(table([f"@{k}" for k in ks], rows))
    seen = "excluded" if answer["exclude_seen"] else "kept"
    users = answer["sessions"]["users"]
    print(f"{answer['method']}: {answer['n']} rows of {answer['split']}, {users} users, seen items {seen}")
