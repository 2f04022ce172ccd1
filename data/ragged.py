"""Rows of different lengths in one array: row n is `values[start_N[n]:start_N[n] + length_N[n]]`. Pure NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from data.records import BoolArray, LongArray

Value = TypeVar("Value", bound=np.generic)


def positions(start_N: npt.NDArray[np.integer], length_N: npt.NDArray[np.integer]) -> LongArray:
    """Where the values of the rows lie, one row after the other."""
    length_N = length_N.astype(np.int64)
    skipped_N = np.cumsum(length_N) - length_N
    position_E: LongArray = np.arange(int(length_N.sum())) + np.repeat(start_N - skipped_N, length_N)
    return position_E


def bounds(length_N: npt.NDArray[np.integer]) -> LongArray:
    """[N + 1]; row n of rows that lie one after the other is `bounds[n]:bounds[n + 1]`."""
    return np.concatenate([[0], np.cumsum(length_N, dtype=np.int64)])


def kept_lengths(length_N: npt.NDArray[np.integer], kept_E: BoolArray) -> LongArray:
    """Lengths of the rows that lie one after the other once the values that are not kept are taken out."""
    kept = np.concatenate([[0], np.cumsum(kept_E, dtype=np.int64)])
    edges = bounds(length_N)
    lengths: LongArray = kept[edges[1:]] - kept[edges[:-1]]
    return lengths


def split(values_E: npt.NDArray[Value], length_N: npt.NDArray[np.integer]) -> Sequence[npt.NDArray[Value]]:
    """The rows, as views."""
    edges = bounds(length_N).tolist()
    return [values_E[begin:end] for begin, end in itertools.pairwise(edges)]
