"""The jobs that train the policy, from a configuration to a summary: `sft` and `rl`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data.catalogue import Catalogue
from data.errors import RequestError
from data.feed import Feed
from data.text_prompts import TextPromptBuilder
from reward.failures import FailureTracker
from reward.scoring import RewardScorer
from reward.service import RewardService
from trainer.checkpoints import check_own, open_checkpoint
from trainer.data_checks import check_batch, check_row_tokens, check_windows
from trainer.group_dump import dumped_steps
from trainer.interruption import Interruption
from trainer.jobs import PolicyJobSettings, RlJob, SftJob
from trainer.list_jobs import ListRows, ideal_rows, list_scorer, prompt_rows, swap_client
from trainer.logged_rows import LoggedRows, logged_rows, responded, response_sequences
from trainer.loop import RlLoop
from trainer.policy_data import PolicyData
from trainer.policy_run import STATE, PolicyRun, policy_run, write_rows
from trainer.replay_loop import ReplayLoop
from trainer.rollout_only import dump_rollouts
from trainer.run_log import METRICS, read_metrics
from trainer.sft import RowFeed, SftLoop, TaskFeed, WindowFeed

RL_HEADLINE = ("reward/mean", "reward/hit", "loss", "policy_gap/mean")
LIST_HEADLINE = ("credit/ndcg", "loss", "policy_gap/mean")


def run_sft(job: SftJob, run_dir: Path, interruption: Interruption, *, learner_restarts: int = 0) -> dict[str, Any]:
    """Train on whole sequences or on the responses of a log; Ray must be connected. Returns the summary."""
    begun = time.monotonic()
    data = PolicyData.open(job)
    logged = None if job.feedback is None else logged_rows(job, data)
    rows = None if data.lists is None else ideal_rows(job, data)
    feed: RowFeed = windows(job, data, logged) if rows is None else rows.feed
    total = total_steps(job, feed.batches_per_epoch)
    headline = ("loss", "lr", job.evaluation.metric)
    with policy_run(
        job,
        data,
        run_dir,
        interruption,
        total_steps=total,
        headline=headline,
        learner_restarts=learner_restarts,
    ) as run:
        for source in (logged, rows):
            if source is not None:
                run.run_log.say(source.told)
        _restore_cursor(run, feed)
        loop = SftLoop(
            settings=job,
            job=job,
            host=run,
            state=run.state,
            resumed=run.checkpoint is not None,
            feed=feed,
            learners=run.learners,
        )
        reason = loop.run()
        test = test_best(run, interrupted=reason == "interrupted")
        result = summary(run, loop, reason, time.monotonic() - begun) | test
        return result | sources_told(logged, rows)


def windows(job: SftJob, data: PolicyData, logged: LoggedRows | None) -> RowFeed:
    """Windows of whole sequences: of the training split, or of the responses of a log.

    A language model's prompt is no part of a sequence: it learns each target behind a prompt of its own.
    """
    if isinstance(data.builder, TextPromptBuilder):
        return tasks(job, data, data.builder, logged)
    fingerprint = data.dataset.fingerprint
    if logged is None:
        sequences = data.dataset.sequences("train")
    else:
        sequences, fingerprint = response_sequences(logged), f"{fingerprint}+{logged.anchors.digest}"
    longest = int((sequences.end_S - sequences.start_S).max(initial=0))
    check_windows(job, longest_sequence=longest, depth=data.catalogue.trie().depth)
    return WindowFeed(
        sequences=sequences,
        catalogue=data.catalogue,
        history=job.data.history,
        batch_rows=job.batch_rows,
        seed=job.seed,
        fingerprint=fingerprint,
    )


def tasks(job: SftJob, data: PolicyData, builder: TextPromptBuilder, logged: LoggedRows | None) -> TaskFeed:
    """Prompts with answers, of the training split or of the responses of a log.

    Raises:
        RequestError: no row, or a row that learner.row_tokens has no room for.
    """
    samples, fingerprint = data.dataset.samples("train"), data.dataset.fingerprint
    if logged is not None:
        samples = responded(logged)
        fingerprint = f"{fingerprint}+{logged.anchors.digest}"
    if not len(samples):
        raise RequestError("data.dataset", "no target to train on", "a dataset with longer histories")
    check_task_rows(job, builder)
    return TaskFeed(batch_rows=job.batch_rows, seed=job.seed, fingerprint=fingerprint, samples=samples, builder=builder)


def check_task_rows(job: SftJob, builder: TextPromptBuilder) -> None:
    """Refuse rows that may be longer than the learner's, and titles that no answer can be made of.

    Raises:
        RequestError: names the item of an empty title, or the row length that fits.
    """
    catalogue = builder.catalogue
    answer = catalogue.trie().depth
    if job.text.tasks.align:
        titles = builder.tokenizer.encode_all(catalogue.titles)
        for key, ids in zip(catalogue.item_keys, titles, strict=True):
            if not ids:
                raise RequestError(f"title of item {key}", "no token", "titles for text.tasks, or next_item alone")
        answer = max(answer, *map(len, titles))
    check_row_tokens(job, job.data.max_prompt_tokens + answer + 1, "prompt, answer and end token")


def run_rl(job: RlJob, run_dir: Path, interruption: Interruption, *, learner_restarts: int = 0) -> dict[str, Any]:
    """Train on rollouts, or only dump them, or train from a dump; Ray must be connected. Returns the summary."""
    begun = time.monotonic()
    data = PolicyData.open(job)
    logged = None if job.feedback is None else logged_rows(job, data)
    rows = None if data.lists is None else prompt_rows(job, data)
    feed = item_feed(job, data, logged) if rows is None else rows.feed
    if job.rollout_only is not None:
        with reward_scorer(job, data.catalogue) as (rewards, _):
            steps = planned_steps(job, feed.batches_per_epoch)
            return dump_rollouts(job, data, feed, rewards, run_dir, interruption, steps=steps)
    batches = feed.batches_per_epoch if job.train_only is None else len(dumped_steps(job.train_only))
    total = total_steps(job, batches)
    with ExitStack() as stack:
        run = stack.enter_context(
            policy_run(
                job,
                data,
                run_dir,
                interruption,
                total_steps=total if job.train_only is None else min(total, batches),
                updates_per_step=job.objective.updates * job.objective.minibatches,
                headline=(*(RL_HEADLINE if rows is None else LIST_HEADLINE), job.evaluation.metric),
                with_fleet=job.train_only is None,
                learner_restarts=learner_restarts,
            )
        )
        rewards, service = stack.enter_context(reward_scorer(job, data.catalogue))
        for source in (logged, rows):
            if source is not None:
                run.run_log.say(source.told)
        _restore_cursor(run, feed)
        swaps = swap_client(job, service)
        tracker = FailureTracker(job.reward)
        if run.state.failures:
            tracker.load_state_dict(run.state.failures)
        common: dict[str, Any] = {
            "settings": job,
            "job": job,
            "host": run,
            "state": run.state,
            "resumed": run.checkpoint is not None,
            "feed": feed,
            "learners": run.learners,
            "tracker": tracker,
            "catalogue": data.catalogue,
            "feedback": None if logged is None else logged.anchors,
            "lists": None if rows is None else list_scorer(job, rewards, swaps),
        }
        if job.train_only is not None:
            loop: RlLoop = ReplayLoop(
                **common, rewards=rewards, folder=job.train_only, catalogue_digest=data.catalogue.digest
            )
        else:
            loop = RlLoop(**common, rollouts=run.started_fleet, rewards=rewards)
            if run.checkpoint is not None:
                loop.restore(run.checkpoint)
        reason = loop.run()
        test = test_best(run, interrupted=reason == "interrupted")
        result = summary(run, loop, reason, time.monotonic() - begun) | test
        result["reward"] = {
            "backend": "ray-serve" if service is not None else "rules",
            "requests": sum(client.requests for client in (rewards.client, swaps) if client is not None),
        }
        return result | sources_told(logged, rows)


def item_feed(job: RlJob, data: PolicyData, logged: LoggedRows | None) -> Feed:
    """Prompts of the training split, or of the rows of a log.

    Raises:
        RequestError: fewer rows than a batch.
    """
    samples, fingerprint = data.dataset.samples("train"), data.dataset.fingerprint
    if logged is not None:
        samples, fingerprint = logged.samples, f"{fingerprint}+{logged.anchors.digest}"
    if job.data.latest_rows is not None:
        samples = samples.take(np.arange(max(0, len(samples) - job.data.latest_rows), len(samples)))
    check_batch(job, len(samples))
    return Feed(samples, data.builder, job.batch_prompts, job.seed, fingerprint=fingerprint)


def sources_told(logged: LoggedRows | None, rows: ListRows | None) -> dict[str, Any]:
    """What a summary says of a log and of the prompts of lists; nothing without them."""
    told = {} if logged is None else {"feedback": logged.record()}
    return told if rows is None else told | {"prompts": rows.record()}


@contextmanager
def reward_scorer(job: RlJob, catalogue: Catalogue) -> Iterator[tuple[RewardScorer, RewardService | None]]:
    """The scorer of a job, with its service when a ranker is asked."""
    path_id_I = catalogue.active_path_id
    if not job.reward.asks_service:
        yield RewardScorer(job.reward, None, path_id_I=path_id_I), None
        return
    service = RewardService.start(job.reward)
    try:
        yield RewardScorer(job.reward, service.client(), path_id_I=path_id_I), service
    finally:
        service.close()


def total_steps(job: PolicyJobSettings, batches_per_epoch: int) -> int:
    """Steps the learning-rate schedule spans, at least one."""
    return max(1, planned_steps(job, batches_per_epoch))


def planned_steps(job: PolicyJobSettings, batches_per_epoch: int) -> int:
    """Steps the job takes if nothing ends it early."""
    limits = job.limits
    by_epochs = None if limits.max_epochs is None else math.ceil(limits.max_epochs * batches_per_epoch)
    known = [steps for steps in (limits.max_steps, by_epochs) if steps is not None]
    # Limited by time alone: the schedule spans one epoch and stays at its end.
    return min(known) if known else batches_per_epoch


def _restore_cursor(run: PolicyRun, feed: Feed | RowFeed) -> None:
    if run.state.cursor:
        message = feed.load_state_dict(run.state.cursor)
        if message is not None:
            run.run_log.say(message)


def summary(run: PolicyRun, loop: RlLoop | SftLoop, reason: str, seconds: float) -> dict[str, Any]:
    """What `summary.json` says about a run."""
    steps = read_metrics(run.run_dir / METRICS)
    best = run.store.best()
    learner = run.job.learner
    result: dict[str, Any] = {
        "job": run.job.job,
        "steps": loop.state.step,
        "ended_by": reason,
        "interrupted": reason == "interrupted",
        "selection": {
            "metric": run.job.evaluation.metric,
            "best_step": loop.state.best_step,
            "best_score": loop.state.best_score,
            "candidates": [s["step"] for s in steps if run.job.evaluation.metric in s],
            "initial_model_is_step": 0,
        },
        "best_checkpoint": None if best is None else str(best),
        "wall_seconds": seconds,
        "weight_versions": weight_versions(steps),
        "learner": {"backend": "deepspeed", "zero_stage": learner.zero_stage, "ranks": learner.ranks},
        "threads": run.threads.record(),
    }
    if run.fleet is not None:
        result["engine"] = run.fleet.describe()
    gaps = [(s["policy_gap/mean"], s["policy_gap/max"]) for s in steps if "policy_gap/mean" in s]
    if gaps:
        noise = [s["policy_gap/noise_mean"] for s in steps if "policy_gap/noise_mean" in s]
        result["policy_gap"] = {
            "mean": float(np.mean([mean for mean, _ in gaps])),
            "max": float(np.max([most for _, most in gaps])),
            # A learner in float32 measures only what no rounding seemed to explain.
            "noise": float(np.mean(noise)) if noise else 0.0,
        }
    return result


def test_best(run: PolicyRun, *, interrupted: bool) -> dict[str, Any]:
    """`{"test": ...}`: the best checkpoint on the test rows, by the processes that are up already; or nothing.

    The learners take the checkpoint's weights and push them, with the checks of every push. Nothing is selected by
    the result. The values per row are kept as `rows/test.parquet`.
    """
    settings = run.job.evaluation
    best = run.store.best()
    if not settings.test_rows or interrupted or run.fleet is None or best is None:
        return {}
    begun = time.monotonic()
    check_own(run.store.root, best)
    step = open_checkpoint(best, run.data.facts).step
    run.learners.load(best / STATE)
    run.push(step)
    evaluation = run.data.evaluator(run.job, "test").run(run.fleet)
    write_rows(run.run_dir, "test", evaluation, run.data, split="test")
    values = evaluation.items.values | evaluation.further
    return {
        "test": {
            **{name: value for name, value in values.items() if not name.startswith("invalid@")},
            "n": evaluation.items.n,
            "invalid": {
                "constrained": values[f"invalid@{max(settings.k)}"],
                "unconstrained": evaluation.unconstrained_invalid,
            },
            "step": step,
            "exclude_seen": run.job.data.exclude_seen,
            "violations": sum(run.fleet.violations.values()),
            "seconds": time.monotonic() - begun,
        }
    }


def weight_versions(steps: list[dict[str, Any]]) -> list[int]:
    """Versions that answered rollouts, in order, without repeats."""
    return sorted({int(s["weight_version"]) for s in steps if "weight_version" in s})
