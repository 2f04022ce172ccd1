"""The feedback log: what a policy showed, with which probability, and what people answered.

A log is a folder of days, `day=YYYY-MM-DD/` (UTC), each with Parquet files and `_SUCCESS`, which is written last. A
row is one request: the context, the exposed items, a response and a log-propensity for each, and which policy chose
them and how. Reading and its checks: `data.feedback_reading`.

Suffixes: `_N` row of the log.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.dataset import Samples
from data.errors import RequestError
from data.parquet import digest_arrays
from data.records import FloatArray, IntArray, LongArray

FORMAT: Final = 1
"""Version of the layout; kept in every Parquet file and in `_SUCCESS`."""
METADATA: Final = b"windlass.feedback"
SUCCESS: Final = "_SUCCESS"
DAY_SECONDS: Final = 86_400
FIRST_SECOND: Final = -62_135_596_800
"""0001-01-01T00:00:00 UTC, the first day that has a name."""
LAST_SECOND: Final = 253_402_300_799
"""9999-12-31T23:59:59 UTC."""
ROWS_PER_FILE: Final = 262_144

SCHEMA: Final = pa.schema(
    [
        pa.field("request_id", pa.string()),
        pa.field("user_id", pa.int32()),
        pa.field("timestamp", pa.int64()),
        pa.field("history", pa.list_(pa.int32())),
        pa.field("need", pa.string()),
        pa.field("candidates", pa.list_(pa.int32())),
        pa.field("exposed", pa.list_(pa.int32())),
        pa.field("response", pa.list_(pa.float32())),
        pa.field("logp0", pa.list_(pa.float32())),
        pa.field("propensity_kind", pa.string()),
        pa.field("policy_version", pa.string()),
        pa.field("decode", pa.string()),
        pa.field("temperature", pa.float32()),
        pa.field("catalogue_digest", pa.string()),
    ]
)
"""`timestamp` is seconds since 1970, UTC; `history` the whole history, oldest first, as the exclusions of the request
follow from it; `need` and `candidates` are null without. `logp0` is what `PropensityKind` says."""


class PropensityKind(StrEnum):
    """What `logp0` is the logarithm of."""

    SAMPLE = "sample"
    """Probability under the policy renormalised over the legal continuations, at `temperature`."""
    MIXTURE = "mixture"
    """Probability under a mixture of beams and samples, whichever of the two this row came from."""
    GIVEN = "given"
    """Probability that a policy of others reported."""
    NONE = "none"
    """No propensity: the exposure was deterministic. `logp0` is the policy's log-probability, for reports only."""


class KeptRow(StrEnum):
    """What sets rows apart that are used all the same. Keys of `FeedbackLog.kept`."""

    RETIRED_ITEM = "retired_item_kept"
    """An exposed item that is not active any more."""


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """Exposures of one item per request, as arrays."""

    item_N: IntArray
    """The exposed item."""
    response_N: FloatArray
    logp0_N: FloatArray
    """Log-propensity."""
    policy_version_N: npt.NDArray[np.str_]

    @property
    def digest(self) -> str:
        """Tells two logs apart, and one log from itself with further days."""
        return digest_arrays(self.item_N, self.response_N, self.logp0_N)


@dataclass(frozen=True, kw_only=True)
class FeedbackLog:
    """Rows of a log in the order of their time (ties: as they were written)."""

    table: pa.Table
    """`SCHEMA`."""
    counts: Mapping[str, int]
    """Rows that were left out, by `data.feedback_reading.FeedbackFault`, and responses that could not be joined, by
    `data.responses.ResponseFault`; all zero for a log made in memory."""
    kept: Mapping[str, int] = field(default_factory=dict)
    """Rows that are here although something sets them apart, by `KeptRow`."""

    def __len__(self) -> int:
        return len(self.table)

    def samples(self) -> Samples:
        """The requests as samples, for the prompt builder; the target of a sample is the exposed item."""
        anchors = self.anchors()
        history = self.table["history"].combine_chunks()
        length_N = history.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        end_N = np.cumsum(length_N)
        return Samples(
            user_id_N=self._column("user_id").astype(np.int32),
            target_N=anchors.item_N,
            timestamp_N=self._column("timestamp").astype(np.int64),
            sample_id_N=np.arange(len(self), dtype=np.int64),
            values=history.flatten().to_numpy(zero_copy_only=False).astype(np.int32),
            start_N=end_N - length_N,
            end_N=end_N,
        )

    def anchors(self) -> Anchors:
        """The first exposed item of every request, its response and its log-propensity.

        Of a request that exposed several items the later ones are left out (`later_items` counts them): they were
        shown given the first, which alone has the propensity of an item by itself.

        Raises:
            RequestError: a request that exposed nothing.
        """
        if not self._exposed_N().all():
            found = f"{int((self._exposed_N() == 0).sum())} of {len(self)} requests expose no item"
            raise RequestError("feedback: exposed", found, "at least one item per request")
        return Anchors(
            item_N=_first(self.table, "exposed").astype(np.int32),
            response_N=_first(self.table, "response").astype(np.float32),
            logp0_N=_first(self.table, "logp0").astype(np.float32),
            policy_version_N=np.array(self.table["policy_version"].to_pylist(), dtype=str),
        )

    @property
    def later_items(self) -> int:
        """Exposed items behind the first of their request."""
        return int(self._exposed_N().sum()) - len(self)

    def _exposed_N(self) -> LongArray:
        length = self.table["exposed"].combine_chunks().value_lengths()
        length_N: LongArray = length.to_numpy(zero_copy_only=False).astype(np.int64)
        return length_N

    def _column(self, name: str) -> LongArray:
        column: LongArray = self.table[name].combine_chunks().to_numpy(zero_copy_only=False)
        return column


def _first(table: pa.Table, name: str) -> npt.NDArray[Any]:
    first: npt.NDArray[Any] = pc.list_element(table[name], 0).combine_chunks().to_numpy(zero_copy_only=False)
    return first


def single_item_log(
    *,
    request_id: list[str],
    user_id_N: IntArray,
    timestamp_N: LongArray,
    history: list[IntArray],
    exposed_N: IntArray,
    response_N: FloatArray,
    logp0_N: FloatArray,
    propensity_kind: PropensityKind,
    policy_version: str,
    decode: list[str],
    temperature: float,
    catalogue_digest: str,
    need: list[str] | None = None,
) -> FeedbackLog:
    """A log of one exposed item per request, all chosen by one policy from the whole catalogue."""
    rows = len(request_id)
    columns = {
        "request_id": request_id,
        "user_id": user_id_N,
        "timestamp": timestamp_N,
        "history": history,
        "need": need if need is not None else [None] * rows,
        "candidates": [None] * rows,
        "exposed": exposed_N.reshape(-1, 1).tolist(),
        "response": response_N.reshape(-1, 1).tolist(),
        "logp0": logp0_N.reshape(-1, 1).tolist(),
        "propensity_kind": [propensity_kind.value] * rows,
        "policy_version": [policy_version] * rows,
        "decode": decode,
        "temperature": [temperature] * rows,
        "catalogue_digest": [catalogue_digest] * rows,
    }
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    return FeedbackLog(table=_in_time_order(pa.table(arrays, schema=SCHEMA)), counts={})


def _in_time_order(table: pa.Table) -> pa.Table:
    order = np.argsort(table["timestamp"].to_numpy(), kind="stable")
    return table.take(pa.array(order))


def day_of(timestamp: int) -> str:
    """The UTC day of a time in seconds, `YYYY-MM-DD`."""
    return datetime.fromtimestamp(timestamp, UTC).date().isoformat()


def day_start(day: str) -> int:
    """The first second of a UTC day."""
    return int(np.datetime64(day, "s").astype(np.int64))


def is_day(text: str) -> bool:
    """Whether a text is a day as folders name it, `YYYY-MM-DD`."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def write_feedback(folder: Path, table: pa.Table, *, rows_per_file: int = ROWS_PER_FILE) -> dict[str, int]:
    """Write the rows of `table` into the folders of their days; each day appears whole or not at all.

    Args:
        folder: the log; made when missing.
        table: `SCHEMA`; what the rows say is checked on reading.
        rows_per_file: largest Parquet file, in rows.

    Returns:
        Rows by day.

    Raises:
        RequestError: another schema, a row without a time, or a day that is in the log already.
    """
    if not table.schema.equals(SCHEMA):
        raise RequestError(
            "feedback: schema", str(table.schema).replace("\n", ", "), "the columns of data.feedback.SCHEMA"
        )
    if table["timestamp"].null_count:
        raise RequestError("feedback: timestamp", f"{table['timestamp'].null_count} rows without", "seconds, UTC")
    timestamp_N = table["timestamp"].to_numpy()
    check_days_are_free(folder, timestamp_N)
    day_N = timestamp_N // DAY_SECONDS
    days = {day_of(int(day) * DAY_SECONDS): np.flatnonzero(day_N == day) for day in np.unique(day_N)}
    for day, rows in days.items():
        rows_of_day = table.take(pa.array(rows))
        starts = range(0, len(rows), rows_per_file)
        write_day(folder / f"day={day}", (rows_of_day.slice(start, rows_per_file) for start in starts))
    return {day: len(rows) for day, rows in days.items()}


def check_days_are_free(folder: Path, timestamp_N: LongArray) -> None:
    """Refuse a log that holds one of the days already; asked before the work whose rows are to be written.

    Raises:
        RequestError: names the first such day, a time that is of no year from 1 to 9999, or a log that is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(str(folder), "is no folder", "a folder of a feedback log, which may be new")
    strange_N = timestamp_N[(timestamp_N < FIRST_SECOND) | (timestamp_N > LAST_SECOND)]
    if len(strange_N):
        raise RequestError("feedback: timestamp", int(strange_N[0]), "seconds since 1970, in the years 1 to 9999")
    for day in np.unique(timestamp_N // DAY_SECONDS):
        path = folder / f"day={day_of(int(day) * DAY_SECONDS)}"
        if path.exists():
            raise RequestError(str(path), "is there already", "a day that is not in the log yet")


def write_day(folder: Path, parts: Iterable[pa.Table]) -> dict[str, int]:
    """Write the folder of one day, a file per part that has rows; it appears whole or not at all.

    Args:
        folder: `LOG/day=YYYY-MM-DD`, not there yet.
        parts: `SCHEMA`; taken one after the other.

    Returns:
        Rows by file.
    """
    # The leading dot keeps a half-written day from being taken for one of the log.
    temporary = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files: dict[str, int] = {}
    for part in parts:
        if len(part):
            name = f"part-{len(files):05d}.parquet"
            marked = part.replace_schema_metadata({METADATA: json.dumps({"format": FORMAT})})
            pq.write_table(marked, temporary / name, compression="zstd")
            _sync(temporary / name)
            files[name] = len(part)
    (temporary / SUCCESS).write_text(json.dumps({"format": FORMAT, "rows": files}) + "\n", encoding="utf-8")
    _sync(temporary / SUCCESS)
    _sync(temporary)
    temporary.rename(folder)
    _sync(folder.parent)
    return files


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
