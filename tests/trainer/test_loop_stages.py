"""The RL loop in one process with every kind of stage on: gate, anchors, window, tempering, truncation, entropy.

Checks that steps run, tell their metrics and continue to the bit, with the state of the anchor stage. The ranker is a
fake. What the stages compute: test_composition.py; plain GRPO: test_loop.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from data.errors import RunError
from data.feedback import Anchors
from data.records import DecodeSpec, Groups, Prompt, RewardFailure
from reward.batch_scoring import BatchScores
from reward.client import RewardClient
from reward.scoring import RewardScorer
from reward.wire import ScoreCall
from rollout.probe import GapAlarm
from tests.requirements import require
from tests.small_world import recipe, write_dataset
from tests.trainer.loop_world import World, host_of, weights
from trainer.jobs import RlJob
from trainer.loop import RlLoop
from trainer.policy_data import PolicyData
from trainer.policy_jobs import item_feed
from trainer.run_state import RunState

OBJECTIVE = {
    "nll_weight": 0.2,
    "entropy_weight": 0.01,
    "beta": 0.01,
    "window": {"kind": "soft", "anchor_rank": 2, "negatives": "sample"},
    "gate": {"kind": "inverted"},
    "anchor": {"mode": "replace_last"},
    "tempering": {"mode": "soften_confident"},
    "truncation": {"level": "sequence"},
    "minibatches": 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    require("deepspeed")
    folder = tmp_path_factory.mktemp("stages")
    dataset = write_dataset(folder / "source")
    content = recipe(
        dataset.path,
        "rl",
        rollout={"engine": "reference", "decode": "sample"},
        objective=OBJECTIVE,
        reward={"item_match": 0.0, "rank_penalty": 0.0, "feedback": 1.0, "ranker": "fake"},
        feedback=str(folder / "log"),
    )
    job = RlJob.model_validate(content)
    made = World(job=job, data=PolicyData.open(job), folder=folder)
    yield made
    for group in made.built:
        group.close()


class FakeRanker:
    """Scores by a hash of history and item; fails every sample from a call on, and the first sample of one call."""

    def __init__(self, fails_from: int = 10**6, *, broken_call: int = 0) -> None:
        self.calls = 0
        self.fails_from = fails_from
        self.broken_call = broken_call

    def __call__(self, call: ScoreCall, deadline_s: float) -> BatchScores:
        self.calls += 1
        if self.calls >= self.fails_from:
            return BatchScores.failed(len(call), RewardFailure.BAD_REQUEST)
        pairs = zip(call.histories(), call.candidates(), strict=True)
        scores = [((items * 7919 + int(history.sum())) % 31).astype(np.float32) for history, items in pairs]
        failure_N = np.full(len(call), "", "U16")
        if self.calls == self.broken_call:
            failure_N[0] = RewardFailure.NON_FINITE.value
        return BatchScores(scores=scores, failure_N=failure_N)


def build(world: World, name: str, *, ranker: FakeRanker | None = None, **arguments: Any) -> RlLoop:
    """A loop on the training rows as a log: every other row has a response."""
    job = world.job
    plain = dataclasses.replace(
        world, job=job.model_copy(update={"reward": job.reward.model_copy(update={"ranker": None})})
    )
    loop = plain.build(name, **arguments)
    world.built[:] = plain.built
    samples = loop.feed.samples
    rows = int(samples.sample_id_N.max()) + 1
    item_N = np.zeros(rows, np.int32)
    item_N[samples.sample_id_N] = samples.target_N
    loop.job = job
    loop.feedback = Anchors(
        item_N=item_N,
        response_N=(np.arange(rows) % 2).astype(np.float32),
        logp0_N=np.full(rows, -3.0, np.float32),
        policy_version_N=np.full(rows, "v0"),
    )
    loop.rewards = RewardScorer(job.reward, RewardClient(ranker or FakeRanker(), job.reward, sleep=lambda _: None))
    return loop


def test_every_stage_tells_its_metrics(world: World) -> None:
    loop = build(world, "every")
    assert loop.run() == "max_steps"
    for step in (1, 2, 3):
        metrics = host_of(loop).steps[step]
        for name in (
            "gate/open",
            "gate/hard",
            "gate/head",
            "gate/tail",
            "anchor/weight_mean",
            "anchor/effective_size",
            "anchor/not_legal",
            "anchor/retired",
            "reward/with_feedback",
            "tempering/mean",
            "window/mass/0",
            "truncation/mean",
            "advantage/sum",
            "groups/live_share",
        ):
            assert np.isfinite(metrics[name]), name
        # The ground truth and the anchor of every group, beside seven or eight rollouts.
        assert 0.1 < metrics["policy_gap/given_share"] < 0.25
        assert metrics["policy_gap/max"] < 1e-4
        assert metrics["truncation/mean"] == pytest.approx(1, abs=1e-3)
        assert metrics["groups/members"] == pytest.approx(8, abs=0.5)
    assert loop.state.anchor_log_mean is not None


def test_anchors_of_retired_items_train_and_the_engine_never_shows_them(world: World) -> None:
    shown = [prompt.target for prompt in item_feed(world.job, world.data, None).next().prompts]
    retired = np.unique(shown[:4])
    data = dataclasses.replace(world.data, catalogue=world.data.catalogue.retire(retired))
    limits = world.job.limits.model_copy(update={"max_steps": 1})
    loop = build(dataclasses.replace(world, data=data), "retired", limits=limits)
    assert loop.rollouts is not None
    generate, generated = loop.rollouts.generate, []

    def kept(prompts: Sequence[Prompt], spec: DecodeSpec) -> Groups:
        generated.append(generate(prompts, spec))
        return generated[-1]

    loop.rollouts.generate = kept  # type: ignore[method-assign]
    loop.run()
    metrics = host_of(loop).steps[1]
    assert metrics["anchor/retired"] == np.isin(shown, retired).sum() >= 4
    assert metrics["anchor/count"] + metrics["anchor/not_legal"] == len(shown)
    assert metrics["policy_gap/max"] < 1e-4
    assert metrics["grad_norm"] > 0
    assert not np.isin(retired, np.concatenate([groups.item_PG.reshape(-1) for groups in generated])).any()


def test_a_wrong_score_of_an_anchor_sounds_the_alarm(world: World) -> None:
    loop = build(world, "wrong")
    assert loop.rollouts is not None
    generate = loop.rollouts.generate

    def wrong(prompts: Sequence[Prompt], spec: DecodeSpec) -> Groups:
        groups = generate(prompts, spec)
        if groups.scored_logp_PMT is None:  # an evaluation
            return groups
        assert all(1 <= len(prompt.scored_items) <= 2 for prompt in prompts)
        return dataclasses.replace(groups, scored_logp_PMT=groups.scored_logp_PMT - 0.01)

    loop.rollouts.generate = wrong  # type: ignore[method-assign]
    with pytest.raises(GapAlarm, match="policy gap of step 1"):
        loop.run()


def test_a_beam_read_as_a_list_trains(world: World) -> None:
    content = world.job.model_dump(mode="json") | {
        "objective": {"credit": {"kind": "beam_as_list"}},
        "reward": {"item_match": 0.0, "rank_penalty": 0.0},
        "feedback": None,
        "limits": {"max_steps": 1},
    }
    content["rollout"]["decode"] = "beam"
    plain = dataclasses.replace(world, job=RlJob.model_validate(content | {"reward": {"rank_penalty": 0.0}}))
    loop = plain.build("beam")
    scored = {"ranker": "fake", "ranker_score": 1.0, "ranker_transform": "sigmoid"}
    loop.job = RlJob.model_validate(content | {"reward": content["reward"] | scored})
    loop.rewards = RewardScorer(loop.job.reward, RewardClient(FakeRanker(), loop.job.reward, sleep=lambda _: None))
    loop.run()
    metrics = host_of(loop).steps[1]
    assert metrics["credit/no_signal_share"] == 0
    assert metrics["groups/live_share"] == 1
    assert metrics["advantage/abs_mean"] > 0.1
    assert metrics["grad_norm"] > 0


def test_the_stages_have_a_phase_of_their_own(world: World) -> None:
    loop = build(world, "phases", limits=world.job.limits.model_copy(update={"max_steps": 1}))
    told: dict[str, float] = {}
    loop.host.log = lambda step, metrics: told.update(metrics)  # type: ignore[method-assign]
    loop.run()
    assert {"time/rollout", "time/reward", "time/score", "time/objective", "time/update", "time/push"} <= told.keys()
    assert 0 < told["time/objective"] < told["time/step"]


def test_a_restart_continues_to_the_bit_with_the_moving_mean(world: World) -> None:
    whole = build(world, "whole")
    whole.run()
    expected, steps = weights(whole, world.folder / "whole-hf"), host_of(whole).steps
    kept: RunState = host_of(whole).saved[1]
    assert kept.anchor_log_mean is not None
    again = build(world, "again", state=kept, load=world.folder / "whole" / "state-1")
    again.run()
    assert weights(again, world.folder / "again-hf") == expected
    for step in (2, 3):
        assert host_of(again).steps[step] == steps[step]


def test_a_gate_without_scores_stops_the_run_after_a_checkpoint(world: World) -> None:
    # Two calls a step: the reward's, then the gate's; the second step's gate is the fourth.
    loop = build(world, "silent", ranker=FakeRanker(fails_from=4))
    with pytest.raises(RunError, match=r"step 2: the gate has no ranker scores for 8 of 8 prompts \(bad_request\)"):
        loop.run()
    assert 1 in host_of(loop).saved


def test_a_prompt_that_the_gate_has_no_scores_for_is_masked_and_counted_by_its_reason(world: World) -> None:
    limits = world.job.limits.model_copy(update={"max_steps": 1})
    loop = build(world, "partly", ranker=FakeRanker(broken_call=2), limits=limits)
    loop.run()
    metrics = host_of(loop).steps[1]
    assert metrics["gate_fail/non_finite"] == 1
    assert metrics["gate_fail/timeout"] == 0
    assert metrics["reward_fail/non_finite"] == 0
    assert metrics["groups/scored_share"] == pytest.approx(7 / 8)
