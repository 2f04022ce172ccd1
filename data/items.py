"""The item table of an import: keys to numbers while events stream by, and items.parquet of the items that stay.

Memory grows with the number of items (a dictionary of their keys), never with their attributes: the source's item
table is read twice, once for the keys and once for the rows of the items that stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.columns import first_reasons, keys, texts, titles
from data.errors import RequestError
from data.parquet import Digest
from data.quarantine import Quarantine, Reason
from data.records import BoolArray, IntArray
from data.schema import ITEM_FIELDS
from data.sources import RawItems, Source

_TIMES = ("active_from", "active_to")


class ItemNumbers:
    """Provisional numbers of item keys: item table first, in its order, then other items by first appearance."""

    def __init__(self, source: Source, quarantine: Quarantine, *, require_titles: bool, add_unknown: bool) -> None:
        """Read the keys of the item table.

        Args:
            require_titles: drop items without a title (their events become `unknown_item`).
            add_unknown: take items that are not in the table; otherwise their events are dropped.
        """
        self._source = source
        self._number: dict[str, int] = {}
        self._add_unknown = add_unknown or source.items is None
        self._kept_rows: list[npt.NDArray[np.int32]] = []
        for raw in source.items(quarantine) if source.items is not None else ():
            self._read_keys(raw, quarantine, require_titles)
        self.in_table = len(self._number)
        if source.items is not None and not self.in_table:
            raise RequestError("items", "no usable row in the item table", "at least one item with a key")

    def __len__(self) -> int:
        return len(self._number)

    def numbers(self, key: pa.Array) -> IntArray:
        """Number of each key; -1 for null, and for unknown keys unless these are added."""
        coded = key.dictionary_encode()
        words = coded.dictionary.to_pylist()
        if self._add_unknown:
            found = [self._number.setdefault(word, len(self._number)) for word in words]
        else:
            found = [self._number.get(word, -1) for word in words]
        table = np.asarray([*found, -1], np.int32)
        index = coded.indices.fill_null(len(words)).to_numpy(zero_copy_only=False)
        return np.asarray(table[index])

    def write(self, path: Path, kept: BoolArray) -> tuple[int, str]:
        """Write items.parquet with the kept items renumbered densely in order; returns items without title, digest."""
        final = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
        schema = pa.schema([*ITEM_FIELDS, *self._source.attributes])
        digest = Digest(2)
        untitled = 0
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for table in self._rows(final, schema):
                untitled += len(table) - int(pc.sum(table["has_title"]).as_py() or 0)
                text = "\n".join(f"{k}\t{t}" for k, t in zip(*_pair(table), strict=True)) + "\n"
                digest.update(table["item_id"].to_numpy(), np.frombuffer(text.encode(), np.uint8))
                writer.write_table(table)
        return untitled, digest.hexdigest()

    def _read_keys(self, raw: RawItems, quarantine: Quarantine, require_titles: bool) -> None:
        column = keys(raw.key, "item", Reason.MISSING_ITEM)
        failed, reasons = first_reasons([column], len(raw.key))
        untitled = titles(raw.title).is_null().to_numpy(zero_copy_only=False)
        number = np.full(len(failed), -1, np.int32)
        refused: list[tuple[int, Reason]] = []
        for row, word in enumerate(column.values.to_pylist()):
            reason = reasons[row]
            if reason is None and word in self._number:
                reason = Reason.DUPLICATE_ITEM
            if reason is None and require_titles and untitled[row]:
                reason = Reason.NO_TITLE
            if reason is None:
                number[row] = self._number[word] = len(self._number)
            else:
                refused.append((row, reason))
        self._kept_rows.append(number)
        if refused:
            rows = [row for row, _ in refused]
            shown = pa.RecordBatch.from_arrays([raw.key, raw.title], ["item", "title"]).take(pa.array(rows))
            quarantine.reject_rows(raw.source, [raw.first_row + row for row in rows], [r for _, r in refused], shown)

    def _rows(self, final: IntArray, schema: pa.Schema) -> Iterator[pa.Table]:
        batches = self._source.items(_SILENT) if self._source.items is not None else iter(())
        for number, raw in zip(self._kept_rows, batches, strict=True):
            row = np.flatnonzero((number >= 0) & (final[number] >= 0))
            if len(row):
                yield self._table(raw, row, final[number[row]], schema)
        words = list(self._number)[self.in_table :]
        where = final[self.in_table :]
        added = [word for word, item in zip(words, where, strict=True) if item >= 0]
        if added:
            columns: dict[str, pa.Array] = {
                "item_id": pa.array(where[where >= 0], pa.int32()),
                "item_key": pa.array(added, pa.string()),
                "title": pa.array(added, pa.string()),
                "has_title": pa.array(np.zeros(len(added), bool)),
            }
            yield _filled(columns, len(added), schema)

    def _table(self, raw: RawItems, row: npt.NDArray[np.integer], item: IntArray, schema: pa.Schema) -> pa.Table:
        rows = pa.array(row)
        key = keys(raw.key, "item", Reason.MISSING_ITEM).values.take(rows)
        title = titles(raw.title).take(rows)
        columns = {
            "item_id": pa.array(item, pa.int32()),
            "item_key": key,
            "title": pc.coalesce(title, key),
            "has_title": title.is_valid(),
        }
        for field in self._source.attributes:
            column = raw.attributes.column(field.name).take(rows)
            columns[field.name] = texts(column) if pa.types.is_string(field.type) else column.cast(field.type)
        return _filled(columns, len(row), schema)


class _Silent(Quarantine):
    """For the second reading, whose bad rows the first one has told."""

    def __init__(self) -> None:
        super().__init__(Path())

    def reject(self, source: str, row: int, reason: Reason, content: object) -> None:
        """Nothing."""


_SILENT = _Silent()


def _filled(columns: dict[str, pa.Array], rows: int, schema: pa.Schema) -> pa.Table:
    return pa.table([columns.get(f.name, pa.nulls(rows, f.type)) for f in schema], schema=schema)


def _pair(table: pa.Table) -> tuple[list[str], list[str]]:
    return table["item_key"].to_pylist(), table["title"].to_pylist()
