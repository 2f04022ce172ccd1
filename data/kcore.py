"""k-core: the largest part of the interactions in which every user and every item has at least k events.

It works on the user buckets of an import, one at a time, so that only counts per item are held for the whole dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from data.records import BoolArray

Pairs = tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]
"""User numbers (dense within the bucket) and item numbers of one bucket's events. All events of a user lie in one
bucket."""


def alive_events(pairs: Pairs, alive_items: BoolArray, user_core: int) -> BoolArray:
    """Events of one bucket that stay, given the items that stay."""
    user, item = pairs
    kept = alive_items[item]
    if len(user) == 0:
        return kept
    enough = np.bincount(user[kept], minlength=int(user.max()) + 1) >= user_core
    return kept & enough[user]


def core_items(buckets: Callable[[], Iterable[Pairs]], n_items: int, user_core: int, item_core: int) -> BoolArray:
    """[n_items] items of the (user_core, item_core)-core; `alive_events` then gives the events.

    Repeats until nothing changes: users below `user_core` events go, then items below `item_core`.
    """
    alive = np.ones(n_items, bool)
    while True:
        count = np.zeros(n_items, np.int64)
        for pairs in buckets():
            kept = alive_events(pairs, alive, user_core)
            count += np.bincount(pairs[1][kept], minlength=n_items)
        still = alive & (count >= item_core)
        if np.array_equal(still, alive):
            return alive
        alive = still
