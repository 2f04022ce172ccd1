"""Import of a published split: folders with train, valid and test rows that must stay exactly as they were given.

A row is (user, history, target, time). Rows keep their order; times may be unknown (null). What is wrong with a row is
told: a row whose target is unknown is dropped, items of a history that are not in the catalogue are taken out of it
and the row is kept.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from data.columns import Column, first_reasons, keys, seconds
from data.dataset import Dataset
from data.errors import RequestError
from data.events import EventBuckets
from data.importing import ImportRules, check_bad_share, finish_card, new_folder
from data.items import ItemNumbers
from data.parquet import Digest
from data.quarantine import Quarantine, Reason
from data.reading import parquet_schema, read_parquet, require_columns
from data.records import BoolArray, IntArray
from data.schema import (
    FORMAT,
    INTERACTION_SCHEMA,
    INTERACTIONS,
    ITEMS,
    QUARANTINE,
    SPLIT_NAMES,
    SPLIT_SCHEMA,
    SPLITS,
    USER_SCHEMA,
    USERS,
    Card,
)
from data.sources import TimeUnit
from data.split import Given
from data.tabular import common_folder

_COLUMNS = ("user_id", "history", "target")


def import_given(
    path: Path,
    out: Path,
    rules: ImportRules,
    *,
    train_aux: bool = False,
    caveat: str = "",
    name: str = "",
    overwrite: bool = False,
) -> Dataset:
    """Import a folder with items.parquet, train.parquet, valid.parquet and test.parquet.

    Args:
        train_aux: add the rows of train_aux.parquet (without times) to the training rows.
        caveat: words that every evaluation on the dataset carries; empty for none.

    Raises:
        RequestError: as `data.importing.import_source`, or a split without rows.
    """
    files = {split: [path / f"{split}.parquet"] for split in SPLIT_NAMES}
    if train_aux:
        files["train"].insert(0, path / "train_aux.parquet")
    for file in [file for group in files.values() for file in group]:
        require_columns(file, parquet_schema(file).names, _COLUMNS)
    source = common_folder(path)
    with new_folder(out, overwrite=overwrite) as folder:
        quarantine = Quarantine(folder / QUARANTINE)
        items = ItemNumbers(source, quarantine, require_titles=False, add_unknown=False)
        bad_items = sum(quarantine.dropped.values())
        scratch = folder / "buckets"
        scratch.mkdir()
        buckets = EventBuckets(scratch, quarantine)
        buckets.fill(source, items)
        buckets.sort(drop_duplicates=False)
        users = _number_users([*(f for group in files.values() for f in group)], buckets)
        events, events_digest = _write_interactions(folder / INTERACTIONS, buckets, users)
        shutil.rmtree(scratch)
        _write_users(folder / USERS, users)
        (folder / SPLITS).mkdir()
        digests, rows, read = {"interactions": events_digest}, {}, buckets.rows_read
        for split, group in files.items():
            writer = _RowWriter(folder / SPLITS / f"{split}.parquet", users, items, quarantine)
            for file in group:
                writer.copy(file)
            writer.close()
            digests[split], rows[split] = writer.digest.hexdigest(), writer.rows
            read += writer.rows_read
            if writer.rows == 0:
                raise RequestError(str(path / f"{split}.parquet"), "no usable row", "at least one row")
        check_bad_share(quarantine, sum(quarantine.dropped.values()) - bad_items, read, rules)
        untitled, digests["items"] = items.write(folder / ITEMS, np.ones(len(items), bool))
        quarantine.close()
        card: Card = {
            "format": FORMAT,
            "name": name or path.name,
            "source": {**source.description, "train_aux": str(train_aux).lower()},
            "clock": "order" if source.time_unit is TimeUnit.ORDER else "seconds",
            "rules": {"split": "given"},
            "counts": {
                "rows_read": read,
                "events": events,
                "users": len(users),
                "items": len(items),
                "items_without_title": untitled,
                "rows_out_of_order": buckets.out_of_order,
            },
            "dropped": dict(sorted(quarantine.dropped.items())),
            "repaired": dict(sorted(quarantine.repaired.items())),
            "split": {**Given().model_dump(mode="json"), "rows": rows},
            "digests": digests,
            **({"caveat": caveat} if caveat else {}),
        }
        finish_card(folder, card)
    return Dataset.open(out)


@dataclass
class _Rows:
    """Checked rows of a batch."""

    user: IntArray
    history: list[list[int]]
    target: IntArray
    timestamp: pa.Array


class _RowWriter:
    """Copies the rows of one split, with dense numbers."""

    def __init__(self, path: Path, users: dict[str, int], items: ItemNumbers, quarantine: Quarantine) -> None:
        self._users, self._items, self._quarantine = users, items, quarantine
        self._writer = pq.ParquetWriter(path, SPLIT_SCHEMA, compression="zstd")
        self.digest = Digest(5)
        self.rows = 0
        self.rows_read = 0

    def copy(self, file: Path) -> None:
        """Append the rows of one file."""
        names = parquet_schema(file).names
        optional = [name for name in ("timestamp", "history_timestamps") if name in names]
        for first, batch in read_parquet(file, [*_COLUMNS, *optional]):
            rows = self._check(file.name, first, batch)
            length = np.asarray([len(history) for history in rows.history], np.int64)
            values = np.asarray([item for history in rows.history for item in history], np.int32)
            offsets = pa.array(np.concatenate([[0], np.cumsum(length)]), pa.int32())
            columns = [
                pa.array(rows.user),
                pa.ListArray.from_arrays(offsets, pa.array(values)),
                pa.array(rows.target),
                rows.timestamp,
            ]
            self._writer.write_table(pa.table(columns, schema=SPLIT_SCHEMA))
            time = rows.timestamp.fill_null(0).to_numpy(zero_copy_only=False)
            self.digest.update(rows.user, rows.target, time, values, length)
            self.rows += len(length)

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()

    def _check(self, source: str, first: int, batch: pa.RecordBatch) -> _Rows:
        rows = len(batch)
        self.rows_read += rows
        history = batch.column("history")
        if not _is_list(history.type):
            raise RequestError(f"{source}: column history", str(history.type), "a list of item ids")
        user = keys(batch.column("user_id"), "user_id", Reason.MISSING_USER)
        target = keys(batch.column("target"), "target", Reason.MISSING_ITEM)
        number = self._items.numbers(target.values)
        failed, _ = first_reasons([user, target], rows)
        checks = [user, target, Column(target.values, [(Reason.UNKNOWN_ITEM, ~failed & (number < 0))])]
        time = pa.nulls(rows, pa.int64())
        if "timestamp" in batch.schema.names:
            column = seconds(batch.column("timestamp"), "timestamp", TimeUnit.SECONDS)
            time = column.values
            checks.append(Column(time, [f for f in column.failures if f[0] is not Reason.MISSING_TIMESTAMP]))
        items, changed, unsound = self._histories(batch, time)
        failed, reasons = first_reasons([*checks, Column(time, unsound)], rows)
        for row in np.flatnonzero(failed | changed):
            content = batch.slice(row, 1).to_pylist()[0]
            reason = reasons[row]
            if reason is not None:
                self._quarantine.reject(source, first + int(row), reason, content)
            else:
                self._quarantine.repair(source, first + int(row), Reason.UNKNOWN_HISTORY_ITEM, content)
        kept = np.flatnonzero(~failed)
        words = user.values.take(pa.array(kept)).to_pylist()
        return _Rows(
            user=np.asarray([self._users[word] for word in words], np.int32),
            history=[items[row] for row in kept],
            target=number[kept],
            timestamp=time.take(pa.array(kept)),
        )

    def _histories(
        self, batch: pa.RecordBatch, time: pa.Array
    ) -> tuple[list[list[int]], BoolArray, list[tuple[Reason, BoolArray]]]:
        """Known items of each history; rows that lost unknown ones; rows whose history is unsound."""
        history = batch.column("history")
        absent = np.asarray(history.is_null().to_numpy(zero_copy_only=False), bool)
        length = pc.list_value_length(history).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        flat = self._items.numbers(keys(history.flatten(), "history", Reason.MISSING_ITEM).values)
        pieces = np.split(flat, np.cumsum(length)[:-1]) if len(length) else []
        items = [piece[piece >= 0].tolist() for piece in pieces]
        left = np.asarray([len(known) for known in items], np.int64).reshape(-1)
        misfit, late = np.zeros(len(batch), bool), np.zeros(len(batch), bool)
        if "history_timestamps" in batch.schema.names:
            moments = zip(batch.column("history_timestamps").to_pylist(), time.to_pylist(), strict=True)
            for row, (stamps, end) in enumerate(moments):
                known = [stamp for stamp in stamps or () if stamp is not None]
                misfit[row] = stamps is not None and (len(stamps) != length[row] or known != sorted(known))
                late[row] = end is not None and bool(known) and max(known) > end
        unsound = [
            (Reason.BAD_HISTORY, absent | misfit),
            (Reason.HISTORY_AFTER_TARGET, late),
            (Reason.EMPTY_HISTORY, ~absent & (left == 0)),
        ]
        return items, left < length, unsound


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _number_users(files: list[Path], buckets: EventBuckets) -> dict[str, int]:
    """Dense numbers of all users of the rows and events, ordered as the buckets are."""
    words = {word for column in buckets.user_keys() for word in column.to_pylist()}
    for file in files:
        for _, batch in read_parquet(file, ["user_id"]):
            words.update(keys(batch.column(0), "user_id", Reason.MISSING_USER).values.drop_null().to_pylist())
    ordered = sorted(words, key=lambda word: (xxhash.xxh3_64_intdigest(word.encode()), word.encode()))
    return {word: number for number, word in enumerate(ordered)}


def _write_users(path: Path, users: dict[str, int]) -> None:
    numbers = pa.array(np.arange(len(users)), pa.int32())
    pq.write_table(pa.table([numbers, pa.array(list(users), pa.string())], schema=USER_SCHEMA), path)


def _write_interactions(folder: Path, buckets: EventBuckets, users: dict[str, int]) -> tuple[int, str]:
    """Events of all splits beside the rows; returns their number and digest."""
    folder.mkdir()
    digest, events = Digest(3), 0
    with pq.ParquetWriter(folder / "part-00000.parquet", INTERACTION_SCHEMA, compression="zstd") as writer:
        for bucket, words in zip(buckets.sorted_buckets(), buckets.user_keys(), strict=True):
            final = np.asarray([users[word] for word in words.to_pylist()], np.int32)
            user = final[bucket.user]
            columns = [pa.array(user), pa.array(bucket.item), pa.array(bucket.timestamp), bucket.rating]
            writer.write_table(pa.table(columns, schema=INTERACTION_SCHEMA))
            digest.update(user, bucket.item, bucket.timestamp)
            events += len(user)
    return events, digest.hexdigest()
