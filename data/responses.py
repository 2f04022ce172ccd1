"""Responses that come after their exposure was logged: part files beside the exposures of the request's day.

    day=2026-01-31/responses/part-....parquet      `RESPONSES`; appears by a rename and never changes

A response belongs to the day of its request, not to the day on which it came, so that a day's folder holds all that is
known of its requests. There is no `_SUCCESS` for them: files may come at any time. Of several responses to the same
item of a request the largest counts, and so does the one in the exposure's own row.

Suffixes: `_B` row of exposures, `_R` response, sorted by the digest of its request, `_E` entry of a list column.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from data import ragged
from data.errors import RequestError
from data.parquet import read_table, wrong_columns
from data.records import BoolArray

FORMAT: Final = 1
"""Version of the layout; kept in every file."""
METADATA: Final = b"windlass.responses"
FOLDER: Final = "responses"
RESPONSES: Final = pa.schema(
    [
        pa.field("request_id", pa.string()),
        pa.field("item_id", pa.int32()),
        pa.field("response", pa.float32()),
        pa.field("timestamp", pa.int64()),
    ]
)
"""`item_id` is the exposed item that was responded to, `timestamp` when, in seconds since 1970, UTC."""
DigestArray = npt.NDArray[np.uint64]
PairArray = npt.NDArray[np.uint64]
"""[R, 2] digest of the request; item and response in one word."""


class ResponseFault(StrEnum):
    """Why a response is not joined. Keys of counts."""

    MISSING_RESPONSE_FIELD = "missing_response_field"
    """Without request id, item or response."""
    BAD_LATE_RESPONSE = "bad_late_response"
    """Not a number, or outside the range."""
    RESPONSE_WITHOUT_REQUEST = "response_without_request"
    """No exposure of the day has the request id."""
    ITEM_NOT_SHOWN = "item_not_shown"
    """The request did not expose the item."""


def write_responses(day: Path, name: str, table: pa.Table) -> Path:
    """Add a file of responses to a day; a reader sees it whole or not at all, also after a crash.

    Args:
        day: folder `day=YYYY-MM-DD` of a log, the day of the requests.
        name: of the file, without ending; must be new.
        table: `RESPONSES`.

    Raises:
        RequestError: another schema, or a name that is taken.
    """
    if not table.schema.equals(RESPONSES):
        raise RequestError("responses: schema", str(table.schema).replace("\n", ", "), "data.responses.RESPONSES")
    folder = day / FOLDER
    target = folder / f"{name}.parquet"
    if target.exists():
        raise RequestError(str(target), "is there already", "a name that is not in the day yet")
    folder.mkdir(parents=True, exist_ok=True)
    # The leading dot keeps readers away from a half-written file.
    partial = folder / f".{name}.parquet.partial"
    pq.write_table(table.replace_schema_metadata({METADATA: json.dumps({"format": FORMAT})}), partial)
    for path in (partial, folder):
        _sync(path)
    partial.replace(target)
    _sync(folder)
    return target


def response_files(day: Path) -> list[Path]:
    """The files of responses of a day, in order; names that begin with a dot or an underscore are the writer's own."""
    return sorted(path for path in (day / FOLDER).glob("*.parquet") if not path.name.startswith((".", "_")))


def wrong_responses(schema: pa.Schema) -> str | None:
    """What is wrong with the columns of a file of responses, or its format; None when it is one."""
    return wrong_columns(schema, RESPONSES, metadata=METADATA, version=FORMAT)


def request_digests(request_id: pa.Array) -> DigestArray:
    """[B] xxh3_64 of every id; null counts as the empty text."""
    texts = pc.fill_null(request_id, "").cast(pa.binary()).to_numpy(zero_copy_only=False)
    return np.fromiter(map(xxhash.xxh3_64_intdigest, texts), np.uint64, len(texts))


def packed(batch: pa.RecordBatch | pa.Table, response_range: tuple[float, float]) -> tuple[PairArray, Counter[str]]:
    """The sound responses of a batch as pairs of words, not sorted, and how many were left out by `ResponseFault`."""
    columns = [_joined(batch.column(name)) for name in ("request_id", "item_id", "response")]
    null_B = np.logical_or.reduce([column.is_null().to_numpy(zero_copy_only=False) for column in columns])
    null_B |= pc.fill_null(pc.binary_length(columns[0]), 0).to_numpy(zero_copy_only=False) == 0
    response_B = columns[2].fill_null(np.nan).to_numpy(zero_copy_only=False).astype(np.float32)
    low, high = response_range
    bad_B = ~null_B & ~((response_B >= low) & (response_B <= high))
    keep_B = ~null_B & ~bad_B
    pair_R = np.empty((int(keep_B.sum()), 2), np.uint64)
    pair_R[:, 0] = request_digests(columns[0])[keep_B]
    item_B = columns[1].fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
    pair_R[:, 1] = item_B[keep_B].view(np.uint32).astype(np.uint64) << np.uint64(32)
    pair_R[:, 1] |= response_B[keep_B].view(np.uint32).astype(np.uint64)
    counts = {
        ResponseFault.MISSING_RESPONSE_FIELD: int(null_B.sum()),
        ResponseFault.BAD_LATE_RESPONSE: int(bad_B.sum()),
    }
    return pair_R, Counter({fault.value: count for fault, count in counts.items() if count})


class Responses:
    """Responses of a day, joined to its exposures a batch at a time."""

    def __init__(self, words: Callable[[], tuple[DigestArray, DigestArray]]) -> None:
        """
        Args:
            words: gives digests `[R]`, sorted, and the words of item and response `[R]`; asked for every batch, so
                that files may be mapped anew and their pages do not stay in memory.
        """
        self._words = words
        self._found_R = np.zeros(len(words()[0]), np.bool_)
        self.not_shown = 0
        """Responses so far whose request did not expose the item."""

    @staticmethod
    def of(pair_R: PairArray) -> Responses:
        """Responses in memory, in any order."""
        ordered = pair_R[np.argsort(pair_R[:, 0], kind="stable")]
        digest_R, word_R = ordered[:, 0].copy(), ordered[:, 1].copy()
        return Responses(lambda: (digest_R, word_R))

    def __len__(self) -> int:
        return len(self._found_R)

    @property
    def without_request(self) -> int:
        """Responses whose request was not among the exposures so far."""
        return int((~self._found_R).sum())

    def counts(self) -> Counter[str]:
        """What could not be joined, after the last batch."""
        counts = {
            ResponseFault.RESPONSE_WITHOUT_REQUEST.value: self.without_request,
            ResponseFault.ITEM_NOT_SHOWN.value: self.not_shown,
        }
        return Counter({fault: count for fault, count in counts.items() if count})

    @property
    def digests(self) -> DigestArray:
        """Of their requests, sorted."""
        return self._words()[0]

    def join(self, table: pa.Table, digest_B: DigestArray, answered_B: BoolArray | None = None) -> pa.Table:
        """The exposures with the responses that are known of them.

        Args:
            table: `data.feedback.SCHEMA`; rows whose lists are uneven stay as they are.
            digest_B: `request_digests` of its rows.
            answered_B: rows that may have a response; others are not looked for.
        """
        among_B = np.arange(len(table)) if answered_B is None else np.flatnonzero(answered_B)
        if not len(self) or not len(among_B):
            return table
        digest_R, word_R = self._words()
        first_B = np.searchsorted(digest_R, digest_B[among_B], "left")
        count_B = np.searchsorted(digest_R, digest_B[among_B], "right") - first_B
        row_A = np.repeat(among_B, count_B)
        if not len(row_A):
            return table
        place_A = ragged.positions(first_B, count_B)
        new_A = ~self._found_R[place_A]
        self._found_R[place_A] = True
        word_A = np.array(word_R[place_A])
        item_A = (word_A >> np.uint64(32)).astype(np.uint32).view(np.int32)
        value_A = word_A.astype(np.uint32).view(np.float32)
        exposed, response = _joined(table["exposed"]), _joined(table["response"])
        even_B = _lengths(exposed) == _lengths(response)
        entry_A, known_A = _entries(exposed, row_A, item_A)
        self.not_shown += int((~known_A & new_A).sum())
        known_A &= even_B[row_A]
        # The entries of `response` and of `exposed` are not the same where another row is uneven.
        shift_B = _starts(response) - _starts(exposed)
        flat_E = response.flatten()
        value_E = flat_E.fill_null(np.nan).to_numpy(zero_copy_only=False).astype(np.float32)
        np.fmax.at(value_E, entry_A[known_A] + shift_B[row_A[known_A]], value_A[known_A])
        offsets = pa.array(np.append(_starts(response), len(value_E)).astype(np.int32), mask=_null_offsets(response))
        joined = pa.ListArray.from_arrays(offsets, pa.array(value_E, pa.float32(), from_pandas=True))
        return table.set_column(table.column_names.index("response"), "response", joined)


def read_responses(day: Path, response_range: tuple[float, float] = (0.0, 1.0)) -> tuple[Responses, Counter[str]]:
    """All responses of a day that fits into memory, and what was left out.

    Raises:
        RequestError: a file that is damaged or of another schema or format.
    """
    pairs, counts = [np.zeros((0, 2), np.uint64)], Counter[str]()
    for path in response_files(day):
        table = read_table(path, RESPONSES)
        wrong = wrong_responses(pq.read_schema(path))
        if wrong is not None:
            raise RequestError(str(path), wrong, f"format {FORMAT} of responses")
        pair_R, left_out = packed(table.combine_chunks(), response_range)
        pairs.append(pair_R)
        counts += left_out
    return Responses.of(np.concatenate(pairs)), counts


def responses_table(rows: Sequence[tuple[str, int, float, int]]) -> pa.Table:
    """`RESPONSES` of (request id, item, response, time)."""
    columns = [pa.array([row[place] for row in rows], field.type) for place, field in enumerate(RESPONSES)]
    return pa.table(columns, RESPONSES)


def _joined(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _lengths(column: pa.ListArray) -> npt.NDArray[np.int64]:
    length: npt.NDArray[np.int64] = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return length


def _starts(column: pa.ListArray) -> npt.NDArray[np.int64]:
    """[B] first entry of every row in `flatten()`."""
    length = _lengths(column)
    starts: npt.NDArray[np.int64] = np.cumsum(length) - length
    return starts


def _null_offsets(column: pa.ListArray) -> BoolArray | None:
    """The mask by which `ListArray.from_arrays` makes rows null."""
    if not column.null_count:
        return None
    return np.append(column.is_null().to_numpy(zero_copy_only=False), False)


def _entries(
    exposed: pa.ListArray, row_A: npt.NDArray[np.int64], item_A: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int64], BoolArray]:
    """[A] the entry of `exposed.flatten()` that is the item in the row, and whether there is one."""
    row_E = np.repeat(np.arange(len(exposed)), _lengths(exposed))
    item_E = exposed.flatten().fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    # A row and an item make one number, so that one sorted search finds all of them.
    wide = np.int64(2**32)
    key_E = row_E * wide + item_E + 2**31
    order_E = np.argsort(key_E, kind="stable")
    key_A = row_A * wide + item_A.astype(np.int64) + 2**31
    place_A = np.minimum(np.searchsorted(key_E[order_E], key_A), max(len(key_E) - 1, 0))
    if not len(key_E):
        return place_A, np.zeros(len(key_A), np.bool_)
    entry_A: npt.NDArray[np.int64] = order_E[place_A]
    return entry_A, key_E[entry_A] == key_A


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
