"""The RL loop in one process: reference engine, a DeepSpeed learner and the real weight channel, without Ray.

Checks what a step does to state, versions, metrics and checkpoints; that k steps, a restart and N-k steps equal N
steps; that training from a dump takes the step the dump was made for; minibatches; the ground-truth branch; and what
stops a run. Real processes: tests/launch/test_whole_job.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import RequestError, RunError
from data.records import DecodeSpec, Groups, Prompt, RewardFailure, ScoredGroups
from reward.scoring import RewardScorer
from rollout.fleet import RolloutFleet
from rollout.placement import Placement
from rollout.probe import GapAlarm
from rollout.violations import ViolationCounter
from tests.requirements import require
from tests.small_world import recipe, write_dataset
from tests.trainer.loop_world import World, host_of, stale, weights
from trainer.collection import Batch
from trainer.group_dump import write_step
from trainer.jobs import RlJob
from trainer.policy_data import PolicyData


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    require("deepspeed")
    folder = tmp_path_factory.mktemp("loop")
    dataset = write_dataset(folder / "source")
    content = recipe(dataset.path, "rl", rollout={"engine": "reference"}, objective={"nll_weight": 0.2})
    job = RlJob.model_validate(content)
    made = World(job=job, data=PolicyData.open(job), folder=folder)
    yield made
    for group in made.built:
        group.close()


def test_a_run_steps_evaluates_and_keeps_checkpoints(world: World) -> None:
    loop = world.build("plain")
    assert loop.run() == "max_steps"
    host = host_of(loop)
    assert sorted(host.steps) == [0, 1, 2, 3]
    assert [host.steps[step]["weight_version"] for step in (1, 2, 3)] == [0, 1, 2]
    assert {step for step, metrics in host.steps.items() if "ndcg@10" in metrics} == {0, 3}
    assert sorted(host.saved) == [0, 1, 2, 3]
    assert loop.state.best_step in (0, 3)
    for step in (1, 2, 3):
        assert host.steps[step]["policy_gap/max"] < 1e-4
        assert host.steps[step]["tokens/nll"] > 0
        assert host.steps[step]["ratio/mean"] == pytest.approx(1, abs=1e-5)


def test_a_restart_continues_to_the_bit(world: World) -> None:
    whole = world.build("whole")
    whole.run()
    expected, expected_steps = weights(whole, world.folder / "whole-hf"), host_of(whole).steps
    first = host_of(whole).saved[1]
    again = world.build("again", state=first, load=world.folder / "whole" / "state-1")
    again.run()
    assert weights(again, world.folder / "again-hf") == expected
    assert host_of(again).steps == {step: expected_steps[step] for step in (2, 3)}


def test_engines_that_sleep_while_the_learner_works_give_the_same_run(world: World) -> None:
    whole = world.build("awake")
    whole.run()
    expected = weights(whole, world.folder / "awake-hf")
    loop = world.build("asleep", rollout=world.job.rollout.model_copy(update={"sleeps": True}))
    engine = host_of(loop).engine
    assert engine is not None
    score = loop.learners.score

    def scored(*arguments: Any) -> Any:
        with pytest.raises(RunError, match="asleep"):
            engine.score([], [])
        return score(*arguments)

    loop.learners.score = scored  # type: ignore[method-assign]
    loop.run()
    assert host_of(loop).asleep == [0, 1, 2], "once a step, with the version that the step began with"
    assert host_of(loop).steps == host_of(whole).steps
    assert weights(loop, world.folder / "asleep-hf") == expected


@pytest.mark.parametrize("staleness", [1, 2])
def test_batches_collected_ahead_have_the_lag_that_was_asked_for(world: World, staleness: int) -> None:
    changes = stale(world, staleness)
    whole = world.build(f"ahead-{staleness}", **changes)
    whole.run()
    steps = host_of(whole).steps
    for step in (1, 2, 3):
        assert steps[step]["weight_version"] == steps[step]["weight_version/oldest"] == max(step - 1 - staleness, 0)
        assert steps[step]["staleness/max"] == min(step - 1, staleness)
    expected = weights(whole, world.folder / f"ahead-{staleness}-hf")
    kept = host_of(whole).folder / "state-1"
    assert len(list((kept / "waiting").glob("*.parquet"))) == min(staleness, 2)
    again = world.build(f"ahead-again-{staleness}", state=host_of(whole).saved[1], load=kept, **changes)
    again.restore(kept)
    again.run()
    assert host_of(again).steps == {step: steps[step] for step in (2, 3)}
    assert weights(again, world.folder / f"ahead-again-{staleness}-hf") == expected


def test_a_rollout_that_fails_ahead_stops_the_run_before_the_push(world: World) -> None:
    loop = world.build("ahead-fails", **stale(world, 1))
    rollouts = loop.rollouts
    assert rollouts is not None
    generate = rollouts.generate

    def dying(prompts: Sequence[Prompt], spec: DecodeSpec) -> Groups:
        if spec.step == 3:
            raise RunError("the engine died")
        return generate(prompts, spec)

    rollouts.generate = dying  # type: ignore[method-assign]
    with pytest.raises(RunError, match="the engine died"):
        loop.run()
    assert sorted(host_of(loop).steps) == [0, 1]
    assert sorted(host_of(loop).saved) == [0, 1]


def test_groups_older_than_the_bound_stop_the_run(world: World) -> None:
    loop = world.build("ahead-withheld", **stale(world, 1))
    host_of(loop).withheld.add(1)
    with pytest.raises(RunError, match="step 3: every group comes from weight version 0, which is not within"):
        loop.run()
    assert 2 in host_of(loop).saved


def test_staleness_asks_for_its_correction() -> None:
    content = recipe(Path("no-dataset"), "rl") | {"max_staleness": 1}
    with pytest.raises(RequestError, match=r"objective\.truncation\.level.*legal: token, item, sequence"):
        RlJob.model_validate(content)


def test_a_dump_trains_the_step_it_was_made_for(world: World) -> None:
    limits = world.job.limits.model_copy(update={"max_steps": 1})
    direct = world.build("direct", limits=limits)
    collected: list[Batch] = []
    roll = direct.roll

    def recorded(step: int) -> Callable[[], Batch]:
        collected.append(roll(step)())
        return lambda: collected[-1]

    direct.roll = recorded  # type: ignore[method-assign]
    direct.run()
    expected = weights(direct, world.folder / "direct-hf")
    write_step(world.folder / "dump", 1, collected[0].prompts, collected[0].scored)
    replay = world.build("replay", train_only=world.folder / "dump", limits=limits)
    assert replay.run() == "max_steps"
    assert weights(replay, world.folder / "replay-hf") == expected


def test_a_dump_is_used_once(world: World) -> None:
    replay = world.build("once", train_only=world.folder / "dump")
    assert replay.run() == "dump_ended"
    assert replay.state.step == 1


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [
        ("rollout", {"temperature": 0.5}, "rollout.temperature: 0.5; legal: 1.0"),
        ("objective", {"minibatches": 3}, "objective.minibatches: 3; legal: a divisor of 8"),
    ],
)
def test_a_dump_that_does_not_fit_the_job_is_refused(
    world: World, section: str, change: dict[str, Any], told: str
) -> None:
    settings = getattr(world.job, section).model_copy(update=change)
    replay = world.build("unfit", train_only=world.folder / "dump", **{section: settings})
    with pytest.raises(RequestError, match=told):
        replay.run()


def test_minibatches_let_ratios_move_and_a_reference_is_scored(world: World) -> None:
    objective = world.job.objective.model_copy(update={"minibatches": 4, "updates": 2, "beta": 0.1})
    loop = world.build("minibatches", objective=objective)
    loop.run()
    step = host_of(loop).steps[3]
    assert step["ratio/gap_max"] > 0
    assert step["kl"] > 0
    assert loop.learners.step == 3 * 2 * 4


def test_metrics_of_minibatches_are_means_and_maxima(world: World) -> None:
    objective = world.job.objective.model_copy(update={"minibatches": 2})
    limits = world.job.limits.model_copy(update={"max_steps": 1})
    loop = world.build("maxima", objective=objective, limits=limits)
    answers = iter([{"loss": 1.0, "ratio/gap_max": 3.0}, {"loss": 2.0, "ratio/gap_max": 1.0}])
    loop.learners.update = lambda completions, inputs: next(answers)  # type: ignore[method-assign]
    loop.run()
    step = host_of(loop).steps[1]
    assert (step["loss"], step["ratio/gap_max"]) == (1.5, 3.0)


def test_a_withheld_push_stops_the_run_within_a_step(world: World) -> None:
    settings = world.job.learner.model_copy(update={"lr": 1e-2})
    loop = world.build("withheld", learner=settings)
    host_of(loop).withheld.add(1)
    with pytest.raises(GapAlarm, match="policy gap of step 2"):
        loop.run()
    assert sorted(host_of(loop).steps) == [0, 1]
    assert 1 in host_of(loop).saved


@pytest.mark.parametrize(("noise", "stops"), [(2e-4, False), (2e-5, True)])
def test_a_gap_in_float32_is_judged_by_the_learners_own_noise(world: World, noise: float, stops: bool) -> None:
    """The engine is off by 3e-4 in step 2, which sharp logits are; a fake says how much of it is rounding."""
    loop = world.build(f"sharp-{stops}")
    rollouts = loop.rollouts
    assert rollouts is not None
    generate, asked = rollouts.generate, []

    def off(prompts: Sequence[Prompt], spec: DecodeSpec) -> Groups:
        groups = generate(prompts, spec)
        return dataclasses.replace(groups, logp_PGT=groups.logp_PGT + np.float32(3e-4)) if spec.step == 2 else groups

    def measured(*_: object) -> dict[str, float]:
        asked.append(loop.state.step)
        return {"mean": noise, "max": noise}

    rollouts.generate = off  # type: ignore[method-assign]
    loop.learners.noise = measured  # type: ignore[method-assign]
    if stops:
        with pytest.raises(GapAlarm, match="policy gap of step 2"):
            loop.run()
    else:
        loop.run()
        steps = host_of(loop).steps
        assert steps[2]["policy_gap/limit_mean"] == steps[2]["policy_gap/noise_mean"] * 2 == pytest.approx(2 * noise)
        assert "policy_gap/noise_mean" not in steps[1].keys() | steps[3].keys()
        assert steps[3]["policy_gap/limit_mean"] == 1e-4
    assert asked == [1], "the noise is measured where it must be"
    assert loop.state.noise is None


def test_groups_of_earlier_weights_are_not_measured(world: World) -> None:
    loop = world.build("ahead-noise", **stale(world, 1))
    loop.learners.noise = lambda *_: pytest.fail("the gap holds updates, which no noise explains")  # type: ignore
    loop.run()
    assert host_of(loop).steps[3]["policy_gap/max"] > 1e-4


class FailingRewards(RewardScorer):
    """A fake: rewards that fail for every group from a step on."""

    def __init__(self, inner: RewardScorer, first: int) -> None:
        super().__init__(inner.settings, None)
        self._first = first

    def score(self, prompts: Sequence[Prompt], groups: Groups) -> tuple[ScoredGroups, dict[str, float]]:
        scored, metrics = super().score(prompts, groups)
        if groups.spec.step >= self._first:
            failure_P = np.full(len(prompts), RewardFailure.TIMEOUT.value)
            scored = dataclasses.replace(scored, failure_P=failure_P, reward_PG=np.zeros_like(scored.reward_PG))
        return scored, metrics


def test_failed_rewards_stop_the_run_after_a_checkpoint(world: World) -> None:
    checkpoints = world.job.checkpoints.model_copy(update={"interval": 100, "every": 0})
    loop = world.build("failing", checkpoints=checkpoints)
    loop.rewards = FailingRewards(loop.rewards, first=2)
    with pytest.raises(RunError, match="step 2: 8 of 8 groups have no reward"):
        loop.run()
    assert 1 in host_of(loop).saved


def test_every_prompt_of_a_request_is_keyed_by_its_step(world: World) -> None:
    loop = world.build("keyed")
    specs: list[DecodeSpec] = []
    generate = loop.rollouts.generate  # type: ignore[union-attr]

    def recorded(prompts: Sequence[Prompt], spec: DecodeSpec) -> Groups:
        specs.append(spec)
        return generate(prompts, spec)

    loop.rollouts.generate = recorded  # type: ignore[union-attr, method-assign]
    loop.run()
    training = [spec for spec in specs if spec.step]
    assert [spec.step for spec in training] == [1, 2, 3]
    assert {spec.seed for spec in training} == {world.job.seed}


def test_a_fleet_that_is_asked_after_the_loop_draws_nothing(world: World) -> None:
    loop = world.build("asked-after")
    fleet = RolloutFleet(world.job.rollout, world.folder, {}, ViolationCounter(world.data.catalogue), Placement())
    loop.rollouts = fleet
    # A finished job that is started again takes no step, and its evaluation asks the fleet.
    loop.close()
    assert fleet.meanwhile is None
