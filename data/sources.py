"""What an importer gives to the import: streams of raw events and raw items, and how to read their times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

import pyarrow as pa

from data.quarantine import Quarantine

BATCH_ROWS = 131_072
"""Rows per batch; bounds the memory of an import."""


class TimeUnit(StrEnum):
    """Unit of numeric timestamps; columns with an Arrow time type bring their own."""

    SECONDS = "s"
    MILLISECONDS = "ms"
    MICROSECONDS = "us"
    NANOSECONDS = "ns"
    ORDER = "order"
    """No clock: numbers that only order the events of a user."""


@dataclass(frozen=True, kw_only=True)
class RawEvents:
    """A batch of events as they stand in a file; columns of any type."""

    source: str
    """File name, for messages and the quarantine."""
    first_row: int
    """0-based row of the batch's first row among the file's readable rows."""
    user: pa.Array
    item: pa.Array
    timestamp: pa.Array
    rating: pa.Array | None


@dataclass(frozen=True, kw_only=True)
class RawItems:
    """A batch of the item table."""

    source: str
    first_row: int
    key: pa.Array
    title: pa.Array
    attributes: pa.RecordBatch
    """Further columns, by the names of `Source.attributes`; bytes where that says string."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Something that can be imported."""

    name: str
    """Name of the dataset unless the user gives one."""
    description: dict[str, str]
    """Where it came from, for dataset.json."""
    events: Callable[[Quarantine], Iterator[RawEvents]]
    items: Callable[[Quarantine], Iterator[RawItems]] | None = None
    """Read twice: once for the keys, once for the kept rows. None where there is no item table."""
    attributes: pa.Schema = field(default_factory=lambda: pa.schema([]))
    time_unit: TimeUnit = TimeUnit.SECONDS
