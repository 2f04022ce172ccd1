"""Contract: learners as Ray actors give what one learner in this process gives; errors and deaths come up as told.

Two ranks, ZeRO-2, float32, in actors; also the learner's side of the weight channel and the schedule. Not here: other
stages and types (test_learner.py), engines (tests/rollout).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from data.errors import RunError
from data.trie import ItemTrie
from rollout.placement import Placement
from rollout.probe import Probe, probe_gap
from rollout.receiving import PushMessage
from tests.requirements import require
from tests.trainer.learner_world import make_completions, make_constraint, make_inputs, save_model
from tests.trainer.rank_process import sft_rows
from trainer.learner import Learner
from trainer.learner_group import LearnerGroup
from trainer.rank_group import RankActor
from trainer.ranks import RankPlace
from trainer.settings import LearnerSettings


class TrieOnly:
    """A catalogue of which the learner needs the trie."""

    def trie(self) -> ItemTrie:
        return make_constraint().trie


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def groups(model: Path) -> Iterator[tuple[LearnerGroup, LearnerGroup]]:
    require("ray")
    require("deepspeed")
    import ray

    common = {"row_tokens": 64, "token_budget": 128, "dtype": "float32", "device": "cpu", "threads": 1, "lr": 1e-3}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        actors = LearnerGroup.start(
            LearnerSettings.model_validate(common | {"ranks": 2}), model, TrieOnly(), 0, 10, reference_dir=model
        )
        local = LearnerGroup.local(
            LearnerSettings.model_validate(common), model, make_constraint(), 0, 10, reference_dir=model
        )
        yield actors, local
        actors.close()
        local.close()
    finally:
        ray.shutdown()


def test_actors_equal_the_local_learner(groups: tuple[LearnerGroup, LearnerGroup]) -> None:
    actors, local = groups
    completions = make_completions()
    for step in range(2):
        inputs = make_inputs(completions, seed=step)
        found, exact = actors.update(completions, inputs), local.update(completions, inputs)
        assert found.keys() == exact.keys()
        for name, value in exact.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        found, exact = actors.update_sft(sft_rows()), local.update_sft(sft_rows())
        assert found == pytest.approx(exact, rel=1e-4)
    scores, expected = actors.score(completions, 0.7), local.score(completions, 0.7)
    np.testing.assert_allclose(scores.logp_PGT, expected.logp_PGT, atol=1e-4)
    assert scores.ref_logp_PGT is not None
    assert np.abs(scores.ref_logp_PGT - scores.logp_PGT).max() > 1e-3  # the reference stayed where it was
    assert actors.evaluate_nll(sft_rows()) == pytest.approx(local.evaluate_nll(sft_rows()), rel=1e-4)
    assert actors.step == local.step == 4


class Refusing(RankActor):
    """A rank that does not come up."""

    def make(self, arguments: dict[str, Any], place: RankPlace) -> Any:
        raise RunError(f"rank {place.rank}: no such model")


def test_ranks_that_do_not_come_up_give_their_room_back(groups: tuple[LearnerGroup, LearnerGroup]) -> None:
    """The learners of the fixture hold two of the four CPUs: there is room for two ranks, once."""
    settings = LearnerSettings.model_validate({"ranks": 2, "device": "cpu", "threads": 1})
    for _ in range(2):
        with pytest.raises(RunError, match="no such model"):
            LearnerGroup.start_ranks(settings, Refusing, {}, Placement(deadline_s=20.0))


def test_source_of_the_weight_channel(groups: tuple[LearnerGroup, LearnerGroup]) -> None:
    rng = np.random.default_rng(0)
    probe = Probe(
        prompts=tuple(rng.integers(4, 44, n).astype(np.int32) for n in (3, 90)),
        completions=tuple(rng.integers(4, 44, 5).astype(np.int32) for _ in range(2)),
    )
    answers = [group.source.submit("answer_probe", probe).result(timeout=60) for group in groups]
    assert answers[0].noise is None
    noises = [group.source.submit("probe_noise", probe).result(timeout=60) for group in groups]
    # Roundings of two orders of summation; how many of them show is the processor's.
    for noise in noises:
        assert 0 < noise.mean <= noise.max < 2e-5
    assert probe_gap(answers[0].logp, answers[1].logp).max < 1e-4
    described = [group.source.submit("describe_weights").result(timeout=60) for group in groups]
    assert described[0] == described[1]
    assert described[0][1] == {"lm_head.weight": "model.embed_tokens.weight"}


class FailingOutbox:
    """Takes one tensor and fails."""

    def send(self, message: object, tensors: Iterator[tuple[str, Tensor]]) -> None:
        self.first = next(tensors)[0]
        raise ValueError("half way")

    def close(self) -> None:
        """Nothing to free."""


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_travel_in_order_and_a_failed_push_gathers_to_the_end(
    model: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    require("deepspeed")
    settings = LearnerSettings.model_validate({"dtype": "float32", "device": "cpu", "threads": 1, "zero_stage": stage})
    learner = Learner(settings, model, make_constraint())
    names = [spec.name for spec in learner.describe_weights()[0]]
    exact = AutoModelForCausalLM.from_pretrained(model).state_dict()
    found = dict(learner._travelling())
    assert list(found) == names
    assert all(torch.equal(found[name], exact[name]) for name in names)
    gathered: list[str] = []
    whole = learner._whole

    def counted(parameter: torch.nn.Parameter) -> Tensor:
        gathered.append("one")
        return whole(parameter)

    monkeypatch.setattr(learner, "_whole", counted)
    outbox = FailingOutbox()
    monkeypatch.setattr(learner, "_outbox", outbox)
    with pytest.raises(ValueError, match="half way"):
        learner.send_push(cast(PushMessage, None))
    assert outbox.first == names[0]
    assert len(gathered) == len(names)
    learner.close()


def test_failure_of_a_rank_comes_up(groups: tuple[LearnerGroup, LearnerGroup]) -> None:
    completions = make_completions()
    inputs = make_inputs(completions)
    inputs.advantage_PGT[0, 0, 0] = np.nan
    with pytest.raises(RunError, match="stopped before the step"):
        groups[0].update(completions, inputs)
