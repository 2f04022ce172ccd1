"""Candidate sets of ranked lists: what a set must be, and how the items that nobody asked for are chosen.

Two items of one token path are one answer to the model, so a set holds every path once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data.catalogue import Catalogue
from data.errors import RequestError
from data.records import NO_ITEM, BoolArray, IntArray

Retriever = Callable[[Sequence[IntArray], int], IntArray]
"""From N histories and a number to item ids `[N, number]`, best first, padded with `NO_ITEM`."""


def check_candidates(
    where: str, candidates: IntArray, path_id_I: IntArray, *, least: int = 1, most: int | None = None
) -> None:
    """Refuse a set that no list can be made of.

    Args:
        where: what the set belongs to.
        path_id_I: `Catalogue.active_path_id`, `NO_ITEM` for items that may not be generated.
        least: items of the list.
        most: largest set that the request allows.

    Raises:
        RequestError: a set that is empty, too small or too large, or an item that is unknown, retired, there twice, or
            not to be told from another one.
    """
    legal = f"{least} or more different items of the catalogue" + (f", at most {most}" if most else "")
    where = f"{where}: candidates"
    if not least <= len(candidates) <= (most or len(candidates)) or not len(candidates):
        raise RequestError(where, f"{len(candidates)} items", legal)
    outside = (candidates < 0) | (candidates >= len(path_id_I))
    if outside.any():
        raise RequestError(where, f"unknown item {candidates[outside][0]}", f"0 to {len(path_id_I) - 1}")
    path_C = path_id_I[candidates]
    if (path_C == NO_ITEM).any():
        raise RequestError(where, f"retired item {candidates[path_C == NO_ITEM][0]}", legal)
    first, row, count = np.unique(path_C, return_inverse=True, return_counts=True)
    if len(first) < len(path_C):
        twice = candidates[count[row] > 1]
        twice = twice[path_C[count[row] > 1] == path_C[count[row] > 1][0]]
        same = "twice" if len(set(twice.tolist())) == 1 else f"and item {twice[1]}, which has the same path"
        raise RequestError(where, f"item {twice[0]} {same}", legal)


class Filled(NamedTuple):
    """A candidate set."""

    item_C: IntArray
    """In the order of the prompt; fewer than asked for where the catalogue has no more."""
    short: int
    """Items that the retriever did not have and chance filled."""


class CandidateFiller:
    """Fills sets with items of different paths, by chance or from a ranked list; a pure function of its arguments."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._path_id_I = catalogue.active_path_id
        active = np.flatnonzero(self._path_id_I != NO_ITEM)
        _, first = np.unique(self._path_id_I[active], return_index=True)
        self._pool = active[np.sort(first)].astype(np.int32)
        """One active item of every path."""

    def fill(
        self, wanted: IntArray, size: int, banned: IntArray, ranked: IntArray | None, seed: Sequence[int]
    ) -> Filled:
        """A set of `size` items with the wanted ones in it, in random order.

        Args:
            wanted: active items of different paths, at most `size`.
            banned: items that may not be added.
            ranked: items to add in their order, then chance fills; none for chance alone.
            seed: keys the random numbers.
        """
        generator = np.random.default_rng(list(seed))
        taken = set(self._path_id_I[wanted].tolist()) | set(self._path_id_I[banned].tolist())
        added: list[int] = []
        for item in () if ranked is None else ranked[ranked != NO_ITEM].tolist():
            path = int(self._path_id_I[item])
            if len(wanted) + len(added) == size:
                break
            if path != NO_ITEM and path not in taken:
                taken.add(path)
                added.append(item)
        missing = size - len(wanted) - len(added)
        if missing:
            added += self._drawn(missing, taken, generator)
        item_C = np.concatenate([wanted, np.asarray(added, dtype=np.int32)]).astype(np.int32)
        return Filled(generator.permutation(item_C), missing if ranked is not None else 0)

    def _drawn(self, count: int, taken: set[int], generator: np.random.Generator) -> list[int]:
        """Up to `count` different items of the pool whose paths are not taken."""
        pool = self._pool
        if count + len(taken) > len(pool) // 2:
            free: BoolArray = ~np.isin(self._path_id_I[pool], list(taken))
            drawn: list[int] = generator.permutation(pool[free])[:count].tolist()
            return drawn
        drawn = []
        while len(drawn) < count:  # at least every second draw is new
            item = int(pool[generator.integers(len(pool))])
            path = int(self._path_id_I[item])
            if path not in taken:
                taken.add(path)
                drawn.append(item)
        return drawn
