"""From raw columns of any type to keys, seconds and ratings: vectorised, with a reason for every row that fails.

Each function returns the converted column, null where a row failed, and the failed rows as `(Reason, mask)` pairs. A
column whose type can hold no legal value at all is the request's fault, not the rows': `RequestError`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.errors import RequestError
from data.quarantine import Reason
from data.records import BoolArray
from data.sources import TimeUnit

LATEST = 4_102_444_800
"""2100-01-01 in seconds; later times are taken for a wrong unit."""

_PER_SECOND = {
    TimeUnit.SECONDS: 1,
    TimeUnit.MILLISECONDS: 1_000,
    TimeUnit.MICROSECONDS: 1_000_000,
    TimeUnit.NANOSECONDS: 1_000_000_000,
}
_LARGEST = np.iinfo(np.int64).max
_NUMBER = r"^\s*[+-]?(\d{1,18}(\.\d*)?|\.\d+)([eE][+-]?\d{1,2})?\s*$"
_NOT_A_NUMBER = r"(?i)^\s*[+-]?nan\s*$"
_INTEGER = r"^\s*[+-]?\d{1,18}\s*$"


class Column(NamedTuple):
    """A converted column and the rows that failed."""

    values: pa.Array
    failures: list[tuple[Reason, BoolArray]]


def keys(column: pa.Array, where: str, missing: Reason) -> Column:
    """Ids as text: integers, whole floats and text. Negative ids fail, as missing-value codes usually are.

    Raises:
        RequestError: neither numbers nor text.
    """
    column = _plain(column)
    kind = column.type
    failures: list[tuple[Reason, BoolArray]] = []
    if pa.types.is_floating(kind):
        number = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        void = np.isnan(number)
        with np.errstate(invalid="ignore"):
            bad = ~void & ((np.floor(number) != number) | (np.abs(number) >= 2**53))
        whole = np.where(void | bad, 0, number).astype(np.int64)
        column = pa.array(whole, mask=void | bad)
        failures.append((Reason.BAD_ID, bad))
    elif _is_text(kind):
        column, bad = _text(column)
        replaced = _mask(pc.match_substring(column, "\ufffd"))
        bad = bad | replaced
        column = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.or_(pc.equal(column, ""), pa.array(replaced)), pa.scalar(None, pa.string()), column)
        failures.append((Reason.BAD_ID, bad))
    elif not (pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise RequestError(f"column {where}", str(kind), "integers or text")
    text = column.cast(pa.string())
    negative = _mask(pc.match_substring_regex(text, r"^-\d+(\.\d*)?$"))
    text = pc.if_else(pa.array(negative), pa.scalar(None, pa.string()), text)
    failed = functools.reduce(np.logical_or, [mask for _, mask in failures], negative)
    absent = _nulls(text) & ~failed
    return Column(text, [*failures, (Reason.NEGATIVE_ID, negative), (missing, absent)])


def seconds(column: pa.Array, where: str, unit: TimeUnit) -> Column:
    """Times as int64 seconds since 1970 (or bare order numbers), rounded down.

    Numbers count in `unit`; Arrow timestamps and dates bring their unit; text may be a number or ISO 8601 (without a
    zone: UTC).

    Raises:
        RequestError: a type that is no time.
    """
    column = _plain(column)
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        stamp = column.cast(pa.timestamp("ms"), safe=False) if pa.types.is_date(kind) else column
        per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[stamp.type.unit]
        number = stamp.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False) // per_second
        return _bounded(number, _nulls(column), np.zeros(len(column), bool), LATEST)
    latest = _LARGEST if unit is TimeUnit.ORDER else LATEST
    scale = _PER_SECOND.get(unit, 1)
    if pa.types.is_integer(kind):
        whole = column.cast(pa.uint64() if pa.types.is_uint64(kind) else pa.int64()).fill_null(0)
        number = whole.to_numpy(zero_copy_only=False)
        number = np.where(number > _LARGEST, _LARGEST, number).astype(np.int64) // scale
        return _bounded(number, _nulls(column), np.zeros(len(column), bool), latest)
    if pa.types.is_floating(kind):
        return _bounded_floats(column.cast(pa.float64()), _nulls(column), scale, latest)
    if pa.types.is_null(kind):
        column = column.cast(pa.string())
    elif not _is_text(kind):
        raise RequestError(f"column {where}", str(kind), "numbers, timestamps, dates or text holding them")
    return _text_seconds(column, scale, latest)


def ratings(column: pa.Array | None, rows: int, where: str) -> Column:
    """Ratings as float32; null (and empty text) stays null, because ratings are optional; NaN and infinity fail.

    Raises:
        RequestError: a type that is no number.
    """
    if column is None or pa.types.is_null(column.type):
        return Column(pa.nulls(rows, pa.float32()), [])
    column = _plain(column)
    kind = column.type
    bad = np.zeros(rows, bool)
    nan = np.zeros(rows, bool)
    if _is_text(kind):
        column, bad = _text(column)
        column = pc.utf8_trim_whitespace(column)
        nan = _mask(pc.match_substring_regex(column, _NOT_A_NUMBER))
        number_like = _mask(pc.match_substring_regex(column, _NUMBER))
        bad = bad | (_mask(pc.not_equal(column, "")) & ~number_like & ~nan)
        column = pc.if_else(pa.array(number_like), column, pa.scalar(None, pa.string())).cast(pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise RequestError(f"column {where}", str(kind), "numbers")
    absent = _nulls(column)
    number = column.cast(pa.float64(), safe=False).fill_null(0).to_numpy(zero_copy_only=False)
    nan = nan | (np.isnan(number) & ~absent)
    with np.errstate(over="ignore"):
        narrow = number.astype(np.float32)
    bad = bad | (~np.isfinite(narrow) & ~nan & ~absent)
    values = pa.array(narrow, mask=absent | nan | bad)
    return Column(values, [(Reason.NAN_RATING, nan), (Reason.BAD_RATING, bad)])


def titles(column: pa.Array) -> pa.Array:
    """Titles as trimmed text, null where there is none. Text that is not UTF-8, or page markup, is no title."""
    column = _plain(column)
    if not _is_text(column.type):
        column = column.cast(pa.string()) if not pa.types.is_nested(column.type) else pa.nulls(len(column), pa.string())
    column, _ = _text(column)
    column = pc.utf8_trim_whitespace(column)
    unusable = pc.match_substring_regex(column, r"^$|<span|getTime\(")
    return pc.if_else(unusable, pa.scalar(None, pa.string()), column)


def texts(column: pa.Array) -> pa.Array:
    """Text as it stands; what is not UTF-8 becomes null."""
    return _text(_plain(column))[0]


def first_reasons(columns: list[Column], rows: int) -> tuple[BoolArray, list[Reason | None]]:
    """Failed rows, and for each row the first reason found (None where it is sound)."""
    reason: list[Reason | None] = [None] * rows
    failed = np.zeros(rows, bool)
    for column in columns:
        for why, mask in column.failures:
            for row in np.flatnonzero(mask & ~failed):
                reason[row] = why
            failed |= mask
    return failed, reason


def _text_seconds(column: pa.Array, scale: int, latest: int) -> Column:
    text, bad = _text(column)
    text = pc.utf8_trim_whitespace(text)
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
    absent = _nulls(text) & ~bad
    whole = _mask(pc.match_substring_regex(text, _INTEGER))
    number = pc.if_else(pa.array(whole), pc.replace_substring_regex(text, r"^\+", ""), "0").cast(pa.int64())
    result = number.fill_null(0).to_numpy(zero_copy_only=False) // scale
    other = ~whole & ~absent & ~bad
    if other.any():
        real = other & _mask(pc.match_substring_regex(text, _NUMBER))
        floats = pc.if_else(pa.array(real), text, "0").cast(pa.float64())
        converted = _bounded_floats(floats, np.zeros(len(text), bool), scale, latest)
        real &= ~_nulls(converted.values)
        result = np.where(real, converted.values.fill_null(0).to_numpy(zero_copy_only=False), result)
        for row in np.flatnonzero(other & ~real):
            moment = _iso_seconds(text[row].as_py())
            if moment is None:
                bad[row] = True
            else:
                result[row] = moment
    return _bounded(result, absent, bad, latest)


def _iso_seconds(text: str) -> int | None:
    from datetime import UTC, datetime

    try:
        moment = datetime.fromisoformat(text)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() // 1)
    except (ValueError, OverflowError):
        return None


def _bounded_floats(column: pa.Array, absent: BoolArray, scale: int, latest: int) -> Column:
    number = column.fill_null(0).to_numpy(zero_copy_only=False)
    with np.errstate(invalid="ignore", over="ignore"):
        value = np.floor(number / scale)
        bad = ~(np.isfinite(value) & (value >= 0) & (value < min(latest, 2**53)))
    nan = np.isnan(number) & ~absent
    return _bounded(np.where(bad, 0, value).astype(np.int64), absent | nan, bad & ~nan, latest)


def _bounded(number: np.ndarray, absent: BoolArray, bad: BoolArray, latest: int) -> Column:
    bad = (bad | (number < 0) | (number >= latest)) & ~absent
    values = pa.array(number.astype(np.int64), mask=absent | bad)
    return Column(values, [(Reason.MISSING_TIMESTAMP, absent), (Reason.BAD_TIMESTAMP, bad)])


def _plain(column: pa.Array) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column


def _is_text(kind: pa.DataType) -> bool:
    return any(
        check(kind)
        for check in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_string_view,
            pa.types.is_binary,
            pa.types.is_large_binary,
        )
    )


def _text(column: pa.Array) -> tuple[pa.Array, BoolArray]:
    """As string; rows that are not UTF-8 become null and are told."""
    try:
        text = column.cast(pa.string())
        text.validate(full=True)
        return text, np.zeros(len(column), bool)
    except pa.ArrowInvalid:
        decoded: list[str | None] = []
        bad = np.zeros(len(column), bool)
        for row, value in enumerate(column.cast(pa.large_binary(), safe=False).to_pylist()):
            try:
                decoded.append(None if value is None else value.decode("utf-8"))
            except UnicodeDecodeError:
                decoded.append(None)
                bad[row] = True
        return pa.array(decoded, pa.string()), bad


def _nulls(column: pa.Array) -> BoolArray:
    return np.asarray(column.is_null().to_numpy(zero_copy_only=False), dtype=bool)


def _mask(column: pa.Array) -> BoolArray:
    return np.asarray(column.fill_null(False).to_numpy(zero_copy_only=False), dtype=bool)
