"""Streaming readers of Parquet, CSV, JSON lines and `::`-separated files: batches of raw columns, gzip included.

A file that cannot be read as what it claims to be is refused by name (`RequestError`); a single row that cannot be
parsed goes to the quarantine and the rest goes on. No reader holds more than a few batches in memory.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.csv as pv

from data.errors import RequestError
from data.parquet import READ_ERRORS, check_file, first_line, open_parquet
from data.quarantine import Quarantine, Reason
from data.sources import BATCH_ROWS

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Batch = tuple[int, pa.RecordBatch]
"""Row number of the first row among the readable rows, and the columns."""

CSV_BLOCK = 8 << 20
"""Bytes a CSV reader parses at a time; also the longest line it accepts."""


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Batch]:
    """Batches of the named columns.

    Raises:
        RequestError: unreadable, truncated, or a column is missing.
    """
    file = open_parquet(path)
    require_columns(path, file.schema_arrow.names, columns)
    row = 0
    try:
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns), use_threads=False):
            yield row, batch
            row += len(batch)
    except READ_ERRORS as error:
        raise RequestError(str(path), f"damaged after row {row} ({first_line(error)})", "a whole file") from error
    finally:
        file.close()


def parquet_schema(path: Path) -> pa.Schema:
    """Column names and types of a Parquet file."""
    with open_parquet(path) as file:
        return file.schema_arrow


def csv_header(path: Path, delimiter: str) -> list[str]:
    """Column names in the first line of a CSV file."""
    with _binary(path) as lines:
        line = next(_lines_of(path, lines), b"")
    try:
        return [name.strip().strip('"') for name in line.decode("utf-8-sig").rstrip("\r\n").split(delimiter)]
    except UnicodeDecodeError as error:
        raise RequestError(str(path), "a first line that is not UTF-8", "a line of column names") from error


def read_csv(
    path: Path, columns: Sequence[str], quarantine: Quarantine, *, delimiter: str = ",", quoted: bool = True
) -> Iterator[Batch]:
    """Batches of the named columns as text, header in the first line. Bytes that are not UTF-8 become U+FFFD, which
    no id may hold: pyarrow would lose such rows (its handler of invalid rows cannot take them).

    Raises:
        RequestError: unreadable, truncated gzip, or a column is missing.
    """
    header = csv_header(path, delimiter)
    require_columns(path, header, columns)
    if len(set(header)) != len(header):
        raise RequestError(str(path), f"header {header}", "column names without duplicates")

    def refuse(row: pv.InvalidRow) -> str:
        quarantine.reject(path.name, -1 if row.number is None else row.number, Reason.UNREADABLE_ROW, row.text or "")
        return "skip"

    first = 0
    try:
        with _binary(path) as binary:
            stream = io.BufferedReader(_Utf8Stream(binary), CSV_BLOCK)
            reader = pv.open_csv(
                stream,
                read_options=pv.ReadOptions(use_threads=False, block_size=CSV_BLOCK, column_names=header, skip_rows=1),
                parse_options=pv.ParseOptions(
                    delimiter=delimiter,
                    quote_char='"' if quoted else False,
                    newlines_in_values=quoted,
                    invalid_row_handler=refuse,
                ),
                convert_options=pv.ConvertOptions(
                    include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string()), check_utf8=False
                ),
            )
            for batch in reader:
                yield first, batch
                first += len(batch)
    except _STREAM_ERRORS as error:
        if "Empty CSV" in str(error):
            raise RequestError(str(path), "a header without rows", "a file with rows") from error
        raise RequestError(str(path), f"damaged after row {first} ({first_line(error)})", "a whole CSV") from error


def read_json_lines(path: Path, fields: Sequence[str], quarantine: Quarantine) -> Iterator[tuple[int, list[Any]]]:
    """Batches of rows (dicts restricted to `fields`) of a JSON-lines file, `.gz` or plain.

    Raises:
        RequestError: unreadable or truncated gzip.
    """
    first, rows = 0, []
    with _binary(path) as lines:
        for number, line in enumerate(_lines_of(path, lines)):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                quarantine.reject(path.name, number, Reason.UNREADABLE_ROW, line.decode("utf-8", "backslashreplace"))
                continue
            rows.append({name: row.get(name) for name in fields})
            if len(rows) == BATCH_ROWS // 4:
                yield first, rows
                first, rows = first + len(rows), []
    if rows:
        yield first, rows


def read_separated(
    path: Path, columns: Sequence[str], quarantine: Quarantine, *, separator: str, encoding: str
) -> Iterator[Batch]:
    """Batches of a file without header whose fields are divided by a separator of several characters.

    Raises:
        RequestError: unreadable.
    """
    first = 0
    with _binary(path) as lines:
        numbered = enumerate(_lines_of(path, lines))
        while chunk := list(itertools.islice(numbered, BATCH_ROWS)):
            rows = []
            for number, line in chunk:
                text = line.decode(encoding, "backslashreplace").rstrip("\r\n")
                fields = text.split(separator)
                if len(fields) == len(columns):
                    rows.append(fields)
                elif text:
                    quarantine.reject(path.name, number, Reason.UNREADABLE_ROW, text)
            arrays = [pa.array([row[i] for row in rows], pa.string()) for i in range(len(columns))]
            yield first, pa.RecordBatch.from_arrays(arrays, list(columns))
            first += len(rows)


def require_columns(path: Path, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a file that lacks a column, naming those it has."""
    missing = [name for name in wanted if name not in found]
    if missing:
        raise RequestError(
            str(path), f"no column {', '.join(missing)}", f"one of its columns: {', '.join(map(str, found))[:500]}"
        )


_STREAM_ERRORS = (*READ_ERRORS, EOFError, zlib.error)


def _binary(path: Path) -> IO[bytes]:
    check_file(path)
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


class _Utf8Stream(io.RawIOBase):
    """The bytes of a stream, with U+FFFD for what is not UTF-8."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ready = b""

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill the buffer; 0 at the end."""
        view = memoryview(buffer).cast("B")
        while not self._ready:
            piece = self._stream.read(len(view))
            self._ready = self._decoder.decode(piece, final=not piece).encode()
            if not piece:
                break
        size = min(len(view), len(self._ready))
        view[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _lines_of(path: Path, stream: IO[bytes]) -> Iterator[bytes]:
    number = 0
    try:
        for line in stream:
            yield line
            number += 1
    except _STREAM_ERRORS as error:
        raise RequestError(str(path), f"damaged after line {number} ({first_line(error)})", "a whole file") from error
