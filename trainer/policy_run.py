"""The processes of a policy job, and what its loop leaves to them: push, evaluate, log, keep.

    with policy_run(job, data, run_dir, interruption, log) as run: run.train()

Learners and fleet start side by side from the same `hf` folder; whatever was started is ended, also when another part
fails.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from reward.names import RankingMetric, at
from rollout.channel import PushReport
from rollout.fleet import RolloutFleet
from rollout.placement import Placement, pairs, remove
from trainer.checkpoints import CheckpointStore, check_own, open_checkpoint
from trainer.evaluation import Evaluation, Evaluator
from trainer.healing import Healing
from trainer.interruption import Interruption
from trainer.jobs import RlJob, SftJob
from trainer.learner_group import LearnerGroup
from trainer.list_evaluation import ListEvaluation, ListEvaluator
from trainer.lora import live_adapter
from trainer.policy_data import PolicyData
from trainer.preflight import Plan, check_cluster, check_heads
from trainer.prompt_card import PromptCard
from trainer.row_metrics import write_row_metrics
from trainer.row_scores import write_row_scores
from trainer.run_channel import ahead, kept_folder, weight_channel
from trainer.run_gauges import RunGauges, rates
from trainer.run_log import RunLog
from trainer.run_state import RunState
from trainer.run_status import StatusFile
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
    status: StatusFile
    gauges: RunGauges
    _scored: tuple[int, float] | None = None
    versions: list[int] = dataclasses.field(default_factory=list)
    """Weight versions that became visible, in order."""
    learner_restarts: int = 0
    """How often the learners of this start of the job have begun again."""

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
        if self.started_fleet.asleep:
            self.learners.give_memory()
        report = self.healing.push(version)
        self.versions.append(version)
        return push_metrics(report)

    def rest_engines(self) -> Metrics:
        """See `trainer.training_loop.Host`; nothing to do where engines have cards of their own."""
        if self.fleet is None or not self.job.rollout.sleeps or self.fleet.asleep:
            return {}
        return {"time/sleep": self.fleet.sleep()}

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
            # Reasons that did not occur are left out: which ones were counted depends on what was asked so far.
            violations = {f"constraint/{reason}": float(n) for reason, n in self.fleet.violations.items() if n}
            metrics = metrics | violations | {"constraint.violations": float(sum(violations.values()))}
        if self.healing is not None:
            metrics |= self.healing.metrics()
        if self.fleet is not None:
            metrics["system/shards_waiting"] = float(self.fleet.most_waiting)
            self.fleet.most_waiting = 0
        metrics = metrics | rates(metrics) | {"system/learner_restarts": float(self.learner_restarts)}
        self.run_log.write(step, metrics)
        restarts = 0 if self.healing is None else self.healing.restarts
        self.gauges.record(step, metrics, self.fleet, restarts)
        version = self.versions[-1] if self.versions else None
        self.status.write(step=step, version=version, fleet=self.fleet, metrics=metrics)

    def interrupted(self) -> bool:
        """See `trainer.training_loop.Host`."""
        return self.interruption.requested


def push_metrics(report: PushReport) -> Metrics:
    """Metrics of a push."""
    return {
        "push/probe_gap_max": max((gap.max for gap in report.gap.values()), default=0.0),
        "push/probe_limit_max": report.limit.max,
        "push/mib": report.nbytes / 2**20,
        "system/engines_replaced": float(len(report.replaced)),
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
    learner_restarts: int = 0,
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
        learner_restarts: how often the learners have begun again before.

    Raises:
        RequestError: a checkpoint or model that does not fit, or settings that this machine cannot meet.
        RunError: a part did not come up.
    """
    job, threads = plan_threads(job)
    store = CheckpointStore(run_dir / "checkpoints", job.checkpoints)
    newest = store.latest()
    state = RunState()
    if newest is not None:
        check_own(store.root, newest)
        open_checkpoint(newest, data.facts)
        state = RunState.load(newest)
    # A continued run keeps its own initial model: a reference and the engines' first weights come from it.
    dtype = torch.float32 if job.learner.dtype is Precision.FLOAT32 else torch.bfloat16
    hf_dir = data.initial_model(job, run_dir / "initial", dtype=dtype, resumed=newest is not None)
    if job.learner.lora.alone:
        shape = live_adapter(job.learner.lora, hf_dir)
        job = job.model_copy(update={"rollout": job.rollout.model_copy(update={"live_adapter": shape})})
    if job.cluster.colocated:
        job = job.model_copy(update={"rollout": job.rollout.model_copy(update={"sleeps": True})})
    reference = hf_dir if isinstance(job, RlJob) and job.objective.beta > 0 else None
    check_heads(job, hf_dir)
    plan = check_cluster(job, with_fleet=with_fleet)
    sys.stderr.write(plan.table() + "\n")
    with ExitStack() as stack:
        learners, fleet = start_parts(
            job,
            data,
            hf_dir,
            stack,
            plan,
            total_steps=total_steps * updates_per_step,
            reference=reference,
            with_fleet=with_fleet,
        )
        channel = None
        if fleet is not None:
            folder = stack.enter_context(kept_folder(job, run_dir))
            channel = weight_channel(job, data.catalogue, learners, fleet, keep=folder)
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
        status = StatusFile(run_dir=run_dir)
        if fleet is not None and channel is not None:
            healing = Healing(
                job.cluster,
                fleet,
                channel,
                learners_rest=not ahead(job),
                say=run_log.say,
                wanted=status.wanted_engines,
            )
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
            status=status,
            gauges=RunGauges(run_dir.name),
            learner_restarts=learner_restarts,
        )


def placements(job: SftJob | RlJob, plan: Plan) -> tuple[Placement, Placement]:
    """Where engines and learner ranks go, in this order.

    Raises:
        RunError: there is no room for colocated pairs.
    """
    cluster, deadline_s = job.cluster, job.cluster.preflight_deadline_s
    engines = next((ask for ask in plan.asks if ask.part == "rollout.engines"), None)
    # Without engines (training from a dump) there are no pairs: the ranks have room of their own.
    if not cluster.colocated or engines is None:
        for_engines = Placement(node=cluster.engine_node, deadline_s=deadline_s)
        return for_engines, Placement(node=cluster.learner_node, deadline_s=deadline_s)
    group = pairs(engines.count, gpus=engines.gpus, node=cluster.engine_node, deadline_s=deadline_s)
    return Placement(shared=group), Placement(shared=group)


def start_parts(
    job: SftJob | RlJob,
    data: PolicyData,
    hf_dir: Path,
    stack: ExitStack,
    plan: Plan,
    *,
    total_steps: int,
    reference: Path | None,
    with_fleet: bool,
) -> tuple[LearnerGroup, RolloutFleet | None]:
    """Start learners and fleet side by side, because both spend most of it importing; `stack` ends what came up.

    When both refuse, the learners' error is the one that is raised.
    """
    for_engines, for_ranks = placements(job, plan)
    if for_engines.shared is not None:
        stack.callback(remove, for_engines.shared)

    def start_fleet() -> RolloutFleet:
        return RolloutFleet.start(job.rollout, hf_dir, data.catalogue, placement=for_engines)

    with ThreadPoolExecutor(1, thread_name_prefix="fleet-start") as pool:
        starting = pool.submit(start_fleet) if with_fleet else None
        try:
            learners = LearnerGroup.start(
                job.learner,
                hf_dir,
                data.catalogue,
                job.seed,
                total_steps,
                reference_dir=reference,
                constraint=data.constraint(),
                placement=for_ranks,
            )
            stack.callback(learners.close)
        finally:
            if starting is not None and starting.exception() is None:
                stack.callback(starting.result().close)
    return learners, None if starting is None else starting.result()
