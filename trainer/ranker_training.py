"""Ranker jobs: fit or train a ranker on the training sequences and write its artefact.

SASRec is validated on a seeded sample of the validation split after every epoch (or every `evaluation.every` steps)
and the best weights are kept. Its state lies beside the artefact until the job is done, so that an interrupted job
continues from its last finished epoch.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from data.dataset import Dataset, Sequences
from data.errors import RequestError
from reward.artefact import DESCRIPTION, RankerArtefact
from reward.cooccurrence import CooccurrenceRanker
from reward.popularity import PopularityRanker
from reward.ranker import CatalogueRanker, open_ranker
from reward.ranking import evaluate_ranker
from reward.sasrec import SASRecRanker
from trainer.jobs import RankerJob
from trainer.popularity_bias import item_counts, popularity_subsample
from trainer.ranker_settings import RankerKind
from trainer.sasrec_training import Arrays, SASRecTraining

STATE = "training.safetensors"
Log = Callable[[int, dict[str, float]], None]
_ROW_STREAM = 11


@dataclass(frozen=True, kw_only=True)
class TrainedRanker:
    """Outcome of a ranker job."""

    ranker: CatalogueRanker
    folder: Path
    digest: str
    """Digest of the weights."""
    value: float | None
    """Best value of `evaluation.metric` on the validation rows; None when interrupted before the first evaluation."""
    step: int
    """Step of the weights that were kept; 0 for rankers without steps."""
    stopped: str
    """Why training ended: max_steps, max_epochs, max_hours, early_stopping, interrupted or fitted."""


def train_ranker(
    job: RankerJob,
    dataset: Dataset,
    folder: Path,
    *,
    log: Log = lambda step, metrics: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> TrainedRanker:
    """Train the ranker of a job into `folder`; a finished artefact of the same job and data is returned as it is.

    Args:
        job: the job; `limits`, `evaluation` and `early_stopping` apply to SASRec.
        dataset: events before the validation boundary are read for training, the validation split for selection.
        folder: artefact folder.
        log: receives (step, metrics).
        interrupted: asked between steps; training then ends after the epoch's state on disk, without an artefact.

    Raises:
        RequestError: the folder holds the artefact of another job or dataset.
        RunError: a loss that is not finite.
    """
    identity = _identity(job, dataset)
    if (folder / DESCRIPTION).is_file():
        return _finished(folder, identity)
    if job.ranker.kind is RankerKind.SASREC:
        return _Run(job, dataset, folder, identity, log).train(interrupted)
    ranker: PopularityRanker | CooccurrenceRanker
    if job.ranker.kind is RankerKind.POPULARITY:
        biased = job.ranker.bias.on
        counts = item_counts(training_sequences(job, dataset), dataset.n_items) if biased else dataset.train_counts()
        ranker = PopularityRanker(counts)
    else:
        settings = job.ranker.cooccurrence
        ranker = CooccurrenceRanker.fit(
            training_sequences(job, dataset),
            dataset.n_items,
            window=settings.window,
            normalisation=settings.normalisation,
            recency=settings.recency,
            history=job.data.history,
        )
    value = validate(ranker, job, dataset)[job.evaluation.metric]
    digest = ranker.save(folder, identity | {"value": value, "step": 0, "last_step": 0, "stopped": "fitted"})
    log(0, {job.evaluation.metric: value})
    return TrainedRanker(ranker=ranker, folder=folder, digest=digest, value=value, step=0, stopped="fitted")


def training_sequences(job: RankerJob, dataset: Dataset) -> Sequences:
    """The training sequences, subsampled by popularity where the job says so."""
    sequences = dataset.sequences("train")
    if not job.ranker.bias.on:
        return sequences
    return popularity_subsample(sequences, dataset.n_items, job.ranker.bias, seed=job.seed)


def validate(ranker: CatalogueRanker, job: RankerJob, dataset: Dataset) -> dict[str, float]:
    """Ranking metrics on the seeded sample of the validation split."""
    samples = dataset.samples("valid")
    if job.evaluation.rows < len(samples):
        random = np.random.default_rng([job.seed, _ROW_STREAM])
        samples = samples.take(np.sort(random.choice(len(samples), size=job.evaluation.rows, replace=False)))
    report = evaluate_ranker(
        ranker,
        dataset,
        samples,
        job.evaluation.k,
        history=job.data.history,
        exclude_seen=job.data.exclude_seen,
    )
    return report.values


@contextmanager
def compute_threads(threads: int) -> Iterator[None]:
    """Run torch on so many threads (0: one per core), and restore the number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """One SASRec job."""

    def __init__(self, job: RankerJob, dataset: Dataset, folder: Path, identity: dict[str, object], log: Log) -> None:
        self.job = job
        self.dataset = dataset
        self.folder = folder
        self.identity = identity
        self.log = log
        self.training = SASRecTraining(
            training_sequences(job, dataset),
            dataset.n_items,
            job.ranker.sasrec,
            history=job.data.history,
            seed=job.seed,
        )
        self.best: Arrays = {}
        self.best_value = -math.inf
        self.best_step = 0
        self.stale = 0
        """Evaluations since the last improvement."""
        self.seconds = 0.0
        self.pending: dict[str, float] = {}
        self.pending_step = 0
        self.evaluated_step = -1
        self._resume()

    def train(self, interrupted: Callable[[], bool]) -> TrainedRanker:
        """Train to a limit and write the artefact of the best weights."""
        started = time.monotonic() - self.seconds
        stopped = None
        with compute_threads(self.job.ranker.sasrec.threads):
            while stopped is None:
                stopped = self._epoch(interrupted, started)
        ranker = self._best_ranker()
        digest = ""
        if stopped != "interrupted":
            outcome = {
                "value": self.best_value,
                "step": self.best_step,
                "last_step": self.training.step,
                "stopped": stopped,
            }
            digest = ranker.save(self.folder, self.identity | outcome)
            (self.folder / STATE).unlink(missing_ok=True)
        return TrainedRanker(
            ranker=ranker,
            folder=self.folder,
            digest=digest,
            value=self.best_value if self.best else None,
            step=self.best_step,
            stopped=stopped,
        )

    def _epoch(self, interrupted: Callable[[], bool], started: float) -> str | None:
        """Train one epoch; returns why training ends, None to go on."""
        limits, every = self.job.limits, self.job.evaluation.every
        steps, epochs = limits.max_steps, limits.max_epochs
        training = self.training
        stopped = "max_steps" if steps is not None and training.step >= steps else None
        if stopped is None:
            for metrics in training.epoch(planned_epochs=epochs or math.inf, planned_steps=steps or math.inf):
                self._log_pending()
                self.pending, self.pending_step = metrics, training.step
                if interrupted():
                    return "interrupted"
                if every and training.step % every == 0:
                    self._evaluate()
                if steps is not None and training.step >= steps:
                    stopped = "max_steps"
                    break
        if not every or not self.best or stopped:
            self._evaluate()
        self._log_pending()
        self.seconds = time.monotonic() - started
        patience = self.job.early_stopping.patience
        if stopped is None and epochs is not None and training.epochs_done >= epochs:
            stopped = "max_epochs"
        if stopped is None and limits.max_hours is not None and self.seconds >= 3600 * limits.max_hours:
            stopped = "max_hours"
        if stopped is None and patience and self.stale >= patience:
            stopped = "early_stopping"
        if stopped is None:
            self._write_state()
        return stopped

    def _evaluate(self) -> None:
        if self.evaluated_step == self.training.step:
            return
        values = validate(SASRecRanker(self.training.network), self.job, self.dataset)
        value = values[self.job.evaluation.metric]
        if value > self.best_value + self.job.early_stopping.min_improvement or not self.best:
            self.best_value, self.best_step, self.stale = value, self.training.step, 0
            self.best = {name: t.numpy().copy() for name, t in self.training.network.state_dict().items()}
        else:
            self.stale += 1
        self.pending |= values
        self.pending_step = self.evaluated_step = self.training.step

    def _log_pending(self) -> None:
        """Log the last step, after what was evaluated behind it: one entry per step."""
        if self.pending:
            self.log(self.pending_step, self.pending)
        self.pending = {}

    def _best_ranker(self) -> SASRecRanker:
        network = self.training.network
        if self.best:
            network.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in self.best.items()})
        return SASRecRanker(network)

    def _write_state(self) -> None:
        """Replace the state file as a whole; it begins with the identity it may be continued under."""
        arrays = {f"best:{name}": value for name, value in self.best.items()}
        arrays |= {f"training:{name}": value for name, value in self.training.state().items()}
        arrays["counters"] = np.array([self.best_value, self.best_step, self.stale, self.seconds], np.float64)
        blob = save_arrays(
            {name: np.ascontiguousarray(value) for name, value in arrays.items()}, {"job": str(self.identity["job"])}
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{STATE}.tmp"
        with temporary.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.folder / STATE)

    def _resume(self) -> None:
        path = self.folder / STATE
        if not path.is_file():
            return
        blob = path.read_bytes()
        try:
            arrays = load_arrays(blob)
        except SafetensorError as error:
            raise RequestError(str(path), f"not safetensors ({error})", "an intact state, or none") from error
        if f'"job":"{self.identity["job"]}"'.encode() not in blob[: 2**20]:
            raise RequestError(str(path), "of another job or dataset", "the same configuration, or a new folder")
        self.best = _below("best:", arrays)
        self.training.load_state(_below("training:", arrays))
        value, step, stale, seconds = arrays["counters"].tolist()
        self.best_value, self.best_step, self.stale, self.seconds = value, int(step), int(stale), seconds


def resumed_step(folder: Path) -> int | None:
    """Step that the job in the folder continues from (its last one when it is finished), None where there is none."""
    if (folder / DESCRIPTION).is_file():
        return int(RankerArtefact.open(folder).provenance.get("last_step", 0))
    path = folder / STATE
    if not path.is_file():
        return None
    with safe_open(path, framework="numpy") as arrays:
        return int(arrays.get_tensor("training:step")[0])


def _below(prefix: str, arrays: Arrays) -> Arrays:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _identity(job: RankerJob, dataset: Dataset) -> dict[str, object]:
    """What must be equal for an artefact or state to belong to this job."""
    relevant = job.model_dump(mode="json", exclude={"tracking", "checkpoints"})
    relevant["data"]["dataset"] = dataset.fingerprint
    if not job.ranker.bias.on:
        # Without bias its exponent means nothing, and artefacts from before there was one stay this job's.
        del relevant["ranker"]["bias"]
    return {"job": xxhash.xxh3_128_hexdigest(json.dumps(relevant).encode()), "dataset": dataset.fingerprint}


def _finished(folder: Path, identity: dict[str, object]) -> TrainedRanker:
    artefact = RankerArtefact.open(folder)
    found = artefact.provenance
    if found.get("job") != identity["job"]:
        raise RequestError(str(folder), "of another job or dataset", "the same configuration, or a new folder")
    ranker = open_ranker(artefact)
    assert isinstance(ranker, CatalogueRanker)
    return TrainedRanker(
        ranker=ranker,
        folder=folder,
        digest=artefact.digest,
        value=float(found["value"]),
        step=int(found["step"]),
        stopped=str(found["stopped"]),
    )
