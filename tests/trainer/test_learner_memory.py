"""Contract: the peak memory of an update grows with the tokens of trees, not with those of rows.

Two fresh processes take the same kind of update in one micro-batch: 64 groups of 16 completions of 4 tokens behind 250
tokens, and 64 single completions of 64 tokens behind 250, which is a row of 314 tokens each. What the process held
before the update is subtracted. Not here: several micro-batches, which have the peak of the largest; CUDA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.trie_constraint import TrieConstraint
from launch.bench.child import Child, Functions
from launch.bench.models import bench_model
from launch.bench.settings import BenchSettings
from tests.requirements import require
from trainer.trees import Completions

PROMPTS, PROMPT, GROUP, TOKENS = 64, 250, 16, 4


def completions(members: int, tokens: int, vocabulary: int) -> Completions:
    random = np.random.default_rng(0)
    shape = (PROMPTS, members)
    return Completions(
        prompt_tokens=[random.integers(4, vocabulary, PROMPT).astype(np.int32) for _ in range(PROMPTS)],
        token_PGT=random.integers(4, vocabulary, (*shape, tokens)).astype(np.int32),
        length_PG=np.full(shape, tokens, dtype=np.int32),
        valid_PG=np.ones(shape, dtype=np.bool_),
        exclusions=[np.zeros(0, dtype=np.int32)] * PROMPTS,
    )


def build(hf_dir: Path, members: int, tokens: int, checkpointing: bool) -> Functions:
    """A learner in this process; its update learns the likelihood of every completion."""
    from data.catalogue import Catalogue
    from trainer.initial_model import CATALOGUE
    from trainer.learner import Learner
    from trainer.losses import UpdateInputs
    from trainer.settings import LearnerSettings

    catalogue = Catalogue.load(hf_dir / CATALOGUE)
    longest = 16 * (-(-(PROMPT + tokens) // 16))
    content: dict[str, Any] = {"row_tokens": longest, "token_budget": PROMPTS * (PROMPT + GROUP * TOKENS + 16)}
    settings = LearnerSettings(device="cpu", threads=1, activation_checkpointing=checkpointing, **content)
    learner = Learner(settings, hf_dir, TrieConstraint(catalogue.trie(), exclude=True))
    batch = completions(members, tokens, catalogue.vocabulary.size)
    zero = np.zeros(batch.shape, dtype=np.float32)
    inputs = UpdateInputs(
        advantage_PGT=zero,
        old_logp_PGT=zero,
        ref_logp_PGT=None,
        policy_weight_PGT=zero,
        kl_weight_PGT=zero,
        nll_weight_PGT=np.full(batch.shape, 1 / zero.size, dtype=np.float32),
    )
    return {"update": lambda: learner.update(batch, inputs), "rest": lambda: None, "close": learner.close}


def update_mib(hf_dir: Path, members: int, tokens: int, *, checkpointing: bool = False) -> float:
    """Peak of an update above what its process held before."""
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with Child(build, hf_dir, members, tokens, checkpointing, environment=environment) as child:
        child.timer("rest")()
        child.timer("update")()
        return child.peak_mib("update") - child.peak_mib("rest")


@pytest.mark.long
def test_groups_need_hardly_more_than_single_rows() -> None:
    require("deepspeed")
    with bench_model(BenchSettings(model="tiny", levels=TOKENS, threads=1)) as model:
        groups = update_mib(model.hf_dir, GROUP, TOKENS)
        rows = update_mib(model.hf_dir, 1, GROUP * TOKENS)
        lean = update_mib(model.hf_dir, GROUP, TOKENS, checkpointing=True)
    assert rows > 100, "too little to compare"
    assert groups < 1.3 * rows
    assert lean < 0.75 * groups
