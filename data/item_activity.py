"""How often items were used, as of any moment: counts of events strictly before a time, and within a window before it.

Suffixes: `_E` event, `_N` query.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data.records import IntArray, LongArray


class ItemActivity:
    """Counts over the events of a dataset; an event at the time that is asked for is not counted."""

    def __init__(self, item_E: IntArray, time_E: LongArray, n_items: int) -> None:
        """Args: `item_E`, `time_E` (seconds) in any order; items are 0..n_items-1."""
        self._first = int(time_E.min()) if len(time_E) else 0
        self._span = int(time_E.max()) - self._first + 2 if len(time_E) else 2
        order = np.argsort(time_E, kind="stable")
        self._item_E, self._time_E = item_E[order], time_E[order]
        self._n_items = n_items
        # (item, time) as one number, so that one binary search counts the events of an item before a time.
        self._key_E: LongArray = np.sort(item_E.astype(np.int64) * self._span + (time_E - self._first))

    def _position(self, item_N: npt.NDArray[np.integer], time_N: LongArray) -> LongArray:
        offset_N = np.clip(time_N - self._first, 0, self._span - 1)
        return np.searchsorted(self._key_E, item_N.astype(np.int64) * self._span + offset_N)

    def before(self, item_N: npt.NDArray[np.integer], time_N: LongArray) -> LongArray:
        """int64 [N], events of each item strictly before its time."""
        return self._position(item_N, time_N) - np.searchsorted(self._key_E, item_N.astype(np.int64) * self._span)

    def within(self, item_N: npt.NDArray[np.integer], time_N: LongArray, window_s: int) -> LongArray:
        """int64 [N], events of each item in `[time - window, time)`."""
        return self._position(item_N, time_N) - self._position(item_N, time_N - window_s)

    def busiest(self, time_N: LongArray, window_s: int) -> LongArray:
        """int64 [N], the largest `within` that any item has at each time.

        One sweep through the events and the distinct times; the largest count is known at every moment, because it
        changes by one and the number of items at each count is kept.
        """
        unique_U, row_N = np.unique(time_N, return_inverse=True)
        stop_U = np.searchsorted(self._time_E, unique_U).tolist()
        start_U = np.searchsorted(self._time_E, unique_U - window_s).tolist()
        items = self._item_E.tolist()
        count_I = [0] * self._n_items
        items_at = [self._n_items] + [0] * (len(items) + 1)
        entered = left = top = 0
        largest = []
        for start, stop in zip(start_U, stop_U, strict=True):
            for item in items[entered:stop]:
                items_at[count_I[item]] -= 1
                count_I[item] += 1
                items_at[count_I[item]] += 1
                top = max(top, count_I[item])
            for item in items[left:start]:
                items_at[count_I[item]] -= 1
                count_I[item] -= 1
                items_at[count_I[item]] += 1
                top -= items_at[top] == 0
            entered, left = stop, start
            largest.append(top)
        return np.asarray(largest, dtype=np.int64)[row_N.reshape(-1)]
