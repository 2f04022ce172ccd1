"""What a running job says of itself as Prometheus metrics, through Ray: every node's agent offers them for scraping.

`METRICS` is the list; `launch/templates/grafana.json` shows them, and a test compares the two. Values come from the
metrics of a step, the same that metrics.jsonl has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rollout.fleet import RolloutFleet
from rollout.fleet_health import EngineState

STALENESS_BOUNDS = (0.5, 1.5, 2.5, 4.5, 8.5, 16.5, 32.5)
"""Upper bounds of the histogram's classes, between whole numbers of updates."""


class Kind(StrEnum):
    """Prometheus types."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One Prometheus metric."""

    kind: Kind
    description: str
    tags: tuple[str, ...] = ()
    """Labels besides `run`."""


PHASE = "windlass_phase_seconds"
METRICS: dict[str, Exported] = {
    "windlass_step": Exported(kind=Kind.GAUGE, description="Steps that are done"),
    "windlass_weight_version": Exported(kind=Kind.GAUGE, description="Version that the fleet holds"),
    PHASE: Exported(kind=Kind.GAUGE, description="Seconds of the last step, by phase", tags=("phase",)),
    "windlass_tokens_per_second": Exported(kind=Kind.GAUGE, description="Tokens of the last step by its seconds"),
    "windlass_busy_share": Exported(
        kind=Kind.GAUGE, description="Share of the last step that a part worked", tags=("part",)
    ),
    "windlass_queue_length": Exported(kind=Kind.GAUGE, description="What waits, by queue", tags=("queue",)),
    "windlass_staleness": Exported(
        kind=Kind.HISTOGRAM, description="Updates between generation and training, by group"
    ),
    "windlass_groups_dropped": Exported(
        kind=Kind.COUNTER, description="Scored groups that were not trained on", tags=("reason",)
    ),
    "windlass_policy_gap": Exported(kind=Kind.GAUGE, description="Gap between engine and learner", tags=("statistic",)),
    "windlass_reward_mean": Exported(kind=Kind.GAUGE, description="Mean reward of the last step"),
    "windlass_loss": Exported(kind=Kind.GAUGE, description="Loss of the last step"),
    "windlass_push_mib": Exported(kind=Kind.GAUGE, description="MiB of the last push"),
    "windlass_engines": Exported(kind=Kind.GAUGE, description="Engines by state", tags=("state",)),
    "windlass_engine_restarts": Exported(kind=Kind.COUNTER, description="Engines that were launched again"),
    "windlass_learner_restarts": Exported(
        kind=Kind.GAUGE, description="Times that the learners have begun again from a checkpoint"
    ),
    "windlass_engines_lost": Exported(kind=Kind.COUNTER, description="Engines lost, by reason", tags=("reason",)),
}
"""By name. Counters get the suffix `_total` when they are scraped, and all names Ray's prefix `ray_`."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One value of a metric."""

    name: str
    value: float
    tags: tuple[tuple[str, str], ...] = ()


def rates(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Tokens per second, and the shares of a step that learners and fleet worked, as metrics of the step."""
    seconds = float(metrics.get("time/step", 0.0))
    if not seconds:
        return {}
    learning = sum(float(metrics.get(f"time/{phase}", 0.0)) for phase in ("score", "update"))
    rolling = sum(float(metrics.get(f"time/{phase}", 0.0)) for phase in ("rollout", "ahead/rollout"))
    told = {"perf/busy/learners": learning / seconds, "perf/busy/fleet": rolling / seconds}
    tokens = sum(float(metrics.get(f"tokens/{part}", 0.0)) for part in ("prompt", "completion"))
    return told | ({"perf/tokens_per_s": tokens / seconds} if tokens else {})


def samples(step: int, metrics: Mapping[str, Any]) -> list[Sample]:
    """The gauges of a step, and one observation per group of its staleness; counters are in `counts`."""
    found = [Sample(name="windlass_step", value=float(step))]
    single = {
        "perf/tokens_per_s": "windlass_tokens_per_second",
        "reward/mean": "windlass_reward_mean",
        "loss": "windlass_loss",
        "push/mib": "windlass_push_mib",
        "system/learner_restarts": "windlass_learner_restarts",
    }
    several = {
        "time/": (PHASE, "phase"),
        "perf/busy/": ("windlass_busy_share", "part"),
        "queue/": ("windlass_queue_length", "queue"),
        "policy_gap/": ("windlass_policy_gap", "statistic"),
    }
    for key, value in metrics.items():
        if not isinstance(value, int | float):
            continue
        if key in single:
            found.append(Sample(name=single[key], value=float(value)))
        if key == "system/shards_waiting":
            found.append(Sample(name="windlass_queue_length", value=float(value), tags=(("queue", "shards"),)))
        for prefix, (name, tag) in several.items():
            if key.startswith(prefix):
                found.append(Sample(name=name, value=float(value), tags=((tag, key.removeprefix(prefix)),)))
        if key.startswith("staleness/groups_"):
            lag = float(key.removeprefix("staleness/groups_"))
            found += [Sample(name="windlass_staleness", value=lag)] * int(value)
    return found


def counts(metrics: Mapping[str, Any], fleet: RolloutFleet | None, restarts: int) -> list[Sample]:
    """What has happened in this run so far: totals of this process, for the counters; dropped groups of this step."""
    found = [
        Sample(name="windlass_groups_dropped", value=float(value), tags=(("reason", key.rpartition("/")[2]),))
        for key, value in metrics.items()
        if key.startswith("staleness/dropped/")
    ]
    if fleet is None:
        return found
    found.append(Sample(name="windlass_engine_restarts", value=float(restarts)))
    for reason, lost in fleet.losses.items():
        found.append(Sample(name="windlass_engines_lost", value=float(lost), tags=(("reason", reason.value),)))
    return found


TOTALS = ("windlass_engine_restarts", "windlass_engines_lost")
"""Counters whose samples are totals so far."""


class RunGauges:
    """The metrics of one run in this process; Ray must be initialised."""

    def __init__(self, run: str) -> None:
        """Register them; `run` is the label that tells runs apart."""
        from ray.util import metrics

        self._run = run
        self._metrics: dict[str, Any] = {}
        self._phases: set[tuple[tuple[str, str], ...]] = set()
        self._told: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for name, exported in METRICS.items():
            tags = ("run", *exported.tags)
            if exported.kind is Kind.HISTOGRAM:
                made: Any = metrics.Histogram(name, exported.description, list(STALENESS_BOUNDS), tags)
            elif exported.kind is Kind.COUNTER:
                made = metrics.Counter(name, exported.description, tags)
            else:
                made = metrics.Gauge(name, exported.description, tags)
            self._metrics[name] = made

    def record(self, step: int, metrics: Mapping[str, Any], fleet: RolloutFleet | None, restarts: int) -> None:
        """Export the metrics of a step."""
        gauges = samples(step, metrics)
        phases = {sample.tags for sample in gauges if sample.name == PHASE}
        # A gauge keeps its value: a phase that this step did not have would go on as if it had.
        gauges += [Sample(name=PHASE, value=0.0, tags=tags) for tags in sorted(self._phases - phases)]
        self._phases |= phases
        if fleet is not None:
            states = fleet.health.counts()
            gauges += [
                Sample(name="windlass_engines", value=float(states[state]), tags=(("state", state.value),))
                for state in EngineState
            ]
            # Not the step's own metric, which tells what generated its groups.
            if fleet.health.version is not None:
                gauges.append(Sample(name="windlass_weight_version", value=float(fleet.health.version)))
        for sample in gauges:
            tags = {"run": self._run, **dict(sample.tags)}
            metric = self._metrics[sample.name]
            if METRICS[sample.name].kind is Kind.HISTOGRAM:
                metric.observe(sample.value, tags=tags)
            else:
                metric.set(sample.value, tags=tags)
        for sample in counts(metrics, fleet, restarts):
            self._count(sample)

    def _count(self, sample: Sample) -> None:
        key = sample.name, sample.tags
        before = self._told.get(key, 0.0) if sample.name in TOTALS else 0.0
        self._told[key] = sample.value
        if sample.value > before:
            self._metrics[sample.name].inc(sample.value - before, tags={"run": self._run, **dict(sample.tags)})
