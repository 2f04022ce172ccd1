"""Contract: dropout acts in supervised steps only, and what it drops depends on (seed, step, rank) alone.

So a learner that continues from a state takes the same steps to the bit, and scores are the policy's. Not checked
here: several ranks, activation checkpointing on CUDA.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.requirements import require
from tests.trainer.learner_world import make_completions, make_constraint, save_model
from trainer.dropout import BranchDropout
from trainer.learner_group import LearnerGroup
from trainer.policy import Policy, load_language_model
from trainer.settings import LearnerSettings
from trainer.trees import lay_out, sequence_pieces

ROWS = [(np.arange(4, 24, dtype=np.int32), np.arange(20) > 0), (np.arange(9, 40, dtype=np.int32), np.arange(31) > 4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def test_hooks_follow_seed_step_and_rank(model: Path) -> None:
    lm = load_language_model(model, torch.float32)
    dropout = BranchDropout(lm, 0.3)
    policy = Policy(lm)
    batch = lay_out(sequence_pieces([(np.arange(4, 20, dtype=np.int32), np.ones(16, dtype=np.bool_))], 16))

    def logits(seed: int, step: int, rank: int) -> torch.Tensor:
        with torch.no_grad(), dropout.applied(seed, step, rank, []):
            found: torch.Tensor = policy(batch)
            return found

    with torch.no_grad():
        plain = policy(batch)
    outside = torch.get_rng_state()
    first = logits(1, 5, 0)
    assert torch.equal(first, logits(1, 5, 0))
    for other in ((2, 5, 0), (1, 6, 0), (1, 5, 1)):
        assert not torch.equal(first, logits(*other))
    assert not torch.equal(first, plain)
    with torch.no_grad():
        assert torch.equal(plain, policy(batch))
    assert torch.equal(outside, torch.get_rng_state())


def test_no_rate_is_no_hook(model: Path) -> None:
    lm = load_language_model(model, torch.float32)
    dropout = BranchDropout(lm, 0.0)
    assert not any(module._forward_hooks for module in lm.modules())
    state = torch.get_rng_state()
    with dropout.applied(0, 0, 0, []):
        torch.rand(3)
    assert not torch.equal(state, torch.get_rng_state())


def test_supervised_steps_continue_to_the_bit(model: Path, tmp_path: Path) -> None:
    require("deepspeed")

    def learner(rate: float) -> LearnerGroup:
        settings = LearnerSettings(
            dtype="float32", device="cpu", row_tokens=64, token_budget=64, lr=1e-2, threads=1, dropout=rate
        )
        return LearnerGroup.local(settings, model, make_constraint(), seed=7)

    whole, cut, plain = learner(0.2), learner(0.2), learner(0.0)
    losses = [whole.update_sft(ROWS)["loss"] for _ in range(3)]
    assert cut.update_sft(ROWS)["loss"] == losses[0] != plain.update_sft(ROWS)["loss"]
    cut.save(tmp_path)
    # A score in between draws nothing.
    completions = make_completions()
    scores = whole.score(completions, 1.0).logp_PGT
    np.testing.assert_array_equal(scores, whole.score(completions, 1.0).logp_PGT)
    resumed = learner(0.2)
    resumed.load(tmp_path)
    assert [resumed.update_sft(ROWS)["loss"] for _ in range(2)] == losses[1:]
    np.testing.assert_array_equal(resumed.score(completions, 1.0).logp_PGT, scores)
    for group in (whole, cut, plain, resumed):
        group.close()
