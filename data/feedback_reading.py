"""Reading a feedback log: damaged files stop, rows that cannot be used are left out and counted by reason.

Suffixes: `_N` row of the log, `_E` entry of a list column, rows joined one after the other.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data.errors import RequestError
from data.feedback import (
    DAY_SECONDS,
    FORMAT,
    METADATA,
    SCHEMA,
    SUCCESS,
    FeedbackLog,
    KeptRow,
    PropensityKind,
    day_start,
    is_day,
)
from data.parquet import open_parquet, read_table
from data.records import BoolArray, Decode, IntArray, LongArray
from data.responses import read_responses, request_digests


class FeedbackFault(StrEnum):
    """Why a row of the log cannot be used; the first that applies, in this order. Keys of `FeedbackLog.counts`."""

    MISSING_REQUEST_ID = "missing_request_id"
    DUPLICATE_REQUEST = "duplicate_request"
    """The request id occurs in an earlier row, which counts."""
    MISSING_USER = "missing_user"
    WRONG_DAY = "wrong_day"
    """Without a time, or at a time that is not of the folder's day."""
    UNEVEN_LISTS = "uneven_lists"
    """No exposed item, or not one response and one log-propensity for each."""
    BAD_HISTORY = "bad_history"
    """A history that is null or has a null in it; one without items is sound."""
    MISSING_POLICY_VERSION = "missing_policy_version"
    UNKNOWN_POLICY = "unknown_policy"
    """A policy version that nobody knows."""
    MISSING_CATALOGUE = "missing_catalogue"
    FOREIGN_CATALOGUE = "foreign_catalogue"
    """A catalogue whose item ids mean other items."""
    UNKNOWN_DECODE = "unknown_decode"
    """Not a `data.records.Decode`."""
    UNKNOWN_PROPENSITY_KIND = "unknown_propensity_kind"
    """Not a `data.feedback.PropensityKind`."""
    BAD_TEMPERATURE = "bad_temperature"
    """Not a finite number above 0."""
    MISSING_PROPENSITY = "missing_propensity"
    """A log-propensity that is null or not a number."""
    ZERO_PROPENSITY = "zero_propensity"
    """A log-propensity of minus infinity: the policy could not have shown the item."""
    POSITIVE_LOG_PROPENSITY = "positive_log_propensity"
    """A probability above 1."""
    BAD_RESPONSE = "bad_response"
    """Null, not a number, or outside the range."""
    UNKNOWN_ITEM = "unknown_item"
    """An exposed item that the catalogue never had."""
    NOT_A_CANDIDATE = "not_a_candidate"
    """An exposed item that is not among the candidates of the request."""
    RETIRED_ITEM = "retired_item"
    """An exposed item that is not active any more, without `keep_retired`: the policy of today cannot generate it."""
    BEAM_EXPOSURE = "beam_exposure"
    """A deterministic exposure where propensities are asked for: importance weights need samples."""


FAULTS: Final = tuple(FeedbackFault)
EXPECTED = frozenset({FeedbackFault.RETIRED_ITEM, FeedbackFault.BEAM_EXPOSURE})
"""Faults of sound logs; all others speak of a broken writer and count for `max_bad_share`."""


@dataclass(frozen=True, kw_only=True)
class FeedbackChecks:
    """What a reader asks of the rows."""

    n_items: int
    """Size of the catalogue."""
    active_I: BoolArray | None = None
    """bool `[n_items]`, false for retired items; by default none is retired."""
    keep_retired: bool = False
    """Rows that show a retired item are used and counted (`data.feedback.KeptRow`): an anchor can be scored."""
    catalogues: frozenset[str] | None = None
    """Digests of the catalogues with these item ids (retiring items changes the digest only); none takes any."""
    policies: frozenset[str] | None = None
    """Policy versions that are known; none takes any."""
    response_range: tuple[float, float] = (0.0, 1.0)
    """Smallest and largest response."""
    propensities: bool = True
    """Propensities are needed (SNIPS, IPS, off-policy evaluation), so that deterministic exposures are of no use."""
    max_bad_share: float = 0.05
    """Largest share of rows with a fault outside `EXPECTED`."""


def read_feedback(
    folder: Path, checks: FeedbackChecks, *, first_day: str | None = None, last_day: str | None = None
) -> FeedbackLog:
    """Read the complete days of a log.

    Args:
        folder: the log.
        checks: what is asked of the rows.
        first_day: leave out earlier days (`YYYY-MM-DD`).
        last_day: leave out later days.

    Raises:
        RequestError: no log there, a day that is incomplete, damaged or of another format, too many bad rows, or no
            row that can be used; the counts are in the message.
    """
    days = complete_days(folder, first_day=first_day, last_day=last_day)
    tables, seconds, unjoined = [], [], Counter[str]()
    for day in days:
        table = _read_day(folder / f"day={day}")
        responses, left_out = read_responses(folder / f"day={day}", checks.response_range)
        table = responses.join(table, request_digests(table["request_id"].combine_chunks()))
        unjoined += left_out + responses.counts()
        tables.append(table)
        seconds.append(np.full(len(table), day_start(day), np.int64))
    table = pa.concat_tables(tables).combine_chunks()
    fault_N = find_faults(table, checks, day_start_N=np.concatenate(seconds))
    counts = {fault.value: int((fault_N == fault.value).sum()) for fault in FeedbackFault}
    _check_shares(folder, counts, len(table), checks)
    kept = np.flatnonzero(fault_N == "")
    time_N = table["timestamp"].combine_chunks().fill_null(0).to_numpy(zero_copy_only=False)
    log = table.take(pa.array(kept[np.argsort(time_N[kept], kind="stable")]))
    retired = int(shows_retired(log, checks).sum())
    return FeedbackLog(table=log, counts=counts | unjoined, kept={KeptRow.RETIRED_ITEM.value: retired})


def complete_days(folder: Path, *, first_day: str | None = None, last_day: str | None = None) -> list[str]:
    """The days of a log, in order.

    Raises:
        RequestError: no days within the bounds, or one that is not complete.
    """
    for name, bound in (("first_day", first_day), ("last_day", last_day)):
        if bound is not None and not is_day(bound):
            raise RequestError(name, repr(bound), "YYYY-MM-DD")
    if not folder.is_dir():
        raise RequestError(str(folder), "no such folder", "a feedback log (`windlass data simulate` writes one)")
    days = sorted(path.name.removeprefix("day=") for path in folder.glob("day=*") if path.is_dir())
    for day in days:
        if not is_day(day):
            raise RequestError(str(folder / f"day={day}"), "not a day", "folders day=YYYY-MM-DD")
    chosen = [day for day in days if (first_day or "") <= day <= (last_day or "9999-99-99")]
    if not chosen:
        found = f"days {days[0]} to {days[-1]}" if days else "no folder day=YYYY-MM-DD"
        raise RequestError(str(folder), found, f"days from {first_day or 'the first'} to {last_day or 'the last'}")
    for day in chosen:
        if not (folder / f"day={day}" / SUCCESS).is_file():
            raise RequestError(str(folder / f"day={day}"), f"no {SUCCESS}", "a day that was written to its end")
    return chosen


def find_faults(
    table: pa.Table, checks: FeedbackChecks, *, day_start_N: LongArray | None = None
) -> npt.NDArray[np.str_]:
    """The first `FeedbackFault` of every row, the empty string for rows that can be used.

    Args:
        table: rows of `data.feedback.SCHEMA`.
        checks: what is asked of them.
        day_start_N: first second of the day each row was filed under; not checked without.
    """
    names = np.array(["", *(fault.value for fault in FAULTS)])
    return names[fault_codes(table, checks, day_start_N=day_start_N)]


def fault_codes(
    table: pa.Table,
    checks: FeedbackChecks,
    *,
    day_start_N: LongArray | int | None = None,
    repeated_N: BoolArray | None = None,
) -> npt.NDArray[np.uint8]:
    """The first fault of every row by its number in `FAULTS`, counted from 1; 0 for rows that can be used.

    Args:
        table: rows of `data.feedback.SCHEMA`; text may be dictionary-encoded.
        checks: what is asked of them.
        day_start_N: first second of the day each row was filed under; not checked without.
        repeated_N: rows whose request id occurs before; by default they are searched within `table`.
    """
    table = table.combine_chunks()
    code_N = np.zeros(len(table), np.uint8)
    for fault, wrong_N in _checks(table, checks, day_start_N, repeated_N):
        if wrong_N.any():
            code_N[(code_N == 0) & wrong_N] = FAULTS.index(fault) + 1
    return code_N


def _checks(
    table: pa.Table, checks: FeedbackChecks, day_start_N: LongArray | int | None, repeated_N: BoolArray | None
) -> Iterable[tuple[FeedbackFault, BoolArray]]:
    yield FeedbackFault.MISSING_REQUEST_ID, _without_text(table, "request_id")
    yield FeedbackFault.DUPLICATE_REQUEST, _repeated(table) if repeated_N is None else repeated_N
    yield FeedbackFault.MISSING_USER, _null(table, "user_id")
    wrong_N = _null(table, "timestamp")
    if day_start_N is not None:
        time_N = table["timestamp"].combine_chunks().fill_null(0).to_numpy(zero_copy_only=False)
        wrong_N = wrong_N | (time_N // DAY_SECONDS * DAY_SECONDS != day_start_N)
    yield FeedbackFault.WRONG_DAY, wrong_N
    exposed, response, logp0 = (_List(table, name) for name in ("exposed", "response", "logp0"))
    even_N = (exposed.length_N > 0) & (exposed.length_N == response.length_N) & (exposed.length_N == logp0.length_N)
    yield FeedbackFault.UNEVEN_LISTS, ~even_N
    history = _List(table, "history")
    yield FeedbackFault.BAD_HISTORY, _null(table, "history") | history.any_row(history.null_E)
    policy, digest = _Words(table, "policy_version"), _Words(table, "catalogue_digest")
    yield FeedbackFault.MISSING_POLICY_VERSION, policy.among([""])
    if checks.policies is not None:
        yield FeedbackFault.UNKNOWN_POLICY, ~policy.among(checks.policies)
    yield FeedbackFault.MISSING_CATALOGUE, digest.among([""])
    if checks.catalogues is not None:
        yield FeedbackFault.FOREIGN_CATALOGUE, ~digest.among(checks.catalogues)
    decode, kind = _Words(table, "decode"), _Words(table, "propensity_kind")
    yield FeedbackFault.UNKNOWN_DECODE, ~decode.among([decode.value for decode in Decode])
    yield FeedbackFault.UNKNOWN_PROPENSITY_KIND, ~kind.among([kind.value for kind in PropensityKind])
    temperature_N = table["temperature"].combine_chunks().fill_null(np.nan).to_numpy(zero_copy_only=False)
    yield FeedbackFault.BAD_TEMPERATURE, ~(np.isfinite(temperature_N) & (temperature_N > 0))
    logp_E = logp0.floats()
    yield FeedbackFault.MISSING_PROPENSITY, logp0.any_row(np.isnan(logp_E))
    yield FeedbackFault.ZERO_PROPENSITY, logp0.any_row(logp_E == -np.inf)
    yield FeedbackFault.POSITIVE_LOG_PROPENSITY, logp0.any_row(logp_E > 0)
    low, high = checks.response_range
    response_E = response.floats()
    yield FeedbackFault.BAD_RESPONSE, response.any_row(~((response_E >= low) & (response_E <= high)))
    item_E = exposed.ints()
    unknown_E = (item_E < 0) | (item_E >= checks.n_items)
    yield FeedbackFault.UNKNOWN_ITEM, exposed.any_row(unknown_E)
    yield FeedbackFault.NOT_A_CANDIDATE, _outside_candidates(table, exposed, item_E)
    yield FeedbackFault.RETIRED_ITEM, shows_retired(table, checks) & (not checks.keep_retired)
    deterministic_N = kind.among([PropensityKind.NONE.value]) | (
        decode.among([Decode.BEAM.value]) & ~kind.among([PropensityKind.MIXTURE.value])
    )
    yield FeedbackFault.BEAM_EXPOSURE, deterministic_N & checks.propensities


def shows_retired(table: pa.Table, checks: FeedbackChecks) -> BoolArray:
    """[N] rows that show an item which is no longer active."""
    if checks.active_I is None:
        return np.zeros(len(table), np.bool_)
    exposed = _List(table, "exposed")
    return exposed.any_row(np.isin(exposed.ints(), np.flatnonzero(~checks.active_I)))


def _outside_candidates(table: pa.Table, exposed: _List, item_E: IntArray) -> BoolArray:
    closed_N = ~_null(table, "candidates")
    if not closed_N.any():
        return ~closed_N & False
    candidates = _List(table, "candidates")
    allowed_E = candidates.ints()
    # A row and an item make one number, so that membership is one sorted search over all rows.
    wide = np.int64(2**32)
    listed = exposed.row_E * wide + item_E.astype(np.int64) + 2**31
    allowed = candidates.row_E * wide + allowed_E.astype(np.int64) + 2**31
    return exposed.any_row(closed_N[exposed.row_E] & ~np.isin(listed, allowed))


class _List:
    """A list column as joined entries and the row of each."""

    def __init__(self, table: pa.Table, name: str) -> None:
        column = _column(table, name)
        self.length_N = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        self._entries = column.flatten()

    @cached_property
    def row_E(self) -> LongArray:
        """The row of each entry."""
        return np.repeat(np.arange(len(self.length_N)), self.length_N)

    @property
    def null_E(self) -> BoolArray:
        """Entries that are null."""
        return _nulls(self._entries)

    def ints(self) -> IntArray:
        """int32 entries; null becomes -1, which is no item."""
        entries: IntArray = self._entries.fill_null(-1).to_numpy(zero_copy_only=False)
        return entries

    def floats(self) -> npt.NDArray[np.float64]:
        """Entries as float64; null becomes NaN."""
        entries = self._entries.fill_null(np.nan).to_numpy(zero_copy_only=False)
        return np.asarray(entries, np.float64)

    def any_row(self, flag_E: BoolArray) -> BoolArray:
        """[N] whether any entry of the row has the flag."""
        found = np.zeros(len(self.length_N), np.bool_)
        # Mostly no entry has it, and then the rows of the entries need not be known.
        if flag_E.any():
            found[self.row_E[flag_E]] = True
        return found


def _column(table: pa.Table, name: str) -> pa.Array:
    """A column as one array; `combine_chunks` copies one that is a single chunk already."""
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _nulls(column: pa.Array) -> BoolArray:
    if not column.null_count:
        return np.zeros(len(column), np.bool_)
    null: BoolArray = column.is_null().to_numpy(zero_copy_only=False)
    return null


def _null(table: pa.Table, name: str) -> BoolArray:
    return _nulls(_column(table, name))


class _Words:
    """A text column of few different words."""

    def __init__(self, table: pa.Table, name: str) -> None:
        column = _column(table, name)
        encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        # The last word stands for null.
        self._words = [word or "" for word in encoded.dictionary.to_pylist()] + [""]
        self._code_N = encoded.indices.fill_null(len(self._words) - 1).to_numpy(zero_copy_only=False)

    def among(self, legal: Collection[str]) -> BoolArray:
        """[N] whether the row has one of these words; null is the empty one."""
        found_N: BoolArray = np.array([word in legal for word in self._words], np.bool_)[self._code_N]
        return found_N


def _without_text(table: pa.Table, name: str) -> BoolArray:
    length = pc.fill_null(pc.binary_length(_column(table, name)), 0)
    return np.asarray(length.to_numpy(zero_copy_only=False) == 0)


def _repeated(table: pa.Table) -> BoolArray:
    """[N] rows whose request id occurs in an earlier row."""
    # Codes are given in the order of first occurrence, so that a new id has a code above all earlier ones.
    code_N = table["request_id"].combine_chunks().dictionary_encode(null_encoding="encode").indices.to_numpy()
    repeated_N = np.zeros(len(code_N), np.bool_)
    repeated_N[1:] = code_N[1:] <= np.maximum.accumulate(code_N)[:-1]
    return repeated_N


def _check_shares(folder: Path, counts: dict[str, int], rows: int, checks: FeedbackChecks) -> None:
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    bad = sum(count for name, count in counts.items() if FeedbackFault(name) not in EXPECTED)
    if rows and bad > checks.max_bad_share * rows:
        raise RequestError(str(folder), f"{bad} of {rows} rows are bad ({told})", f"at most {checks.max_bad_share:.0%}")
    if sum(counts.values()) == rows:
        legal = "at least one row"
        if counts[FeedbackFault.BEAM_EXPOSURE]:
            legal += " whose exposure was drawn (sample, mixture): a beam has no propensity, which SNIPS and IPS need"
        raise RequestError(str(folder), f"none of {rows} rows can be used ({told or 'no rows'})", legal)


def _read_day(folder: Path) -> pa.Table:
    legal = f"a day of a feedback log, format {FORMAT}"
    try:
        done = json.loads((folder / SUCCESS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(str(folder / SUCCESS), f"cannot be read ({error})", legal) from error
    files = done.get("rows") if isinstance(done, dict) and done.get("format") == FORMAT else None
    if not isinstance(files, dict):
        found = done.get("format") if isinstance(done, dict) else done
        raise RequestError(str(folder / SUCCESS), f"format {found!r}", legal)
    present = sorted(path.name for path in folder.glob("*.parquet"))
    if present != sorted(files):
        raise RequestError(str(folder), f"files {present}", f"{sorted(files)}, as {SUCCESS} says")
    tables = [_read_file(folder / name, files[name]) for name in sorted(files)]
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def _read_file(path: Path, rows: Any) -> pa.Table:
    raw = (open_parquet(path).schema_arrow.metadata or {}).get(METADATA)
    head: Any = None
    try:
        head = json.loads(raw) if raw is not None else None
    except ValueError as error:
        raise RequestError(str(path), f"metadata that is not JSON ({error})", f"format {FORMAT}") from error
    found = head.get("format") if isinstance(head, dict) else None
    if found != FORMAT:
        raise RequestError(str(path), f"format {found!r}", f"format {FORMAT} of a feedback log")
    table = read_table(path, SCHEMA).cast(SCHEMA)
    if len(table) != rows:
        raise RequestError(str(path), f"{len(table)} rows", f"{rows}, as {SUCCESS} says")
    return table
