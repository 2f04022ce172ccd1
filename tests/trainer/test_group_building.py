"""The RL loop in one process with groups that are built: random negatives, ground truths, refills.

Checks that steps run through the real weight channel, tell their counts and continue to the bit; what the learner is
given. Real processes: tests/launch/test_recipes_train.py. The parts: test_random_negatives.py, test_ground_truth.py,
test_refill.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from data.feed import Feed
from data.records import NO_ITEM
from tests.requirements import require
from tests.small_world import recipe, write_dataset
from tests.trainer.loop_world import World, host_of, weights
from trainer.group_settings import GroupSettings
from trainer.jobs import RlJob
from trainer.loop import RlLoop
from trainer.losses import UpdateInputs
from trainer.objective_settings import ObjectiveSettings
from trainer.policy_data import PolicyData
from trainer.trees import Completions

RANDOM = ObjectiveSettings.model_validate({"window": {"kind": "soft", "anchor_rank": 2, "negatives": "random"}})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    require("deepspeed")
    folder = tmp_path_factory.mktemp("groups")
    dataset = write_dataset(folder / "source")
    content = recipe(
        dataset.path, "rl", rollout={"engine": "reference"}, reward={"item_match": 1.0, "rank_penalty": 0.0}
    )
    job = RlJob.model_validate(content)
    made = World(job=job, data=PolicyData.open(job), folder=folder)
    yield made
    for group in made.built:
        group.close()


def group(**values: Any) -> GroupSettings:
    return GroupSettings.model_validate(values)


def recorded_updates(loop: RlLoop) -> list[tuple[Completions, UpdateInputs]]:
    """What the learner is asked to learn."""
    kept: list[tuple[Completions, UpdateInputs]] = []
    update = loop.learners.update

    def recorded(completions: Completions, inputs: UpdateInputs) -> dict[str, float]:
        kept.append((completions, inputs))
        return update(completions, inputs)

    loop.learners.update = recorded  # type: ignore[method-assign]
    return kept


def test_random_negatives_are_learned_in_place_of_what_missed(world: World) -> None:
    loop = world.build("random", objective=RANDOM)
    updates = recorded_updates(loop)
    assert loop.run() == "max_steps"
    width = world.job.rollout.width
    catalogue = world.data.catalogue
    known = {tuple(catalogue.tokens(item).tolist()) for item in range(catalogue.n_items)}
    seen_hit = False
    for step, (completions, inputs) in enumerate(updates, 1):
        metrics = host_of(loop).steps[step]
        assert metrics["policy_gap/max"] < 1e-4
        assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-5)
        assert metrics["groups/members"] == width
        assert "window/mass/2" in metrics
        weighted_PG: np.ndarray = inputs.policy_weight_PGT.any(-1)
        assert (weighted_PG.sum(1) == width).all()
        assert (inputs.old_logp_PGT[completions.token_mask_PGT] < 0).all()
        negative_PG = weighted_PG.copy()
        negative_PG[:, :width] = False
        tokens = {tuple(path[path >= 0].tolist()) for path in completions.token_PGT[negative_PG]}
        assert tokens <= known
        hit_P = weighted_PG[:, :width].any(1)
        live_P = inputs.advantage_PGT.any((1, 2))
        assert np.array_equal(hit_P, live_P)
        seen_hit = seen_hit or bool(hit_P.any())
    assert seen_hit


@pytest.mark.parametrize("mode", ["append", "inject"])
def test_every_group_has_its_ground_truth(world: World, mode: str) -> None:
    loop = world.build(mode, group=group(ground_truth=mode))
    assert loop.run() == "max_steps"
    width = world.job.rollout.width
    for step in (1, 2, 3):
        metrics = host_of(loop).steps[step]
        assert metrics["reward/hit"] == 1
        joined = metrics["ground_truth/joined"]
        assert 0 < joined < 8
        assert metrics["ground_truth/not_legal"] == 0
        assert metrics["groups/members"] == width + (joined / 8 if mode == "append" else 0)
        assert metrics["groups/live_share"] == 1
        assert metrics["policy_gap/max"] < 1e-4
        assert metrics["completion/absent_share"] == 0


def test_a_refilled_run_counts_and_continues_to_the_bit(world: World) -> None:
    refill = group(refill="oversample", extra_batches=2)
    whole = world.build("whole", group=refill)
    whole.run()
    steps = host_of(whole).steps
    plain = world.build("plain")
    plain.run()
    for step in (1, 2, 3):
        metrics = steps[step]
        assert metrics["refill/extra_prompts"] in (8, 16)
        missing = metrics["refill/missing_groups"]
        assert metrics["groups/zero_variance_share"] == missing / 8
        assert metrics["groups/scored_share"] == 1
        # Beams have the hit once at most, so a group without variance is one without its ground truth.
        assert metrics["groups/no_hit_share"] == metrics["groups/zero_variance_share"]
    assert host_of(plain).steps[1]["groups/no_hit_share"] > 0
    live = [host_of(plain).steps[step]["groups/live_share"] for step in (1, 2, 3)]
    assert steps[1]["groups/live_share"] > live[0]
    assert steps[1]["reward/mean"] == host_of(plain).steps[1]["reward/mean"]
    batches = 3 + sum(steps[step]["refill/extra_prompts"] for step in (1, 2, 3)) / 8
    cursor = whole.state.cursor
    assert cursor["epoch"] * whole.feed.batches_per_epoch + cursor["batch"] == batches
    expected = weights(whole, world.folder / "whole-hf")
    again = world.build("again", state=host_of(whole).saved[1], load=world.folder / "whole" / "state-1", group=refill)
    again.run()
    assert weights(again, world.folder / "again-hf") == expected
    assert host_of(again).steps == {step: steps[step] for step in (2, 3)}


def test_a_step_never_has_a_prompt_twice(world: World) -> None:
    loop = world.build("epochs", group=group(refill="oversample", extra_batches=6))
    # Two batches an epoch, and nobody to hit: all sixteen prompts come, and come again.
    few = dataclasses.replace(loop.feed.samples.take(np.arange(16)), target_N=np.full(16, NO_ITEM, np.int32))
    loop.feed = Feed(few, world.data.builder, 8, world.job.seed, fingerprint="few")
    batch = loop.roll(1)()
    metrics = batch.metrics
    ids = [prompt.prompt_id for prompt in batch.prompts]
    assert len(set(ids)) == len(ids) == 8
    assert batch.scored.groups.prompt_id_P.tolist() == ids
    assert metrics["refill/extra_prompts"] == 8
    assert metrics["refill/missing_groups"] == metrics["refill/dropped_groups"] == 8
    assert metrics["prompts/repeated"] == 6 * 8 - 8
