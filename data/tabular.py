"""Any Parquet or CSV file (or folder of such files) with named columns, and folders in the common schema.

The common schema is `interactions.parquet (user_id, item_id, timestamp, rating)` beside `items.parquet (item_id,
title, ...)`; where no event has a time, a column `pos` orders the events of each user.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from pydantic import Field

from data.errors import RequestError
from data.parquet import open_parquet
from data.quarantine import Quarantine
from data.reading import Batch, csv_header, parquet_schema, read_csv, read_parquet, require_columns
from data.schema import ITEM_FIELDS
from data.settings import Settings
from data.sources import RawEvents, RawItems, Source, TimeUnit

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_OURS = {"item_id", "item_key", "title", "has_title"}


class ColumnNames(Settings):
    """Names of the columns in the user's files."""

    user: str = Field("user_id", min_length=1)
    """Column of the user: integers or text."""
    item: str = Field("item_id", min_length=1)
    """Column of the item, in the events and in the item table."""
    timestamp: str = Field("timestamp", min_length=1)
    """Column of the time."""
    rating: str = Field("rating")
    """Column of the rating, optional: where the file has no such column, ratings are null."""
    title: str = Field("title", min_length=1)
    """Column of the title in the item table."""


def table(
    path: Path, items: Path | None, columns: ColumnNames, time_unit: TimeUnit, *, description: str = "table"
) -> Source:
    """Events (and optionally items) from Parquet or CSV files with named columns.

    Args:
        path: a .parquet, .csv or .tsv file (.gz allowed for text), or a folder of such files, read in order of name.
        items: the item table; None where there is none (titles are then unknown).

    Raises:
        RequestError: no such file, an unknown ending, or a missing column.
    """
    files = _files(path)
    with_rating = {file: bool(columns.rating) and columns.rating in _names(file) for file in files}
    for file in files:
        require_columns(file, _names(file), [columns.user, columns.item, columns.timestamp])

    def events(quarantine: Quarantine) -> Iterator[RawEvents]:
        for file in files:
            wanted = [columns.user, columns.item, columns.timestamp, *([columns.rating] if with_rating[file] else [])]
            for first, batch in _read(file, list(dict.fromkeys(wanted)), quarantine):
                yield RawEvents(
                    source=file.name,
                    first_row=first,
                    user=batch.column(columns.user),
                    item=batch.column(columns.item),
                    timestamp=batch.column(columns.timestamp),
                    rating=batch.column(columns.rating) if with_rating[file] else None,
                )

    attributes = item_attributes(items, columns) if items is not None else pa.schema([])
    return Source(
        name=path.name.split(".")[0] or "table",
        description={"source": description, "files": str(path), **({"items": str(items)} if items else {})},
        events=events,
        items=(lambda quarantine: item_batches(items, columns, attributes, quarantine)) if items is not None else None,
        attributes=attributes,
        time_unit=time_unit,
    )


def common_folder(path: Path) -> Source:
    """A folder in the common schema.

    Raises:
        RequestError: a file or column is missing.
    """
    events, items = path / "interactions.parquet", path / "items.parquet"
    columns, unit = ColumnNames(), TimeUnit.SECONDS
    if "pos" in parquet_schema(events).names and _without_time(events):
        columns, unit = ColumnNames(timestamp="pos"), TimeUnit.ORDER
    return dataclasses.replace(table(events, items, columns, unit, description=path.name), name=path.resolve().name)


def item_attributes(path: Path, columns: ColumnNames) -> pa.Schema:
    """Further columns of an item table that are taken along.

    Raises:
        RequestError: unreadable, or without the item or title column.
    """
    names = _names(path)
    require_columns(path, names, [columns.item, columns.title])
    used = {columns.item, columns.title} | _OURS
    if path.suffix != ".parquet":
        return pa.schema([(name, pa.string()) for name in names if name not in used])
    schema = parquet_schema(path)
    kept = [_attribute(field) for field in schema if field.name not in used]
    return pa.schema(kept)


def item_batches(path: Path, columns: ColumnNames, attributes: pa.Schema, quarantine: Quarantine) -> Iterator[RawItems]:
    """The item table, batch by batch."""
    for first, batch in _read(path, [columns.item, columns.title, *attributes.names], quarantine):
        yield RawItems(
            source=path.name,
            first_row=first,
            key=batch.column(columns.item),
            title=batch.column(columns.title),
            attributes=batch.select(attributes.names),
        )


def _attribute(field: pa.Field) -> pa.Field:
    kind = field.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    times = {known.name: known.type for known in ITEM_FIELDS if known.name.startswith("active_")}
    return pa.field(field.name, times.get(field.name, kind))


def _without_time(path: Path) -> bool:
    with open_parquet(path) as file:
        for batch in file.iter_batches(columns=["timestamp"]):
            if batch.column(0).null_count < len(batch):
                return False
    return True


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        _kind(path)
        return [path]
    files = sorted(file for file in path.iterdir() if _suffix(file) in {".parquet", *_DELIMITERS})
    if not files:
        raise RequestError(str(path), "no .parquet, .csv or .tsv file in the folder", "a folder of such files")
    return files


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _kind(path: Path) -> str:
    suffix = _suffix(path)
    if suffix not in {".parquet", *_DELIMITERS}:
        raise RequestError(str(path), f"ending {suffix or 'none'}", ".parquet, .csv, .tsv, .csv.gz or .tsv.gz")
    return suffix


def _names(path: Path) -> list[str]:
    kind = _kind(path)
    return list(parquet_schema(path).names) if kind == ".parquet" else csv_header(path, _DELIMITERS[kind])


def _read(path: Path, columns: Sequence[str], quarantine: Quarantine) -> Iterator[Batch]:
    kind = _kind(path)
    if kind == ".parquet":
        return read_parquet(path, columns)
    return read_csv(path, columns, quarantine, delimiter=_DELIMITERS[kind])
