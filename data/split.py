"""Which event is a target of which split: chronological by target time, or leave one out.

Events are ordered by user, then time, then source order. A target is an event with at least one event of its user
before it; its history is all of those. The validation boundary is what everything that is learned stays before:

- chronological: a moment. Events (and targets) earlier than `valid_from` belong to training. The moments are chosen so
  that 8:1:1 of the *targets* fall in the three parts; targets of the same second are never divided, so with coarse
  clocks the shares deviate from 8:1:1 rather than the boundary leaking.
- leave one out: per user, the last event is the test target and the one before it the validation target, for users
  with three events or more; all events of the others belong to training.

Suffix `_E`: events of a dataset.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from data.errors import RequestError
from data.records import BoolArray, LongArray
from data.settings import Settings

Longs = npt.NDArray[np.integer]


class Chronological(Settings):
    """Global split in time, 8:1:1 by target time unless told otherwise."""

    kind: Literal["chronological"] = "chronological"
    valid_from: int
    """First second of validation."""
    test_from: int = Field()
    """First second of test."""


class LeaveOneOut(Settings):
    """Last event of each user for test, the one before for validation."""

    kind: Literal["leave_one_out"] = "leave_one_out"


class Given(Settings):
    """Rows published as they are, in splits/*.parquet."""

    kind: Literal["given"] = "given"


Split = Chronological | LeaveOneOut | Given


def chronological(target_time: Longs, ratios: tuple[float, float, float]) -> Chronological:
    """Choose the two boundaries from the times of all targets.

    Raises:
        RequestError: one of the three parts would be empty.
    """
    total = sum(ratios)
    legal = "at least one target time for each of train, valid and test; or --split leave_one_out"
    if len(target_time) < 3:
        raise RequestError("split", f"{len(target_time)} targets", legal)
    first = round(len(target_time) * ratios[0] / total)
    second = round(len(target_time) * (ratios[0] + ratios[1]) / total)
    first = min(max(first, 1), len(target_time) - 2)
    second = min(max(second, first + 1), len(target_time) - 1)
    ordered = np.partition(target_time, (first, second))
    split = Chronological(valid_from=int(ordered[first]), test_from=int(ordered[second]))
    sizes = [int(size) for size in _part_sizes(target_time, split)]
    if 0 in sizes:
        raise RequestError("split", f"targets per part {sizes}, because too many share one time", legal)
    return split


def _part_sizes(target_time: Longs, split: Chronological) -> tuple[int, int, int]:
    train = int((target_time < split.valid_from).sum())
    test = int((target_time >= split.test_from).sum())
    return train, len(target_time) - train - test, test


def user_starts(user_E: Longs) -> LongArray:
    """[E] index of the first event of each event's user, for events ordered by user."""
    if len(user_E) == 0:
        return np.zeros(0, np.int64)
    first_E = np.concatenate([[True], user_E[1:] != user_E[:-1]])
    return np.maximum.accumulate(np.where(first_E, np.arange(len(user_E)), 0)).astype(np.int64)


def user_ends(user_E: Longs) -> LongArray:
    """[E] index after the last event of each event's user."""
    return (len(user_E) - user_starts(user_E[::-1]))[::-1]


def part_of_events(user_E: Longs, time_E: Longs, split: Chronological | LeaveOneOut) -> npt.NDArray[np.int8]:
    """[E] 0 for events before the validation boundary, 1 for validation, 2 for test."""
    if isinstance(split, Chronological):
        return (time_E >= split.valid_from).astype(np.int8) + (time_E >= split.test_from).astype(np.int8)
    end_E = user_ends(user_E)
    long_E = end_E - user_starts(user_E) >= 3
    from_end_E = end_E - np.arange(len(user_E))
    return np.where(long_E & (from_end_E <= 2), 3 - from_end_E, 0).astype(np.int8)


def is_target(user_E: Longs) -> BoolArray:
    """[E] true for events that have a history."""
    return np.asarray(np.arange(len(user_E)) > user_starts(user_E))
