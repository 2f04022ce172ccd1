"""The event stream of an import, sorted without holding it: buckets of users on disk.

Pass 1 checks the rows batch by batch and appends each to the bucket of its user's hash. Pass 2 takes one bucket at a
time: sorts it by user, time and source order, and drops duplicates. Users are numbered by the hash of their key, so
the numbers depend neither on the order of the source nor on the number of buckets. Memory is one batch plus one bucket.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from data.columns import Column, first_reasons, keys, ratings, seconds
from data.items import ItemNumbers
from data.kcore import Pairs
from data.quarantine import Quarantine, Reason
from data.records import IntArray, LongArray
from data.sources import RawEvents, Source

BUCKET_BITS = 6
"""64 buckets: 160,000 rows each at ten million."""

_BUCKET_SCHEMA = pa.schema(
    [
        ("user_key", pa.string()),
        ("user_hash", pa.uint64()),
        ("item", pa.int32()),
        ("timestamp", pa.int64()),
        ("rating", pa.float32()),
        ("order", pa.int64()),
    ]
)
_SORTED_SCHEMA = pa.schema(
    [("user", pa.int32()), ("item", pa.int32()), ("timestamp", pa.int64()), ("rating", pa.float32())]
)


@dataclass(frozen=True, kw_only=True)
class SortedBucket:
    """Events of one bucket, ordered by user (dense in the bucket), time, source order."""

    user: IntArray
    item: IntArray
    timestamp: LongArray
    rating: pa.Array


class EventBuckets:
    """All events of a source on disk, by users."""

    def __init__(self, folder: Path, quarantine: Quarantine) -> None:
        self._folder = folder
        self._quarantine = quarantine
        self._files: list[tuple[int, str, int]] = []
        self._numbers: list[int] = []
        self.rows_read = 0
        self.out_of_order = 0
        """Rows that were earlier than the row before them of the same user, in the order of the source; sorted in."""

    def fill(self, source: Source, items: ItemNumbers) -> None:
        """Pass 1: check every row and append the sound ones to their bucket."""
        sinks: dict[int, pa.RecordBatchFileWriter] = {}
        try:
            for raw in source.events(self._quarantine):
                batch = self._check(raw, items, source)
                if len(batch) == 0:
                    continue
                bucket = (batch.column("user_hash").to_numpy() >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
                order = np.argsort(bucket, kind="stable")
                batch = batch.take(pa.array(order))
                edges = np.searchsorted(bucket[order], np.arange((1 << BUCKET_BITS) + 1))
                for number in np.flatnonzero(np.diff(edges)).tolist():
                    if number not in sinks:
                        sinks[number] = pa.ipc.new_file(str(self._path("raw", number)), _BUCKET_SCHEMA)
                    sinks[number].write_batch(batch.slice(edges[number], edges[number + 1] - edges[number]))
        finally:
            for sink in sinks.values():
                sink.close()
            self._numbers = sorted(sinks)

    def sort(self, *, drop_duplicates: bool) -> None:
        """Pass 2: sort each bucket, and drop duplicates."""
        for number in self._numbers:
            raw = _read(self._path("raw", number))
            self._path("raw", number).unlink()
            user, words = _number_users(raw)
            time, order = raw["timestamp"].to_numpy(), raw["order"].to_numpy()
            self.out_of_order += _backward_steps(user, time, order)
            rows = np.lexsort((order, time, user))
            if drop_duplicates:
                rows = self._without_duplicates(raw, rows, user, raw["item"].to_numpy(), time)
            table = pa.table(
                [pa.array(user[rows]), *(raw[name].take(pa.array(rows)) for name in ("item", "timestamp", "rating"))],
                schema=_SORTED_SCHEMA,
            )
            _write(self._path("sorted", number), table)
            _write(self._path("users", number), pa.table({"user_key": words}))

    def sorted_buckets(self) -> Iterator[SortedBucket]:
        """The sorted events, bucket by bucket."""
        for number in self._numbers:
            table = _read(self._path("sorted", number))
            yield SortedBucket(
                user=table["user"].to_numpy(),
                item=table["item"].to_numpy(),
                timestamp=table["timestamp"].to_numpy(),
                rating=table["rating"].combine_chunks(),
            )

    def pairs(self) -> Iterator[Pairs]:
        """Users and items only, for the k-core."""
        for bucket in self.sorted_buckets():
            yield bucket.user, bucket.item

    def user_keys(self) -> Iterator[pa.Array]:
        """Keys of the users of each bucket, in the order of their numbers."""
        for number in self._numbers:
            yield _read(self._path("users", number))["user_key"].combine_chunks()

    def _check(self, raw: RawEvents, items: ItemNumbers, source: Source) -> pa.RecordBatch:
        rows = len(raw.user)
        self._files.append((self.rows_read, raw.source, raw.first_row))
        order = np.arange(self.rows_read, self.rows_read + rows)
        self.rows_read += rows
        user = keys(raw.user, "user", Reason.MISSING_USER)
        item = keys(raw.item, "item", Reason.MISSING_ITEM)
        time = seconds(raw.timestamp, "timestamp", source.time_unit)
        rating = ratings(raw.rating, rows, "rating")
        failed, _ = first_reasons([user, item, time, rating], rows)
        number = items.numbers(pc.if_else(pa.array(~failed), item.values, pa.scalar(None, pa.string())))
        unknown = Column(item.values, [(Reason.UNKNOWN_ITEM, ~failed & (number < 0))])
        failed, reasons = first_reasons([user, item, time, rating, unknown], rows)
        if failed.any():
            bad = np.flatnonzero(failed)
            names = ["user", "item", "timestamp", "rating"]
            columns = [raw.user, raw.item, raw.timestamp, pa.nulls(rows) if raw.rating is None else raw.rating]
            shown = pa.RecordBatch.from_arrays(columns, names).take(pa.array(bad))
            told = [reason for row in bad if (reason := reasons[row]) is not None]
            self._quarantine.reject_rows(raw.source, (raw.first_row + bad).tolist(), told, shown)
        kept = pa.array(np.flatnonzero(~failed))
        word = user.values.take(kept)
        columns = [word, _hashes(word), pa.array(number).take(kept), time.values.take(kept), rating.values.take(kept)]
        return pa.RecordBatch.from_arrays([*columns, pa.array(order).take(kept)], schema=_BUCKET_SCHEMA)

    def _without_duplicates(
        self, raw: pa.Table, rows: LongArray, user: IntArray, item: IntArray, time: LongArray
    ) -> LongArray:
        """`rows` without later events of the same user, item and time."""
        by_event = np.lexsort((np.arange(len(rows)), item[rows], time[rows], user[rows]))
        ordered = rows[by_event]
        same = np.zeros(len(rows), bool)
        same[1:] = (
            (user[ordered[1:]] == user[ordered[:-1]])
            & (time[ordered[1:]] == time[ordered[:-1]])
            & (item[ordered[1:]] == item[ordered[:-1]])
        )
        if not same.any():
            return rows
        repeated = np.sort(by_event[same])
        dropped = rows[repeated]
        contents = raw.take(pa.array(dropped)).drop_columns(["user_hash", "order"])
        for order, content in zip(raw["order"].to_numpy()[dropped], contents.to_pylist(), strict=True):
            self._quarantine.reject(*self._origin(int(order)), Reason.DUPLICATE_EVENT, content)
        return np.delete(rows, repeated)

    def _origin(self, order: int) -> tuple[str, int]:
        """File and row of the event with this number in the whole stream."""
        where = np.searchsorted([start for start, _, _ in self._files], order, side="right") - 1
        start, source, first = self._files[int(where)]
        return source, first + order - start

    def _path(self, kind: str, number: int) -> Path:
        return self._folder / f"{kind}-{number:03d}.arrow"


def _number_users(raw: pa.Table) -> tuple[IntArray, pa.Array]:
    """Number of each row's user within the bucket, by (hash, key), and the keys in that order."""
    coded = raw["user_key"].combine_chunks().dictionary_encode()
    words = coded.dictionary
    text = words.cast(pa.binary()).to_pylist()
    hashes = [xxhash.xxh3_64_intdigest(word) for word in text]
    ranked = sorted(range(len(text)), key=lambda i: (hashes[i], text[i]))
    rank = np.empty(len(text), np.int32)
    rank[ranked] = np.arange(len(text), dtype=np.int32)
    return rank[coded.indices.to_numpy()], words.take(pa.array(ranked, pa.int64()))


def _hashes(word: pa.Array) -> pa.Array:
    coded = word.dictionary_encode()
    table = np.asarray(
        [xxhash.xxh3_64_intdigest(text) for text in coded.dictionary.cast(pa.binary()).to_pylist()], np.uint64
    )
    return pa.array(table[coded.indices.to_numpy()], pa.uint64())


def _backward_steps(user: IntArray, time: LongArray, order: npt.NDArray[np.integer]) -> int:
    rows = np.lexsort((order, user))
    same = user[rows[1:]] == user[rows[:-1]]
    return int((same & (time[rows[1:]] < time[rows[:-1]])).sum())


def _write(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(str(path), table.schema) as sink:
        sink.write_table(table)


def _read(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
        return reader.read_all()
