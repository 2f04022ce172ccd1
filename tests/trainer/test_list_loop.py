"""The RL loop on ranked lists in one process: items of unequal path length, two needs, feedback seen in part, a critic.

Checks that the coefficients that reach the learner are those of a plain loop over the items, their swaps and their
tokens, with multipliers; that a restart continues to the bit, also with lists that wait for their step; that lists are
valid, engine and learner agree and metrics are told; that failed estimates mask their prompts and too many stop the
run; credit by evaluation; and the supervised rows. The critic is a fake. The fleet and Ray Serve:
tests/launch/test_list_job.py.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from data.codes import Codes, codes_path
from data.dataset import Dataset
from data.errors import RequestError, RunError
from data.records import IntArray, Prompt, RewardFailure
from reward.batch_scoring import BatchScores
from reward.client import RewardClient
from reward.wire import ScoreCall
from tests.requirements import require
from tests.small_world import recipe, write_dataset
from tests.trainer.loop_world import World, host_of, stale, weights
from trainer.collection import Batch
from trainer.jobs import RlJob, SftJob
from trainer.list_jobs import ideal_rows
from trainer.losses import UpdateInputs
from trainer.objective_settings import Ratio
from trainer.policy_data import PolicyData

LISTS: dict[str, Any] = {
    "needs": [{"name": "trend"}, {"name": "niche"}, {"name": "interest"}],
    "held_out": "interest",
    "candidates": 6,
    "positives": 3,
    "feedback": 0.6,
    "critic_users": 0.2,
    "seed": 2,
}
UNCERTAIN = {"kind": "items", "ndcg_weight": 0.5, "uncertainty": {"variance": "item", "eps": 0.05}}


def write_uneven(dataset: Dataset) -> None:
    """Paths of one to three codes, none of which begins another one."""
    paths = [[[item], [item, item % 3], [item, 0, item % 5]][item % 3] for item in range(dataset.n_items)]
    codes = Codes.from_lists(paths, provenance={"fingerprint": dataset.fingerprint})
    codes.save(codes_path(dataset.path, "uneven"))


def content(dataset: Dataset, job: str, **sections: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "data": {"codes": "uneven", "max_prompt_tokens": 48},
        "lists": LISTS,
        "learner": {"row_tokens": 96},
        "rollout": {"engine": "reference", "decode": "sample", "width": 4, "max_model_len": 96},
        "evaluation": {"k": [1, 5], "metric": "ndcg@5", "rows": 6},
    }
    for name, value in sections.items():
        common[name] = common.get(name, {}) | value if isinstance(value, dict) else value
    return recipe(dataset.path, job, **common)


class FakeCritic:
    """Means and variances by a hash of history and item; fails the first samples of a call from a call on."""

    def __init__(self, fails_from: int = 10**6, failing: int = 0) -> None:
        self.calls = 0
        self.fails_from = fails_from
        self.failing = failing

    def __call__(self, call: ScoreCall, deadline_s: float) -> BatchScores:
        self.calls += 1
        keys = [
            items * 31 + int(history.sum()) for history, items in zip(call.histories(), call.candidates(), strict=True)
        ]
        failure_N = np.full(len(call), "", "U16")
        if self.calls >= self.fails_from:
            failure_N[: self.failing] = RewardFailure.NON_FINITE.value
        return BatchScores(
            scores=[(key % 7 / 7).astype(np.float32) for key in keys],
            variances=[((key % 5 + 1) / 10).astype(np.float32) for key in keys],
            failure_N=failure_N,
        )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    written = write_dataset(tmp_path_factory.mktemp("list-loop") / "source")
    write_uneven(written)
    return written


@pytest.fixture(scope="module")
def world(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    require("deepspeed")
    made = list_world(dataset, tmp_path_factory.mktemp("list-runs"), credit=UNCERTAIN, ratio="item")
    yield made
    for group in made.built:
        group.close()


def list_world(dataset: Dataset, folder: Any, *, critic: FakeCritic | None = None, **objective: Any) -> World:
    job = RlJob.model_validate(
        content(
            dataset,
            "rl",
            objective=objective,
            reward={"item_match": 0.0, "rank_penalty": 0.0, "ranker": "fake"},
        )
    )
    client = RewardClient(critic or FakeCritic(), job.reward, sleep=lambda _: None)
    return World(job=job, data=PolicyData.open(job), folder=folder, client=client)


def test_advantages_and_multipliers_reach_the_tokens_of_their_items(world: World) -> None:
    limits = world.job.limits.model_copy(update={"max_steps": 1})
    loop = world.build("tokens", limits=limits)
    batches: list[Batch] = []
    inputs: list[UpdateInputs] = []
    roll, update = loop.roll, loop.learners.update

    def recorded(step: int) -> Callable[[], Batch]:
        batches.append(roll(step)())
        return lambda: batches[-1]

    def updated(completions: Any, given: UpdateInputs) -> dict[str, float]:
        inputs.append(given)
        return update(completions, given)

    loop.roll = recorded  # type: ignore[method-assign]
    loop.learners.update = updated  # type: ignore[method-assign]
    loop.run()
    batch, found = batches[0], inputs[0]
    # The tokens of an item share a ratio, so the learner is told which those are.
    assert found.ratio is Ratio.ITEM
    assert found.segment_PGT is not None
    assert batch.scored.groups.segment_PGT is not None
    assert found.segment_PGT.tolist() == batch.scored.groups.segment_PGT.tolist()
    expected = plain_advantages(world, batch, FakeCritic())
    lengths = set()
    for (p, g), by_token in expected.items():
        lengths.add(len(by_token))
        assert found.advantage_PGT[p, g, : len(by_token)] == pytest.approx(by_token, abs=2e-5)
        assert not found.advantage_PGT[p, g, len(by_token) :].any()
    assert len(expected) == batch.scored.groups.valid_PG.sum() == 32
    assert len(lengths) > 3
    assert np.abs(found.advantage_PGT).max() > 0.5


def plain_advantages(world: World, batch: Batch, critic: FakeCritic) -> dict[tuple[int, int], list[float]]:
    """Advantages token by token, from real swaps of plain lists."""
    catalogue = world.data.catalogue
    items_of = batch.scored.groups.item_PGK
    assert items_of is not None
    credit: dict[tuple[int, int, int], float] = {}
    variance: dict[tuple[int, int, int], float] = {}
    for p, prompt in enumerate(batch.prompts):
        gain_of, variance_of = gains(prompt, critic)
        ideal = dcg(sorted(gain_of.values(), reverse=True))
        for g in range(items_of.shape[1]):
            listed = items_of[p, g].tolist()
            assert sorted(listed) == sorted(gain_of)
            values = [gain_of[item] for item in listed]
            for k in range(len(values)):
                later = range(k + 1, len(values))
                swaps = [dcg(values) - dcg(swapped(values, k, j)) for j in later]
                credit[p, g, k] = statistics.fmean(swaps) / ideal if swaps else 0.0
                variance[p, g, k] = variance_of[listed[k]]
    certain = {key: 1 / (value + 0.05) for key, value in variance.items()}
    tokens = {key: len(catalogue.tokens(items_of[key[0], key[1], key[2]])) for key in certain}
    mean = sum(certain[key] * tokens[key] for key in certain) / sum(tokens.values())
    result = {}
    for p in range(len(batch.prompts)):
        for g in range(items_of.shape[1]):
            row: list[float] = []
            for k in range(items_of.shape[2]):
                group = [credit[p, other, k] for other in range(items_of.shape[1])]
                spread = statistics.stdev(group)
                value = (credit[p, g, k] - statistics.fmean(group)) / (spread + 1e-4) if spread > 1e-12 else 0.0
                factor = min(max(certain[p, g, k] / mean, 0.1), 3.0)
                row += [value * factor] * tokens[p, g, k]
            result[p, g] = row
    return result


def gains(prompt: Prompt, critic: FakeCritic) -> tuple[dict[int, float], dict[int, float]]:
    """Gain and variance of every candidate: observed ones have their gain and no variance."""
    assert prompt.candidates is not None
    assert prompt.gain_C is not None
    assert prompt.observed_C is not None
    gain_of, variance_of = {}, {}
    for item, gain, observed in zip(prompt.candidates.tolist(), prompt.gain_C, prompt.observed_C, strict=True):
        call = ScoreCall.pack([prompt.history], [np.array([item], np.int32)])
        told = critic(call, 1.0)
        assert told.variances is not None
        gain_of[item] = float(gain) if observed else float(told.scores[0][0])
        variance_of[item] = 0.0 if observed else float(told.variances[0][0])
    return gain_of, variance_of


def dcg(values: Sequence[float]) -> float:
    return sum(value / math.log2(place + 2) for place, value in enumerate(values))


def swapped(values: Sequence[float], k: int, j: int) -> list[float]:
    row = list(values)
    row[k], row[j] = row[j], row[k]
    return row


def test_a_run_tells_its_metrics_and_continues_to_the_bit(world: World) -> None:
    whole = world.build("whole")
    assert whole.run() == "max_steps"
    steps = host_of(whole).steps
    for step in (1, 2, 3):
        metrics = steps[step]
        assert metrics["policy_gap/max"] < 1e-4
        assert metrics["lists/estimates_failed"] == metrics["credit/not_a_list_share"] == 0
        assert metrics["lists/observed_share"] == pytest.approx(0.6, abs=0.25)
        assert 0 < metrics["legal_mass"] < 1
        assert 0 < metrics["lists/ndcg"] < 1
        assert metrics["groups/live_share"] > 0.5
        assert np.isfinite(metrics["uncertainty/factor"])
        assert metrics["prompts"] == 8
    assert {"ndcg@5", "ndcg@5/trend", "recall@1/niche"} <= set(steps[3])
    assert "ndcg@5/interest" not in steps[3]
    assert steps[3]["invalid@5"] == 0
    expected = weights(whole, world.folder / "whole-hf")
    again = world.build("again", state=host_of(whole).saved[1], load=world.folder / "whole" / "state-1")
    again.run()
    assert weights(again, world.folder / "again-hf") == expected
    assert host_of(again).steps == {step: steps[step] for step in (2, 3)}


def test_lists_collected_ahead_wait_in_checkpoints_with_their_credit(world: World) -> None:
    changes = stale(world, 2)
    whole = world.build("ahead", **changes)
    whole.run()
    steps = host_of(whole).steps
    for step in (1, 2, 3):
        assert steps[step]["weight_version"] == max(step - 3, 0)
        assert steps[step]["truncation/mean"] > 0
    expected = weights(whole, world.folder / "ahead-hf")
    kept = host_of(whole).folder / "state-1"
    assert len(list((kept / "waiting").glob("*.safetensors"))) == 2
    again = world.build("ahead-again", state=host_of(whole).saved[1], load=kept, **changes)
    again.restore(kept)
    again.run()
    assert host_of(again).steps == {step: steps[step] for step in (2, 3)}
    assert weights(again, world.folder / "ahead-again-hf") == expected
    (lost, *_) = (kept / "waiting").glob("*.safetensors")
    lost.write_bytes(b"")
    with pytest.raises(RequestError, match=r"step-00000\d\.safetensors: cannot be read"):
        world.build("ahead-lost", state=host_of(whole).saved[1], load=kept, **changes).restore(kept)


def test_prompts_whose_estimates_failed_are_masked_and_counted(world: World) -> None:
    reward = world.job.reward.model_copy(update={"max_failed_share": 0.3})
    limits = world.job.limits.model_copy(update={"max_steps": 1})
    some = dataclasses.replace(world, client=RewardClient(FakeCritic(1, 2), reward, sleep=lambda _: None))
    loop = some.build("masked", reward=reward, limits=limits)
    loop.run()
    metrics = host_of(loop).steps[1]
    assert metrics["lists/estimates_failed"] == metrics["reward_fail/non_finite"] == 2
    assert metrics["groups/scored_share"] == 0.75
    assert metrics["reward/failed_share"] == 0.25
    world.built[:] = some.built


def test_too_many_failed_estimates_stop_the_run(world: World) -> None:
    many = dataclasses.replace(world, client=RewardClient(FakeCritic(2, 5), world.job.reward, sleep=lambda _: None))
    loop = many.build("stopped")
    with pytest.raises(RunError, match=r"step 2: \d of 8 groups have no reward .\d non_finite"):
        loop.run()
    assert 1 in host_of(loop).saved
    world.built[:] = many.built


class NeighbourRanker:
    """Likes lists whose first items are small."""

    version = "neighbours-1"

    def score_list(self, histories: Sequence[IntArray], lists: Sequence[IntArray]) -> np.ndarray:
        return np.array([float((items / np.arange(1, len(items) + 1)).sum()) for items in lists], np.float32)


class BrokenRanker(NeighbourRanker):
    def score_list(self, histories: Sequence[IntArray], lists: Sequence[IntArray]) -> np.ndarray:
        return np.full(len(lists), np.nan, np.float32)


@pytest.mark.parametrize("name", ["NeighbourRanker", "BrokenRanker"])
def test_a_list_wise_ranker_credits_lists(world: World, name: str) -> None:
    job = world.job
    credit = job.objective.credit.model_copy(
        update={"uncertainty": job.objective.credit.uncertainty.model_copy(update={"variance": "off"})}
    )
    changes = {
        "reward": job.reward.model_copy(
            update={"list_ranker": f"tests.trainer.test_list_loop:{name}", "max_failed_share": 1.0}
        ),
        "objective": job.objective.model_copy(update={"credit": credit}),
        "limits": job.limits.model_copy(update={"max_steps": 1}),
    }
    loop = world.build(f"by-{name}", **changes)
    loop.run()
    metrics = host_of(loop).steps[1]
    # 32 lists of six items and their 15 swaps, of which some are each other.
    assert metrics["swaps/lists"] == 32 * 16
    assert metrics["swaps/scored"] == metrics["swaps/lists"] - metrics["swaps/duplicates"]
    broken = name == "BrokenRanker"
    assert metrics["reward_fail/non_finite"] == (8 if broken else 0)
    assert metrics["groups/scored_share"] == (0 if broken else 1)
    assert (metrics["advantage/abs_mean"] > 0) == (not broken)


def test_supervised_rows_are_prompts_and_the_gains_that_are_seen_in_order(dataset: Dataset) -> None:
    job = SftJob.model_validate(content(dataset, "sft"))
    data = PolicyData.open(job)
    rows = ideal_rows(job, data)
    prompts = {prompt.token_ids.tobytes(): prompt for prompt in rows.feed.prompts}
    epochs = []
    for _ in range(2):
        epochs.append([row for _ in range(rows.feed.batches_per_epoch) for row in rows.feed.next()])
    assert len(epochs[0]) == len(prompts) > 50
    assert rows.left_out["no_gain_seen"] > 0
    for tokens, mask in epochs[0]:
        prompt = prompts.pop(tokens[~mask].astype(np.int32).tobytes())
        assert prompt.candidates is not None
        assert prompt.gain_C is not None
        ranked = [(-gain, place) for place, gain in enumerate(prompt.gain_C.tolist()) if gain > 0]
        listed = [prompt.candidates[place] for _, place in sorted(ranked)]
        assert tokens[mask].tolist() == [t for item in listed for t in data.catalogue.tokens(item).tolist()]
    assert not prompts
    told = [[tokens.tobytes() for tokens, _ in epoch] for epoch in epochs]
    assert told[0] != told[1]
    assert sorted(told[0]) == sorted(told[1])
    again = ideal_rows(job, data).feed
    assert again.load_state_dict(rows.feed.state_dict()) is None
    assert again.next()[0][0].tolist() == rows.feed.next()[0][0].tolist()


def test_feedback_that_hides_every_gain_is_refused(dataset: Dataset) -> None:
    job = SftJob.model_validate(content(dataset, "sft", lists={"feedback": 1e-9}))
    with pytest.raises(RequestError, match=r"lists\.feedback: none of \d+ training prompts has a gain that is seen"):
        ideal_rows(job, PolicyData.open(job))
