"""Truncated importance sampling: factors per token, item and sequence, the limit, and who has none."""

from __future__ import annotations

import math

import pytest
import torch

from data.records import Kind
from trainer.members import KIND_CODE, PADDING, Members
from trainer.truncation import Truncation, TruncationLevel, truncated_weights, truncation_metrics

SEGMENT = torch.tensor([[[0, 0, 1, PADDING], [0, 0, 0, 0], [0, 0, 0, 0]]])
MEMBERS = Members(
    valid_PG=torch.tensor([[True, True, False]]),
    kind_PG=torch.tensor([[0, KIND_CODE[Kind.ANCHOR], 0]]),
    segment_PGT=SEGMENT,
)
LEARNER = torch.log(torch.tensor([[[2.0, 3.0, 0.5, 9.0], [9.0] * 4, [9.0] * 4]]))
ENGINE = torch.zeros(1, 3, 4)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (TruncationLevel.NONE, [1, 1, 1]),
        (TruncationLevel.TOKEN, [2, 3, 0.5]),
        (TruncationLevel.ITEM, [4, 4, 0.5]),
        (TruncationLevel.SEQUENCE, [3, 3, 3]),
    ],
)
def test_factors_of_a_rollout(level: TruncationLevel, expected: list[float]) -> None:
    truncation = Truncation(level=level, limit=4.0)
    found = truncated_weights(MEMBERS, LEARNER, ENGINE, truncation)
    assert found[0, 0, :3].tolist() == pytest.approx(expected)
    assert found[0, 0, 3] == 1
    assert (found[0, 1:] == 1).all()


def test_equal_policies_give_exactly_one() -> None:
    logp = torch.log_softmax(torch.randn(2, 3, 4), -1)
    whole = Members(
        valid_PG=torch.ones(2, 3, dtype=torch.bool),
        kind_PG=torch.zeros(2, 3, dtype=torch.int64),
        segment_PGT=torch.zeros(2, 3, 4, dtype=torch.int64),
    )
    for level in TruncationLevel:
        assert torch.equal(truncated_weights(whole, logp, logp, Truncation(level=level)), torch.ones(2, 3, 4))


def test_huge_ratios_are_limited_and_counted() -> None:
    truncation = Truncation(level=TruncationLevel.TOKEN)
    factor = truncated_weights(MEMBERS, LEARNER + 2000, ENGINE, truncation)
    assert factor[0, 0, :3].tolist() == [2, 2, 2]
    metrics = truncation_metrics(MEMBERS, factor, truncation)
    assert metrics == {"truncation/mean": 2.0, "truncation/limited_share": 1.0}
    assert math.isfinite(float(factor.sum()))
