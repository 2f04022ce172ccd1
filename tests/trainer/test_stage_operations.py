"""Contract: no stage loops over group members in Python: with every stage on, as many tensor operations are called for
a group of any size. Not checked here: the seconds (`windlass bench stages`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.test_composition import ANCHOR, EVERYTHING, GROUP, TOKENS, TRUTH, WHERE, Batch
from trainer.members import Members
from trainer.objective import objective_coefficients
from trainer.objective_settings import ObjectiveSettings


class Counting(TorchDispatchMode):
    """Counts the tensor operations that are called inside."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(objective: ObjectiveSettings, copies: int) -> int:
    """Tensor operations of the stages for groups in which every rollout is there `copies` times."""
    batch = Batch(3, anchored=objective.anchor.mode != "none")
    order = torch.tensor([*range(GROUP)] * copies + [TRUTH, ANCHOR])
    members, valid_PG = batch.members, batch.members.valid_PG
    grown = Members(
        valid_PG=valid_PG[:, order], kind_PG=members.kind_PG[:, order], segment_PGT=members.segment_PGT[:, order]
    )
    reward_PG, signals = batch.reward_PG[:, order], batch.signals.take_members(order)
    with Counting() as counting:
        objective_coefficients(grown, reward_PG, objective, TOKENS, signals=signals)
    return counting.count


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveSettings(),
        EVERYTHING,
        ObjectiveSettings.model_validate(
            {"window": {"kind": "hard", "anchor_rank": 1}, "reward_order": "gdpo", "truncation": {"level": "item"}}
        ),
    ],
    ids=["plain", "everything", "others"],
)
def test_a_larger_group_takes_as_many_operations(objective: ObjectiveSettings) -> None:
    few = operations(objective, 1)
    assert few > 20
    assert operations(objective, 12) == few


def test_a_loop_over_members_is_noticed() -> None:
    looping = EVERYTHING.model_copy(update={"stages": (f"{WHERE}:member_by_member",)})
    assert operations(looping, 12) > operations(looping, 1)
