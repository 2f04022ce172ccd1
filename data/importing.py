"""Import: from a source to a dataset folder, in streaming passes, complete or not at all.

keys of the item table → events into user buckets → each bucket sorted, duplicates out → k-core → interactions/ and
users.parquet → split boundaries → items.parquet → dataset.json. Everything is written into a temporary folder beside
the goal, which gets its name last; a failed import leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from data.dataset import Dataset
from data.errors import RequestError
from data.events import EventBuckets
from data.items import ItemNumbers
from data.kcore import alive_events, core_items
from data.parquet import Digest, fingerprint_of
from data.quarantine import Quarantine, Reason
from data.records import BoolArray
from data.schema import (
    FORMAT,
    INTERACTION_SCHEMA,
    INTERACTIONS,
    ITEMS,
    QUARANTINE,
    USER_SCHEMA,
    USERS,
    Card,
    write_card,
)
from data.settings import Settings
from data.sources import Source, TimeUnit
from data.split import LeaveOneOut, Split, chronological, is_target, part_of_events

PART_ROWS = 2_000_000
"""Rows of one interactions file before the next is begun."""


class ImportRules(Settings):
    """What an import keeps, and how it divides it."""

    split: Literal["chronological", "leave_one_out"] = "chronological"
    """How targets are divided: by their time over all users, or the last two events of each user."""
    ratios: tuple[float, float, float] = (8.0, 1.0, 1.0)
    """Shares of train, valid and test targets of the chronological split."""
    user_core: int = Field(0, ge=0)
    """Keep users with at least this many events (with item_core, repeated until stable); 0 keeps all."""
    item_core: int = Field(0, ge=0)
    """Keep items with at least this many events; 0 keeps all."""
    unknown_items: Literal["drop", "add"] = "drop"
    """Events whose item is not in the item table: drop them into the quarantine, or add the item without a title."""
    missing_titles: Literal["keep", "drop"] = "keep"
    """Items without title: keep them under their key as title (has_title is false), or drop them with their events."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Events with the user, item and time of an earlier one: drop them into the quarantine, or keep them (where the
    clock only knows days, they may be real). Rows of given splits always keep them."""
    idle_items: Literal["drop", "keep"] = "drop"
    """Items that no kept event names: leave them out of the catalogue, or keep them."""
    max_bad_share: float = Field(0.5, ge=0, le=1)
    """Stop when a larger share of the event rows is bad (quarantined); then the request is probably wrong."""


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What writing the interactions told."""

    events: int
    users: int
    kept_items: BoolArray
    split: Split
    rows: dict[str, int]
    digest: str


def import_source(source: Source, out: Path, rules: ImportRules, *, name: str = "", overwrite: bool = False) -> Dataset:
    """Import `source` into the new folder `out`.

    Raises:
        RequestError: the folder exists, a file is unreadable, a column is missing or of a wrong type, no usable row is
            left, too many rows are bad, or the split is impossible.
    """
    check_ratios(rules.ratios)
    with new_folder(out, overwrite=overwrite) as folder:
        quarantine = Quarantine(folder / QUARANTINE)
        items = ItemNumbers(
            source,
            quarantine,
            require_titles=rules.missing_titles == "drop",
            add_unknown=rules.unknown_items == "add",
        )
        bad_items = sum(quarantine.dropped.values())
        scratch = folder / "buckets"
        scratch.mkdir()
        buckets = EventBuckets(scratch, quarantine)
        buckets.fill(source, items)
        check_bad_share(quarantine, sum(quarantine.dropped.values()) - bad_items, buckets.rows_read, rules)
        buckets.sort(drop_duplicates=rules.duplicates == "drop")
        written = _write_interactions(folder, buckets, len(items), source, rules, quarantine)
        quarantine.count(Reason.ITEM_WITHOUT_EVENTS, int((~written.kept_items).sum()))
        untitled, items_digest = items.write(folder / ITEMS, written.kept_items)
        quarantine.close()
        shutil.rmtree(scratch)
        digests = {"interactions": written.digest, "items": items_digest}
        card: Card = {
            "format": FORMAT,
            "name": name or source.name,
            "source": source.description,
            "clock": "order" if source.time_unit is TimeUnit.ORDER else "seconds",
            "rules": rules.model_dump(mode="json"),
            "counts": {
                "rows_read": buckets.rows_read,
                "events": written.events,
                "users": written.users,
                "items": int(written.kept_items.sum()),
                "items_without_title": untitled,
                "rows_out_of_order": buckets.out_of_order,
            },
            "dropped": dict(sorted(quarantine.dropped.items())),
            "repaired": dict(sorted(quarantine.repaired.items())),
            "split": {**written.split.model_dump(mode="json"), "rows": written.rows},
            "digests": digests,
        }
        finish_card(folder, card)
    return Dataset.open(out)


def finish_card(folder: Path, card: Card) -> None:
    """Add the fingerprint (of contents and split, not of names or paths) and write the card."""
    card["fingerprint"] = fingerprint_of(card)
    write_card(folder, card)


@contextmanager
def new_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    Raises:
        RequestError: `out` exists (and may not be replaced), or it cannot be made.
    """
    if out.exists() and not overwrite:
        raise RequestError(str(out), "exists already", "a new folder, or --overwrite")
    if out.exists() and not (out / "dataset.json").is_file():
        raise RequestError(str(out), "exists and is no dataset", "a new folder")
    folder = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise RequestError(str(out), f"cannot be written ({error.strerror})", "a folder you may write to") from error
    try:
        yield folder
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_ratios(ratios: tuple[float, float, float]) -> None:
    """Refuse ratios that are not three positive numbers."""
    if not all(np.isfinite(ratios)) or min(ratios) <= 0:
        raise RequestError("ratios", ratios, "three positive numbers, as 8 1 1")


def check_bad_share(quarantine: Quarantine, bad: int, rows: int, rules: ImportRules) -> None:
    """Stop an import that would throw away most of its rows, or has none.

    Raises:
        RequestError: names the most frequent reason and its first row.
    """
    if rows == 0 and bad == 0:
        raise RequestError("events", "no rows", "at least three events of one user")
    share = bad / max(rows, bad, 1)
    if share > rules.max_bad_share:
        reason, count = quarantine.dropped.most_common(1)[0]
        found = f"{share:.0%} of the rows are bad, most often {reason} ({count}; {quarantine.examples.get(reason, '')})"
        raise RequestError("events", found, f"at most {rules.max_bad_share:.0%} (max_bad_share)")


def _write_interactions(
    folder: Path, buckets: EventBuckets, n_items: int, source: Source, rules: ImportRules, quarantine: Quarantine
) -> _Written:
    """Apply the k-core and write interactions/ and users.parquet with dense numbers."""
    alive = np.ones(n_items, bool)
    if rules.user_core > 1 or rules.item_core > 1:
        alive = core_items(buckets.pairs, n_items, rules.user_core, rules.item_core)
    named = np.zeros(n_items, bool)
    removed = 0
    for pairs in buckets.pairs():
        kept = alive_events(pairs, alive, rules.user_core)
        removed += len(kept) - int(kept.sum())
        named[pairs[1][kept]] = True
    quarantine.count(Reason.K_CORE, removed)
    kept_items = np.ones(n_items, bool) if rules.idle_items == "keep" else named
    final_item = (np.cumsum(kept_items) - 1).astype(np.int32)
    users, events, target_times = 0, 0, []
    parts = np.zeros(3, np.int64)
    digest = Digest(3)
    with (
        _PartWriter(folder / INTERACTIONS) as writer,
        pq.ParquetWriter(folder / USERS, USER_SCHEMA, compression="zstd") as user_writer,
    ):
        for bucket, words in zip(buckets.sorted_buckets(), buckets.user_keys(), strict=True):
            rows = np.flatnonzero(alive_events((bucket.user, bucket.item), alive, rules.user_core))
            old_user, user = np.unique(bucket.user[rows], return_inverse=True)
            user = (user + users).astype(np.int32)
            item, time = final_item[bucket.item[rows]], bucket.timestamp[rows]
            numbers = pa.array(np.arange(users, users + len(old_user)), pa.int32())
            user_writer.write_table(pa.table([numbers, words.take(pa.array(old_user))], schema=USER_SCHEMA))
            columns = [pa.array(user), pa.array(item), pa.array(time), bucket.rating.take(pa.array(rows))]
            writer.write(pa.table(columns, schema=INTERACTION_SCHEMA))
            digest.update(user, item, time)
            users, events = users + len(old_user), events + len(rows)
            target = is_target(user)
            target_times.append(time[target])
            parts += np.bincount(part_of_events(user, time, LeaveOneOut())[target], minlength=3)
    if events == 0:
        raise RequestError("events", "no usable row left", "events that pass the rules; lower the k-core")
    times = np.concatenate(target_times)
    split: Split = LeaveOneOut()
    if rules.split == "chronological":
        if source.time_unit is TimeUnit.ORDER:
            raise RequestError("split", "chronological, but the source has no clock", "leave_one_out")
        split = chronological(times, rules.ratios)
        parts = np.histogram(times, [-np.inf, split.valid_from, split.test_from, np.inf])[0]
    elif parts.min() == 0:
        raise RequestError("split", "no user with four events", "leave_one_out needs one, for three targets")
    counts = {name: int(count) for name, count in zip(("train", "valid", "test"), parts, strict=True)}
    return _Written(
        events=events, users=users, kept_items=kept_items, split=split, rows=counts, digest=digest.hexdigest()
    )


class _PartWriter:
    """Writes interactions/part-NNNNN.parquet, a new file after `PART_ROWS` rows."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._parts = 0
        self._rows = 0
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> _PartWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def write(self, table: pa.Table) -> None:
        """Append rows; they reach the file in row groups of a useful size."""
        self._pending.append(table)
        self._pending_rows += len(table)
        if self._pending_rows >= 1 << 17:
            self._flush()

    def _flush(self) -> None:
        if self._pending_rows == 0:
            return
        if self._writer is None:
            path = self._folder / f"part-{self._parts:05d}.parquet"
            self._writer = pq.ParquetWriter(path, INTERACTION_SCHEMA, compression="zstd")
        self._writer.write_table(pa.concat_tables(self._pending))
        self._rows += self._pending_rows
        self._pending, self._pending_rows = [], 0
        if self._rows >= PART_ROWS:
            self._writer.close()
            self._parts, self._rows, self._writer = self._parts + 1, 0, None
