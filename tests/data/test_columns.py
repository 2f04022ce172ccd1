"""Raw columns become keys, seconds and ratings; every row that fails has exactly one first reason.

The oracle for each kind of value is written beside it. Property: whatever the column, every row either has a value or
a reason, and nothing raises but RequestError.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.columns import LATEST, Column, first_reasons, keys, ratings, seconds, titles
from data.errors import RequestError
from data.quarantine import Reason
from data.sources import TimeUnit


def _key(column: pa.Array) -> Column:
    return keys(column, "user", Reason.MISSING_USER)


def _outcome(column: Column) -> list[object]:
    """The value of each row, or its reason."""
    _, reasons = first_reasons([column], len(column.values))
    return [reason or value for reason, value in zip(reasons, column.values.to_pylist(), strict=True)]


def test_keys() -> None:
    missing, negative, bad = Reason.MISSING_USER, Reason.NEGATIVE_ID, Reason.BAD_ID
    assert _outcome(_key(pa.array([7, -1, None], pa.int64()))) == ["7", negative, missing]
    assert _outcome(_key(pa.array([7.0, 1.5, float("nan"), -2.0, None]))) == ["7", bad, missing, negative, missing]
    assert _outcome(_key(pa.array([" a ", "", "-3", "-x", None]))) == ["a", missing, negative, "-x", missing]
    assert _outcome(_key(pa.array([b"ok", b"\xff\xfe", None], pa.binary()))) == ["ok", bad, missing]
    assert _outcome(_key(pa.array(["a\ufffd"]))) == [bad]
    assert _outcome(_key(pa.array(["a", "b", "a"]).dictionary_encode())) == ["a", "b", "a"]
    assert _outcome(_key(pa.nulls(1))) == [missing]
    with pytest.raises(RequestError, match="integers or text"):
        _key(pa.array([[1]]))


def test_seconds() -> None:
    missing, bad = Reason.MISSING_TIMESTAMP, Reason.BAD_TIMESTAMP

    def of(values: pa.Array, unit: TimeUnit = TimeUnit.SECONDS) -> list[object]:
        return _outcome(seconds(values, "timestamp", unit))

    assert of(pa.array([0, 5, -1, LATEST, None])) == [0, 5, bad, bad, missing]
    assert of(pa.array([1999, -1], pa.int64()), TimeUnit.MILLISECONDS) == [1, bad]
    assert of(pa.array([1.9, float("nan"), float("inf"), -0.5])) == [1, missing, bad, bad]
    assert of(pa.array([2**64 - 1, 3], pa.uint64())) == [bad, 3]
    assert of(pa.array(["12", " 13.7 ", "1e3", "x", "", "1970-01-02", "1970-01-01T00:00:05+00:00", "9" * 40])) == [
        12, 13, 1000, bad, missing, 86400, 5, bad,
    ]  # fmt: skip
    assert of(pa.array([dt.datetime(1970, 1, 1, 0, 0, 9)], pa.timestamp("ns"))) == [9]
    assert of(pa.array([dt.date(1970, 1, 3)])) == [2 * 86400]
    assert of(pa.array([LATEST + 5]), TimeUnit.ORDER) == [LATEST + 5]
    with pytest.raises(RequestError, match="column timestamp"):
        of(pa.array([True]))


def test_ratings() -> None:
    nan, bad = Reason.NAN_RATING, Reason.BAD_RATING

    def of(values: pa.Array | None, rows: int) -> list[object]:
        return _outcome(ratings(values, rows, "rating"))

    assert of(None, 2) == [None, None]
    assert of(pa.array([4.5, float("nan"), float("inf"), None, 1e300]), 5) == [4.5, nan, bad, None, bad]
    assert of(pa.array(["4.5", "NaN", "good", "", None]), 5) == [4.5, nan, bad, None, None]
    with pytest.raises(RequestError, match="numbers"):
        of(pa.array([{"a": 1}]), 1)


def test_titles_that_are_markup_are_none() -> None:
    column = pa.array([" A film ", "", None, '<span class="x">', "function getTime() {"])
    assert titles(column).to_pylist() == ["A film", None, None, None, None]


_VALUES = [
    (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    (pa.uint64(), st.integers(0, 2**64 - 1)),
    (pa.int8(), st.integers(-128, 127)),
    (pa.float64(), st.floats()),
    (pa.float32(), st.floats(width=32)),
    (pa.string(), st.text(max_size=12) | st.integers().map(str) | st.floats().map(str)),
    (pa.binary(), st.binary(max_size=12)),
    (pa.bool_(), st.booleans()),
    (pa.timestamp("us"), st.integers(-(2**62), 2**62)),
    (pa.date32(), st.integers(-(2**31), 2**31 - 1)),
    (pa.list_(pa.int32()), st.lists(st.integers(0, 5), max_size=3)),
    (pa.decimal128(10, 2), st.decimals(-1000, 1000, places=2)),
]


@st.composite
def _columns(draw: st.DrawFn) -> pa.Array:
    kind, values = draw(st.sampled_from(_VALUES))
    return pa.array(draw(st.lists(st.none() | values, max_size=12)), kind)


@given(_columns(), st.sampled_from(list(TimeUnit)))
@settings(max_examples=300, deadline=None)
def test_every_row_has_a_value_or_a_reason(column: pa.Array, unit: TimeUnit) -> None:
    rows = len(column)
    converters: list[tuple[Callable[[], Column], bool]] = [
        (lambda: _key(column), False),
        (lambda: seconds(column, "timestamp", unit), False),
        (lambda: ratings(column, rows, "rating"), True),
    ]
    for convert, optional in converters:
        try:
            converted = convert()
        except RequestError:
            continue
        assert len(converted.values) == rows
        failed, reasons = first_reasons([converted], rows)
        null = np.asarray(converted.values.is_null().to_numpy(zero_copy_only=False), bool)
        assert (null | ~failed).all()
        assert optional or (failed == null).all()
        assert [reason is not None for reason in reasons] == failed.tolist()
    assert len(titles(column)) == rows
