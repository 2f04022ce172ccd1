"""Reading and writing the Parquet files of a dataset, with errors that name the file; content digests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data.errors import RequestError
from data.schema import FORMAT, Card

READ_ERRORS = (pa.ArrowException, OSError, ValueError, TypeError, OverflowError)
"""What pyarrow raises on files that are damaged or not what they claim to be."""


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        RequestError: missing, empty, truncated, or not Parquet.
    """
    check_file(path)
    try:
        return pq.ParquetFile(path)
    except READ_ERRORS as error:
        raise RequestError(
            str(path), f"not readable as Parquet ({first_line(error)})", "a whole Parquet file"
        ) from error


def check_file(path: Path) -> None:
    """Refuse what is not a file with content."""
    if not path.is_file():
        raise RequestError(str(path), "a folder" if path.is_dir() else "no such file", "an existing file")
    if path.stat().st_size == 0:
        raise RequestError(str(path), "an empty file (0 bytes)", "a file with rows")


def read_table(path: Path, schema: pa.Schema, *, exact: bool = True) -> pa.Table:
    """Read one of our own Parquet files; it must have the columns of `schema` (only these when `exact`).

    Raises:
        RequestError: unreadable, or another schema.
    """
    file = open_parquet(path)
    found = file.schema_arrow
    for field in schema:
        position = found.get_field_index(field.name)
        if position < 0 or not _same_type(found.field(position).type, field.type):
            actual = "no such column" if position < 0 else str(found.field(position).type)
            raise RequestError(f"{path}: column {field.name}", actual, f"{field.type}, as windlass writes it")
    try:
        return file.read(columns=schema.names if exact else None)
    except READ_ERRORS as error:
        raise RequestError(str(path), f"damaged ({first_line(error)})", "the file as it was written") from error


def wrong_columns(found: pa.Schema, wanted: pa.Schema, *, metadata: bytes, version: int) -> str | None:
    """What is wrong with the columns of a file that its writer marked, or with its format; None when nothing is.

    Columns may be dictionary-encoded, and others may lie beside those of `wanted`.

    Args:
        metadata: key of the schema's metadata whose JSON has the `format`.
        version: the format that is known.
    """
    head = (found.metadata or {}).get(metadata)
    try:
        told: Any = json.loads(head) if head is not None else None
    except ValueError:
        return f"metadata {head!r}"
    marked = told.get("format") if isinstance(told, dict) else None
    if marked != version:
        return f"format {marked!r}, {version} is known"
    for field in wanted:
        position = found.get_field_index(field.name)
        kind = found.field(position).type if position >= 0 else None
        plain = kind.value_type if kind is not None and pa.types.is_dictionary(kind) else kind
        if plain is None or not _same_type(plain, field.type):
            return f"column {field.name} is {plain or 'absent'}, {field.type} is known"
    return None


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_list(wanted):
        return bool(pa.types.is_list(found) and found.value_type == wanted.value_type)
    return bool(found == wanted)


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class Digest:
    """Digest of named columns that arrive in pieces; equal content gives an equal digest, whatever the pieces."""

    def __init__(self, columns: int) -> None:
        self._columns = [xxhash.xxh3_128() for _ in range(columns)]

    def update(self, *arrays: npt.NDArray[np.generic]) -> None:
        """Add the next rows of every column."""
        for column, array in zip(self._columns, arrays, strict=True):
            column.update(np.ascontiguousarray(array).view(np.uint8).data)

    def hexdigest(self) -> str:
        """32 hexadecimal digits."""
        return xxhash.xxh3_128(b"".join(column.digest() for column in self._columns)).hexdigest()


def digest_arrays(*arrays: npt.NDArray[np.generic]) -> str:
    """Digest of whole columns."""
    digest = Digest(len(arrays))
    digest.update(*arrays)
    return digest.hexdigest()


def fingerprint_of(card: Card) -> str:
    """Digest of the contents (by their digests) and of the split; neither names, paths nor the import's rules count."""
    text = repr((FORMAT, sorted(card["digests"].items()), sorted(card["split"].items())))
    return digest_arrays(np.frombuffer(text.encode(), np.uint8))
