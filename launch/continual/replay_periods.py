"""A dataset's test split cut into periods by time, each replayed as one day of a feedback log.

The service updates the model once per day of its log. A replay has one update per period, however many days that spans,
so times are moved to a replayed clock: period p is the p-th day from the first event on, and times within it keep their
order. What the model was trained on, and what its checkpoint was chosen by, lies before the test split.

Suffix `_N`: row of the split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.dataset import Dataset, Samples
from data.errors import RequestError
from data.feedback import DAY_SECONDS, day_of
from data.records import LongArray
from data.split import LeaveOneOut


@dataclass(frozen=True, kw_only=True)
class Period:
    """A stretch of time of a dataset."""

    number: int
    """From 1."""
    first: int
    """First second."""
    end: int
    """First second after it."""
    day: str
    """The day of the replayed log that it is."""
    rows: LongArray
    """Its rows of the split, in the order of time."""


def cut(time_N: LongArray, periods: int, unit_days: int) -> list[Period]:
    """Periods of equal length that cover as much of the time as whole units allow, from the first day on.

    Args:
        time_N: times of the rows in seconds, ascending.
        periods: how many.
        unit_days: a period is a whole number of so many days; 7 for weeks.

    Raises:
        RequestError: fewer units than periods, or a period without rows.
    """
    start = int(time_N[0]) // DAY_SECONDS * DAY_SECONDS
    unit = unit_days * DAY_SECONDS
    units = (int(time_N[-1]) - start) // unit + 1
    if units < periods:
        legal = f"at most {units}: the test split spans {units} x {unit_days} days"
        raise RequestError("--periods", periods, legal)
    length = units // periods * unit
    found = []
    for number in range(1, periods + 1):
        first = start + (number - 1) * length
        rows = np.arange(*np.searchsorted(time_N, (first, first + length)), dtype=np.int64)
        if not len(rows):
            found_words = f"period {number} ({day_of(first)} to {day_of(first + length - 1)}) has no rows"
            raise RequestError("--periods", found_words, "fewer periods, or a larger --unit-days")
        day = day_of(start + (number - 1) * DAY_SECONDS)
        found.append(Period(number=number, first=first, end=first + length, day=day, rows=rows))
    return found


def replayed_time(time_N: LongArray, periods: Sequence[Period]) -> LongArray:
    """[N] times on the replayed clock, ascending where `time_N` is; 0 outside the periods."""
    moved_N = np.zeros(len(time_N), np.int64)
    base = periods[0].first
    for period in periods:
        inside_N = (time_N >= period.first) & (time_N < period.end)
        share_N = (time_N[inside_N] - period.first) * DAY_SECONDS // (period.end - period.first)
        moved_N[inside_N] = base + (period.number - 1) * DAY_SECONDS + share_N
    return moved_N


def replayed_samples(dataset: Dataset, periods: int, unit_days: int) -> tuple[Samples, list[Period]]:
    """The test split with times on the replayed clock, and its periods.

    Raises:
        RequestError: a split that is none in time, rows without times, or periods that cannot be cut.
    """
    if isinstance(dataset.split, LeaveOneOut):
        legal = "a split by time: training on leave-one-out has seen the future of the periods"
        raise RequestError("--dataset", f"{dataset.path} is split leave_one_out", legal)
    samples = dataset.samples("test")
    if not len(samples) or int(samples.timestamp_N[0]) <= 0:
        raise RequestError("--dataset", f"{dataset.path} has test rows without times", "a dataset with times")
    found = cut(samples.timestamp_N, periods, unit_days)
    return dataclasses.replace(samples, timestamp_N=replayed_time(samples.timestamp_N, found)), found
