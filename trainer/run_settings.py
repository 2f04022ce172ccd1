"""Sections that every job shares: when to stop, when to evaluate, what to keep, whom to tell, where to run."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from data.settings import Settings
from reward.names import RankingMetric

LOCAL = "local"
"""Ray's name for a cluster of one's own, as an address."""


class LimitSettings(Settings):
    """When a run ends: at the first limit it meets. At least one must be set."""

    max_steps: int | None = Field(None, ge=0)
    """Training steps; 0 evaluates and saves the initial model."""
    max_epochs: float | None = Field(None, gt=0)
    """Passes over the training rows."""
    max_hours: float | None = Field(None, gt=0)
    """Wall time of this and the earlier runs of the same run directory, in hours."""

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if self.max_steps is None and self.max_epochs is None and self.max_hours is None:
            raise ValueError("no limit is set; legal: at least one of max_steps, max_epochs, max_hours")
        return self


class NegativeSource(StrEnum):
    """Which items a target is compared with for AUC and its windows."""

    RANDOM = "random"
    """Permitted items, drawn evenly and the same at every evaluation: AUC estimates that of the whole catalogue."""
    BEAM = "beam"
    """The row's best beams without the target: the hardest negatives, so that ranks among them are the catalogue's."""


class ScoreSettings(Settings):
    """What needs scores of items beside the recommended ones: AUC, its windows, and the legal mass."""

    rows: int = Field(0, ge=0)
    """Evaluated rows that are scored, a seeded sample of them; 0 scores none. A row costs negatives + 2 sequences."""
    negatives: int = Field(100, ge=1)
    """Negatives per row, but at most half of the catalogue; opauc@K and wpauc@K are measured for K up to it."""
    source: NegativeSource = NegativeSource.RANDOM
    """random (permitted items, drawn evenly) or beam (the row's best beams without the target)."""


class EvaluationSettings(Settings):
    """Evaluation on the validation split while training."""

    every: int = Field(0, ge=0)
    """Steps between two evaluations; 0 evaluates before the first and after the last step only."""
    rows: int = Field(500, ge=1)
    """Rows of the split, a seeded sample that is the same at every evaluation."""
    k: tuple[int, ...] = Field((1, 3, 5, 10, 20, 50), min_length=1)
    """Cut-offs of the metrics, increasing."""
    metric: str = Field("ndcg@10", min_length=1)
    """Metric that selects the best checkpoint; larger is better."""
    batch: int = Field(64, ge=1)
    """Prompts per request to the fleet."""
    unconstrained_rows: int = Field(0, ge=0)
    """Rows that are decoded without the constraint as well, for the invalid rate."""
    test_rows: int = Field(0, ge=0)
    """Rows of the test split, a seeded sample, on which the best checkpoint is evaluated at the end; 0 leaves the test
    split alone."""
    test_unconstrained_rows: int = Field(500, ge=0)
    """Rows of that sample that are decoded without the constraint as well."""
    scores: ScoreSettings = ScoreSettings()
    """AUC, its windows and the legal mass; also kept per row for `windlass correlate`."""
    feedback: Path | None = None
    """Feedback log that exposure bias is measured against; none measures none."""

    @model_validator(mode="after")
    def _cutoffs(self) -> Self:
        if min(self.k) < 1 or list(self.k) != sorted(set(self.k)):
            raise ValueError(f"k is {list(self.k)}; legal: increasing integers from 1, for example [1, 5, 10]")
        name, _, cutoff = self.metric.partition("@")
        measured = [metric.value for metric in RankingMetric if metric is not RankingMetric.INVALID]
        if name not in measured or not cutoff.isdecimal() or int(cutoff) not in self.k:
            shown = [name] if name in measured else measured
            names = ", ".join(f"{name}@{k}" for name in shown for k in self.k)
            raise ValueError(f"metric is {self.metric!r}, which is not measured; legal with this k: {names}")
        return self


class EarlyStoppingSettings(Settings):
    """Stop when the selection metric no longer rises."""

    patience: int = Field(0, ge=0)
    """Evaluations without improvement before the run stops; 0 never stops early."""
    min_improvement: float = Field(0.0, ge=0)
    """Smallest rise of the metric that counts."""


class CheckpointSettings(Settings):
    """Which checkpoints are written and which are kept."""

    interval: int = Field(10, ge=1)
    """Steps between two checkpoints; the last step is always saved."""
    last: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    best: int = Field(1, ge=0)
    """Best checkpoints by the evaluation metric that are kept."""
    every: int = Field(0, ge=0)
    """Keep each checkpoint whose step is a multiple of this for good; 0 keeps none for that reason."""

    @model_validator(mode="after")
    def _every_is_written(self) -> Self:
        if self.every % self.interval:
            low = self.every // self.interval * self.interval
            legal = " or ".join(str(n) for n in (low, low + self.interval) if n)
            raise ValueError(
                f"every is {self.every}, but checkpoints are written at multiples of interval {self.interval}; "
                f"legal: every {legal}"
            )
        return self


class TrackingSettings(Settings):
    """Trackers beside metrics.jsonl and TensorBoard, which are always written."""

    wandb: bool = False
    """Report to Weights & Biases (extra `wandb`)."""
    mlflow: bool = False
    """Report to MLflow (extra `mlflow`)."""
    project: str = Field("windlass", min_length=1)
    """Project (wandb) or experiment (MLflow)."""


class ClusterSettings(Settings):
    """Where the processes run."""

    address: str | None = None
    """Address of a running Ray cluster (`auto` finds it); none takes RAY_ADDRESS, which submitted jobs have, and else
    starts one on this machine."""
    unauthenticated: bool = False
    """Join a cluster that takes calls without a token (RAY_AUTH_MODE=disabled), where something else keeps strangers
    from its ports."""
    num_cpus: int | None = Field(None, ge=1)
    """Logical CPUs of a cluster started here; none takes the larger of 8 and the cores, so that small actors fit."""
    object_store_mib: int = Field(512, ge=80)
    """Shared memory of a cluster started here, in MiB."""
    colocated: bool = False
    """Each engine shares a node, and its GPU, with a learner rank: `rollout.gpus` and `learner.gpus`, together at most
    1. They work in turn (max_staleness 0), and there are as many of one as of the other."""
    engine_node: str | None = Field(None, min_length=1)
    """Ray resource that the nodes of engines have (`ray start --resources`); none takes any node."""
    learner_node: str | None = Field(None, min_length=1)
    """Ray resource that the nodes of learners have; none takes any node."""
    preflight_deadline_s: float = Field(60.0, ge=0)
    """Seconds within which a cluster that is joined must have what the job asks for; also for reserving it."""
    engine_restarts: int = Field(8, ge=0)
    """Engines that are started again within restart_window_s; above that the others carry on."""
    learner_restarts: int = Field(2, ge=0)
    """How often within restart_window_s a dead learner group begins again from the last checkpoint."""
    restart_window_s: float = Field(3600.0, gt=0)
    """Seconds within which restarts are counted."""

    @property
    def address_or_local(self) -> str:
        """Address of the cluster: the one that is set, RAY_ADDRESS, or `LOCAL`."""
        return self.address or os.environ.get("RAY_ADDRESS") or LOCAL

    @property
    def joins(self) -> bool:
        """Whether the cluster was started elsewhere."""
        return self.address_or_local != LOCAL


class GapAction(StrEnum):
    """What happens when engine and learner disagree."""

    STOP = "stop"
    """Write a checkpoint of the last good step and fail."""
    WARN = "warn"
    """Say so in the metrics and go on."""


class PolicyGapSettings(Settings):
    """Alarm on the gap between the engine's and the learner's log-probabilities."""

    action: GapAction = GapAction.STOP
    """What happens when the gap is above the limit: stop or warn."""
    limit: float | None = Field(None, gt=0)
    """Largest mean absolute gap per completion token; none means noise_factor x noise, and no less
    than 1e-4 in float32."""
    noise_factor: float = Field(2.0, ge=1.0)
    """Multiple of the learner's own gap to float32, or to float64 for a learner in float32, which measures it only on a
    batch above 1e-4."""
    noise_every: int = Field(10, ge=1)
    """In bf16: steps between two measurements of the learner's own gap, which costs a forward pass in float32. A batch
    above the limit is measured itself before the alarm sounds."""
