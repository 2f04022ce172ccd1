"""Rows that an import could not take as they are: nothing is lost, and every row has a reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.schema import QUARANTINE_SCHEMA

FLUSH_ROWS = 8_192


class Reason(StrEnum):
    """Why a row was dropped or repaired. The counts in dataset.json use these names."""

    UNREADABLE_ROW = "unreadable_row"
    """Not parsable: wrong number of fields, broken JSON, not UTF-8."""
    MISSING_USER = "missing_user"
    MISSING_ITEM = "missing_item"
    NEGATIVE_ID = "negative_id"
    BAD_ID = "bad_id"
    """An id with a fraction, or text that is not UTF-8."""
    MISSING_TIMESTAMP = "missing_timestamp"
    BAD_TIMESTAMP = "bad_timestamp"
    """Not a number, or outside 1970 to 2100 in the declared unit."""
    NAN_RATING = "nan_rating"
    BAD_RATING = "bad_rating"
    """Not a finite number."""
    UNKNOWN_ITEM = "unknown_item"
    """The event's item (or a row's target) is not in the item table."""
    UNKNOWN_HISTORY_ITEM = "unknown_history_item"
    """The history held items that are not in the catalogue; they were taken out of it."""
    EMPTY_HISTORY = "empty_history"
    HISTORY_AFTER_TARGET = "history_after_target"
    """A given row whose history is later than its target."""
    BAD_HISTORY = "bad_history"
    """A history that is missing, or whose timestamps are out of order or of another number."""
    DUPLICATE_EVENT = "duplicate_event"
    """Same user, item and time as an earlier row."""
    DUPLICATE_ITEM = "duplicate_item"
    """The item key occurs before in the item table; the first row counts."""
    NO_TITLE = "no_title"
    """An item without title, where titles are demanded."""
    K_CORE = "k_core"
    """Removed by the k-core filter; counted only, the rows are sound."""
    ITEM_WITHOUT_EVENTS = "item_without_events"
    """An item of the item table that no kept event names; counted only."""


class Quarantine:
    """Collects the rows that are dropped or repaired into `quarantine/rows.parquet`, and counts them by reason."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "rows.parquet"
        self.dropped: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self._rows: list[dict[str, object]] = []
        self._writer: pq.ParquetWriter | None = None

    def reject(self, source: str, row: int, reason: Reason, content: object) -> None:
        """Drop one row."""
        self._add(source, row, reason, "dropped", content)

    def repair(self, source: str, row: int, reason: Reason, content: object) -> None:
        """Keep one row in a repaired form; the row as it was goes to the file."""
        self._add(source, row, reason, "repaired", content)

    def reject_rows(self, source: str, rows: Iterable[int], reasons: Iterable[Reason], table: pa.RecordBatch) -> None:
        """Drop rows given as a table of their contents, one line of it per row."""
        for row, reason, content in zip(rows, reasons, table.to_pylist(), strict=True):
            self.reject(source, row, reason, content)

    def count(self, reason: Reason, rows: int) -> None:
        """Count sound rows that a filter removed; they are not written."""
        if rows:
            self.dropped[reason.value] += rows

    def close(self) -> None:
        """Write what is left and close the file; without any row there is no file."""
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def _add(self, source: str, row: int, reason: Reason, action: str, content: object) -> None:
        (self.dropped if action == "dropped" else self.repaired)[reason.value] += 1
        text = content if isinstance(content, str) else json.dumps(content, default=_plain, ensure_ascii=False)
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
        self.examples.setdefault(reason.value, f"{source}, row {row}: {text[:200]}")
        self._rows.append({"source": source, "row": row, "reason": reason.value, "action": action, "content": text})
        if len(self._rows) >= FLUSH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self.path, QUARANTINE_SCHEMA, compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=QUARANTINE_SCHEMA))
        self._rows = []


def _plain(value: Any) -> str:
    """JSON form of what Parquet holds beyond JSON: bytes, dates, decimals."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
