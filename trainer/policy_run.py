"""The processes of a policy job, and what its loop leaves to them: push, evaluate, log, keep.

    with policy_run(job, data, run_dir, interruption, log) as run: run.train()

Learners and fleet start side by side from the same `hf` folder; whatever was started is ended, also when another part
fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from data.errors import RequestError
from reward.names import RankingMetric, at
from rollout.channel import PushError, PushFailure, PushReport, WeightChannel
from rollout.fleet import RolloutFleet
from rollout.peers import RayPeer
from rollout.probe import item_probe
from trainer.checkpoints import CheckpointStore, open_checkpoint
from trainer.evaluation import Evaluation, Evaluator
from trainer.healing import Healing
from trainer.initial_model import own_initial_model
from trainer.interruption import Interruption
from trainer.jobs import RlJob, SftJob
from trainer.learner_group import LearnerGroup, LearnerLost
from trainer.list_evaluation import ListEvaluation, ListEvaluator
from trainer.lora import live_adapter
from trainer.policy_data import PolicyData
from trainer.prompt_card import PromptCard
from trainer.row_metrics import write_row_metrics
from trainer.row_scores import write_row_scores
from trainer.run_log import RunLog
from trainer.run_state import RunState
from trainer.settings import Precision
from trainer.thread_plan import ThreadPlan, plan_threads

STATE = "state"
"""Folder of the learners' state inside a checkpoint."""
HF = "hf"
"""Folder of the exported model inside a checkpoint."""
ADAPTER = "adapter"
"""Folder of the adapter alone, in PEFT's layout, inside the checkpoint of a learner with `lora`."""
Metrics = dict[str, float]


@dataclasses.dataclass
class PolicyRun:
    """The running parts; the `Host` of a training loop."""

    job: SftJob | RlJob
    data: PolicyData
    run_dir: Path
    store: CheckpointStore
    learners: LearnerGroup
    fleet: RolloutFleet | None
    healing: Healing | None
    evaluator: Evaluator | ListEvaluator
    run_log: RunLog
    interruption: Interruption
    state: RunState
    """Where the run begins: fresh, or from its newest checkpoint."""
    checkpoint: Path | None
    """The checkpoint that it begins from; none in a fresh run."""
    hf_dir: Path
    """The initial model."""
    threads: ThreadPlan
    """Computing threads of engines and learners; `job` has their numbers."""
    _scored: tuple[int, float] | None = None
    versions: list[int] = dataclasses.field(default_factory=list)
    """Weight versions that became visible, in order."""

    @property
    def started_fleet(self) -> RolloutFleet:
        """The fleet of a run that has one."""
        if self.fleet is None:
            raise ValueError("this run was started without a fleet")
        return self.fleet

    def push(self, version: int) -> Metrics:
        """See `trainer.training_loop.Host`; nothing to do without a fleet."""
        if self.healing is None:
            return {}
        try:
            report = self.healing.push(version)
        except PushError as error:
            blame = error.blames.get(self.learners.source.name)
            if blame is not None and blame.reason in (PushFailure.DIED, PushFailure.TIMEOUT):
                raise LearnerLost(str(error)) from error
            raise
        self.versions.append(version)
        return push_metrics(report)

    def evaluate(self, step: int) -> Evaluation | ListEvaluation | None:
        """See `trainer.training_loop.Host`; none without a fleet."""
        if self.fleet is None:
            return None
        evaluation = self.evaluator.run(self.fleet)
        self._scored = step, evaluation.items.values[self.job.evaluation.metric]
        name = f"step-{step:06d}"
        write_rows(self.run_dir, name, evaluation, self.data, split="valid")
        if isinstance(evaluation, Evaluation) and evaluation.scored is not None:
            recall = {k: evaluation.items.values[at(RankingMetric.RECALL, k)] for k in self.job.evaluation.k}
            source = self.job.evaluation.scores.source
            write_row_scores(self.run_dir, name, evaluation.scored.scores, recall, source=source)
        return evaluation

    def save(self, state: RunState, keep: Callable[[Path], None]) -> None:
        """See `trainer.training_loop.Host`."""
        score = self._scored[1] if self._scored is not None and self._scored[0] == state.step else None
        metric = None if score is None else self.job.evaluation.metric
        with self.store.writing(state.step, self.data.facts, metric=metric, score=score) as folder:
            self.learners.save(folder / STATE)
            self.learners.export_hf(folder / HF)
            if self.job.learner.lora.on:
                self.learners.export_adapter(folder / ADAPTER)
            PromptCard.of(self.job.data, self.job.lists, self.job.text).write(folder / HF)
            state.save(folder)
            keep(folder)

    def log(self, step: int, metrics: Metrics) -> None:
        """See `trainer.training_loop.Host`."""
        if self.fleet is not None:
            violations = {f"constraint/{reason}": float(n) for reason, n in self.fleet.violations.items()}
            metrics = metrics | violations | {"constraint.violations": float(sum(violations.values()))}
        if self.healing is not None:
            metrics |= self.healing.metrics()
        self.run_log.write(step, metrics)

    def interrupted(self) -> bool:
        """See `trainer.training_loop.Host`."""
        return self.interruption.requested


def push_metrics(report: PushReport) -> Metrics:
    """Metrics of a push."""
    return {
        "push/probe_gap_max": max((gap.max for gap in report.gap.values()), default=0.0),
        "push/probe_limit_max": report.limit.max,
        "push/mib": report.nbytes / 2**20,
        "push/replaced_engines": float(len(report.replaced)),
        "perf/push_gib_per_s": report.nbytes / 2**30 / max(report.seconds["transfer"], 1e-9),
        **{f"time/push/{phase}": seconds for phase, seconds in report.seconds.items() if phase != "total"},
    }


def write_rows(
    run_dir: Path, name: str, evaluation: Evaluation | ListEvaluation, data: PolicyData, *, split: str
) -> None:
    """Keep the values per row of an evaluation, for paired comparisons."""
    write_row_metrics(run_dir, evaluation.row_metrics(name, split=split, dataset=data.dataset.fingerprint))


@contextmanager
def policy_run(
    job: SftJob | RlJob,
    data: PolicyData,
    run_dir: Path,
    interruption: Interruption,
    *,
    total_steps: int,
    headline: tuple[str, ...],
    updates_per_step: int = 1,
    with_fleet: bool = True,
) -> Iterator[PolicyRun]:
    """Start the parts of a job in the connected Ray cluster, continue from the newest checkpoint, end them all.

    Args:
        job: what to run.
        data: what it reads.
        run_dir: the run's folder.
        interruption: asked between steps.
        total_steps: steps that the learning-rate schedule spans.
        headline: metrics that progress shows.
        updates_per_step: optimiser steps that a step takes.
        with_fleet: whether engines are started (not for training from a dump).

    Raises:
        RequestError: a checkpoint or model that does not fit, or settings that this machine cannot meet.
        RunError: a part did not come up.
    """
    job, threads = plan_threads(job)
    store = CheckpointStore(run_dir / "checkpoints", job.checkpoints)
    newest = store.latest()
    state = RunState()
    if newest is not None:
        open_checkpoint(newest, data.facts)
        state = RunState.load(newest)
    # A continued run keeps its own initial model: a reference and the engines' first weights come from it.
    hf_dir = own_initial_model(
        job.init,
        data.catalogue,
        seed=job.seed,
        dtype=torch.float32 if job.learner.dtype is Precision.FLOAT32 else torch.bfloat16,
        target=run_dir / "initial",
        resumed=newest is not None,
        codebooks=data.codebooks(job),
        language=None if data.language is None else (data.language, job.text),
    )
    if job.learner.lora.alone:
        shape = live_adapter(job.learner.lora, hf_dir)
        job = job.model_copy(update={"rollout": job.rollout.model_copy(update={"live_adapter": shape})})
    reference = hf_dir if isinstance(job, RlJob) and job.objective.beta > 0 else None
    check_cpus(job, with_fleet=with_fleet)
    with ExitStack() as stack:
        learners, fleet = start_parts(
            job,
            data,
            hf_dir,
            stack,
            total_steps=total_steps * updates_per_step,
            reference=reference,
            with_fleet=with_fleet,
        )
        channel = None if fleet is None else weight_channel(job, data, learners, fleet)
        if newest is not None:
            learners.load(newest / STATE)
        run_log = stack.enter_context(
            RunLog(
                run_dir,
                job.tracking,
                resumed_step=state.step if newest is not None else None,
                total_steps=total_steps,
                config=job.model_dump(mode="json"),
                headline=headline,
            )
        )
        if newest is not None:
            run_log.say(f"continuing from {newest}")
        healing = None
        if fleet is not None and channel is not None:
            rest = not isinstance(job, RlJob) or not job.max_staleness
            healing = Healing(job.cluster, fleet, channel, learners_rest=rest, say=run_log.say)
        yield PolicyRun(
            job=job,
            data=data,
            run_dir=run_dir,
            store=store,
            learners=learners,
            fleet=fleet,
            healing=healing,
            evaluator=data.evaluator(job),
            run_log=run_log,
            interruption=interruption,
            state=state,
            checkpoint=newest,
            hf_dir=hf_dir,
            threads=threads,
        )


def check_cpus(job: SftJob | RlJob, *, with_fleet: bool) -> None:
    """Refuse parts that together want more CPUs than the cluster has: Ray would let some of them wait for ever.

    Raises:
        RequestError: names what each part wants.
    """
    import ray

    wanted = {"learner.ranks": float(job.learner.ranks), "rollout.engines": float(job.rollout.engines * with_fleet)}
    if isinstance(job, RlJob) and job.reward.ranker is not None:
        wanted["reward.replicas x reward.num_cpus"] = job.reward.replicas * job.reward.num_cpus
    total = ray.cluster_resources().get("CPU", 0.0)
    needed = sum(wanted.values())
    if needed > total:
        parts = ", ".join(f"{name} {count:g}" for name, count in wanted.items())
        raise RequestError(
            "cluster.num_cpus", f"{total:g} logical CPUs", f"at least {needed:g} ({parts}), or fewer parts"
        )


def start_parts(
    job: SftJob | RlJob,
    data: PolicyData,
    hf_dir: Path,
    stack: ExitStack,
    *,
    total_steps: int,
    reference: Path | None,
    with_fleet: bool,
) -> tuple[LearnerGroup, RolloutFleet | None]:
    """Start learners and fleet side by side, because both spend most of it importing; `stack` ends what came up.

    When both refuse, the learners' error is the one that is raised.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="fleet-start") as pool:
        starting = pool.submit(RolloutFleet.start, job.rollout, hf_dir, data.catalogue) if with_fleet else None
        try:
            learners = LearnerGroup.start(
                job.learner,
                hf_dir,
                data.catalogue,
                job.seed,
                total_steps,
                reference_dir=reference,
                constraint=data.constraint(),
            )
            stack.callback(learners.close)
        finally:
            if starting is not None and starting.exception() is None:
                stack.callback(starting.result().close)
    return learners, None if starting is None else starting.result()


def weight_channel(job: SftJob | RlJob, data: PolicyData, learners: LearnerGroup, fleet: RolloutFleet) -> WeightChannel:
    """The channel from the learners to the fleet; a failed engine is restarted in place.

    Raises:
        RequestError: the engines apply an adapter, which whole matrices would not fit.
    """
    if job.rollout.adapter is not None:
        raise RequestError("rollout.adapter", job.rollout.adapter, "none in a job that trains")

    def replaced(engine_id: str) -> RayPeer:
        return RayPeer(engine_id, [fleet.restart(engine_id)])

    catalogue = data.catalogue
    paths = [catalogue.tokens(item) for item in range(catalogue.n_items)]
    types: set[Any] = {job.learner.dtype.value, job.rollout.dtype.value}
    return WeightChannel(
        settings=job.weights,
        source=learners.source,
        engines={engine_id: RayPeer(engine_id, [actor]) for engine_id, actor in fleet.engines.items()},
        probe=item_probe(paths, bos=catalogue.vocabulary.bos, seed=job.seed),
        dtype="bfloat16" if "bfloat16" in types else "float32",
        workers_per_engine=job.rollout.tensor_parallel,
        replace=replaced,
    )
