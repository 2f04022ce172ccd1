"""Contract: candidates are the target and permitted others, or the best beams, the same whatever else is scored; scores
are the sums of the scorer's log-probabilities; files come back as written and give the correlations; foreign ones are
refused.

Not checked here: real engines' `score` (tests/rollout), the correlations (tests/reward/test_checkpoint_correlation.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data.catalogue import Catalogue
from data.codes import Codes, OnCollision
from data.errors import RequestError
from data.prompts import PromptBuilder
from data.records import NO_ITEM, FloatArray, IntArray, Prompt
from reward.checkpoint_correlation import correlate
from tests.data.tiny import samples
from trainer.row_scores import (
    RowScores,
    beam_candidates,
    random_candidates,
    read_run_scores,
    score_rows,
    write_row_scores,
)
from trainer.run_settings import NegativeSource

RANDOM = NegativeSource.RANDOM
CATALOGUE = Catalogue.from_codes([[item // 4, item % 4] for item in range(12)]).retire([11])


class TokenScorer:
    """A scorer that gives each token minus its id."""

    def score(self, prompts: Sequence[IntArray], completions: Sequence[IntArray]) -> list[FloatArray]:
        assert len(prompts) == len(completions)
        return [-tokens.astype(np.float32) for tokens in completions]


def prompts(targets: Sequence[int]) -> list[Prompt]:
    builder = PromptBuilder(CATALOGUE, history=5, exclude_seen=True, max_prompt_tokens=32)
    return builder.build(samples([[0, 1, 2]] * len(targets), list(targets))).prompts


def test_random_candidates_are_permitted_distinct_and_fixed() -> None:
    for prompt in prompts([5, 6, 7]):
        found = random_candidates(prompt, CATALOGUE, 4, seed=3)
        assert found is not None
        assert found[0] == prompt.target
        assert len(set(found.tolist())) == 5
        assert not set(found.tolist()) & {0, 1, 2, 11}
        np.testing.assert_array_equal(found, random_candidates(prompt, CATALOGUE, 4, seed=3))
    # Seen, retired, and more negatives than there are.
    assert random_candidates(prompts([1])[0], CATALOGUE, 4, seed=3) is None
    assert random_candidates(prompts([11])[0], CATALOGUE, 4, seed=3) is None
    assert random_candidates(prompts([5])[0], CATALOGUE, 7, seed=3) is not None
    assert random_candidates(prompts([5])[0], CATALOGUE, 8, seed=3) is None


def test_candidates_are_the_best_beams_and_never_of_the_targets_path() -> None:
    beams = np.array([7, NO_ITEM, 5, 3, 9], np.int32)
    found = beam_candidates(prompts([5])[0], beams, CATALOGUE, 2)
    assert found is not None
    assert found.tolist() == [5, 7, 3]
    assert beam_candidates(prompts([5])[0], beams, CATALOGUE, 4) is None
    assert beam_candidates(prompts([1])[0], beams, CATALOGUE, 2) is None
    assert beam_candidates(prompts([11])[0], beams, CATALOGUE, 2) is None
    shared = Catalogue.from_codes(Codes.from_lists([[0], [0], [1], [2]], on_collision=OnCollision.SHARE))
    prompt = (
        PromptBuilder(shared, history=5, exclude_seen=False, max_prompt_tokens=32).build(samples([[2]], [1])).prompts
    )
    found = random_candidates(prompt[0], shared, 2, seed=0)
    assert found is not None
    assert sorted(found.tolist()) == [1, 2, 3]
    found = beam_candidates(prompt[0], np.array([0, 2, 3], np.int32), shared, 2)
    assert found is not None
    assert found.tolist() == [1, 2, 3]


def test_scores_are_sums_and_do_not_depend_on_the_batch() -> None:
    asked = prompts([5, 1, 6, 11, 7])
    drawn = [random_candidates(prompt, CATALOGUE, 3, seed=0) for prompt in asked]
    found = score_rows(TokenScorer(), asked, drawn, CATALOGUE, batch=2)
    assert found.unreachable == 2
    assert found.sample_id_N.tolist() == [0, 2, 4]
    for row, items in enumerate([drawn[0], drawn[2], drawn[4]]):
        assert items is not None
        assert found.score_NM[row].tolist() == [-float(CATALOGUE.tokens(int(item)).sum()) for item in items]
    alone = score_rows(TokenScorer(), asked[2:3], drawn[2:3], CATALOGUE)
    np.testing.assert_array_equal(alone.score_NM[0], found.score_NM[1])
    with pytest.raises(RequestError, match="none of 5 rows"):
        score_rows(TokenScorer(), asked, [None] * 5, CATALOGUE)


def made(better: int) -> RowScores:
    """A checkpoint whose first `better` rows of four rank the target first."""
    score = np.tile(np.arange(4.0, dtype=np.float32), (4, 1))
    score[:better, 0] = 9
    return RowScores(sample_id_N=np.arange(4), user_id_N=np.arange(4, dtype=np.int32), score_NM=score, unreachable=1)


def test_files_come_back_and_give_correlations(tmp_path: Path) -> None:
    for step, better in enumerate((0, 2, 3)):
        write_row_scores(tmp_path, f"step-{step:06d}", made(better), {1: better / 4}, source=RANDOM)
    run = read_run_scores(tmp_path)
    assert (run.rows, run.negatives, run.source) == (4, 3, RANDOM)
    found = run.checkpoints
    assert list(found) == ["step-000000", "step-000001", "step-000002"]
    np.testing.assert_array_equal(found["step-000001"].score_NM, made(2).score_NM)
    assert found["step-000001"].positive_NM.sum(1).tolist() == [1] * 4
    assert found["step-000001"].recall == {1: 0.5}
    assert correlate(list(found.values()), 1)["wpauc@1"].spearman == pytest.approx(1)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no NAME\.parquet"):
        read_run_scores(tmp_path)
    write_row_scores(tmp_path, "a", made(1), {}, source=RANDOM)
    write_row_scores(tmp_path, "b", made(1), {}, source=NegativeSource.BEAM)
    with pytest.raises(RequestError, match=r"those of a\.parquet"):
        read_run_scores(tmp_path)
    other = made(1)
    other.sample_id_N[0] = 99
    path = write_row_scores(tmp_path, "b", other, {}, source=RANDOM)
    with pytest.raises(RequestError, match=r"those of a\.parquet"):
        read_run_scores(tmp_path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(RequestError, match="not readable as Parquet"):
        read_run_scores(tmp_path)
