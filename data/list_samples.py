"""Moments of users at which a list could have been ranked: a history, and the next events that the list should have.

The events of a user within a split are cut into blocks of m; a block's events are what the prompt before it is asked
for, so every event of the split that has a history is asked for exactly once.

Suffixes: `_N` sample, `_E` event.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.dataset import Dataset
from data.errors import RequestError
from data.records import FloatArray, IntArray, LongArray
from data.schema import SPLIT_NAMES
from data.split import Given, is_target, part_of_events, user_starts


@dataclass(frozen=True, kw_only=True)
class ListSamples:
    """Rows of one split in order of their time (ties: user); history and next events are slices of the events."""

    sample_id_N: LongArray
    """Row number within the split; stable, so it can key random numbers."""
    user_id_N: IntArray
    timestamp_N: LongArray
    """Seconds; time of the first event that is asked for."""
    start_N: LongArray
    """First event of the user."""
    end_N: LongArray
    """End of the history, and first event that is asked for."""
    stop_N: LongArray
    """End of the events that are asked for."""
    item_E: IntArray
    rating_E: FloatArray
    """NaN where the source has no rating."""

    def __len__(self) -> int:
        return len(self.end_N)

    def take(self, rows: npt.NDArray[np.integer]) -> ListSamples:
        """The given rows in the given order; they keep their sample ids."""
        per_row = [f.name for f in dataclasses.fields(self) if f.name.endswith("_N")]
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in per_row})


def list_samples(dataset: Dataset, split: str, block: int) -> ListSamples:
    """The samples of a split, each asking for `block` events, the last one of a user for what is left.

    Raises:
        RequestError: an unknown split, or a dataset that came with its own rows, whose next events nobody knows.
    """
    if split not in SPLIT_NAMES:
        raise RequestError("split", split, " | ".join(SPLIT_NAMES))
    if isinstance(dataset.split, Given):
        raise RequestError(str(dataset.path), "a given split", "interactions of users: lists need a user's next events")
    events = dataset.events
    part_E = part_of_events(events.user_E, events.time_E, dataset.split)
    wanted = np.flatnonzero((part_E == SPLIT_NAMES.index(split)) & is_target(events.user_E))
    user_N = events.user_E[wanted]
    # A user's events of a split are neighbours, so the place among them is the distance from the first.
    place_N = np.arange(len(wanted)) - user_starts(user_N)
    first_N = place_N % block == 0
    end_N = wanted[first_N].astype(np.int64)
    size_N = np.diff(np.append(np.flatnonzero(first_N), len(wanted)))
    order_N = np.argsort(events.time_E[end_N], kind="stable")
    end_N = end_N[order_N]
    return ListSamples(
        sample_id_N=np.arange(len(end_N), dtype=np.int64),
        user_id_N=events.user_E[end_N],
        timestamp_N=events.time_E[end_N],
        start_N=user_starts(events.user_E)[end_N],
        end_N=end_N,
        stop_N=end_N + size_N[order_N],
        item_E=events.item_E,
        rating_E=dataset.rating_E,
    )
