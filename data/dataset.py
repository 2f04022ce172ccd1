"""A dataset folder as arrays: samples (history, target) per split, and whole sequences for training.

What is learned reads `sequences("train")`, `samples("train")` and `train_counts()`, and these three never look at an
event at or after the validation boundary (see `data.split`).

Suffixes: `_N` samples, `_S` sequences, `_E` events.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data.errors import RequestError
from data.parquet import digest_arrays, read_table
from data.records import FloatArray, IntArray, LongArray
from data.schema import (
    INTERACTION_SCHEMA,
    INTERACTIONS,
    ITEM_FIELDS,
    ITEMS,
    SPLIT_NAMES,
    SPLIT_SCHEMA,
    SPLITS,
    USER_SCHEMA,
    USERS,
    Card,
    read_card,
)
from data.split import Chronological, Given, LeaveOneOut, Split, is_target, part_of_events, user_starts


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Rows of one split, in order of target time (ties: user, then the order of the user's events)."""

    user_id_N: IntArray
    target_N: IntArray
    timestamp_N: LongArray
    """Seconds; 0 where the time is unknown."""
    sample_id_N: LongArray
    """Row number within the split; stable, so it can key random numbers."""
    values: IntArray
    """Item ids that the histories are slices of."""
    start_N: LongArray
    end_N: LongArray

    def __len__(self) -> int:
        return len(self.target_N)

    def history(self, i: int, limit: int) -> IntArray:
        """The latest `limit` items before the target of row i, oldest first."""
        end = int(self.end_N[i])
        return self.values[max(int(self.start_N[i]), end - limit) : end]

    def take(self, rows: npt.NDArray[np.integer]) -> Samples:
        """The given rows in the given order; they keep their sample ids."""
        per_row = [f.name for f in dataclasses.fields(self) if f.name.endswith("_N")]
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in per_row})


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Event sequences for training on whole sequences: sequence s is values[start_S[s]:end_S[s]], oldest first."""

    values: IntArray
    start_S: LongArray
    end_S: LongArray
    loss_from_S: LongArray
    """Events at positions >= this within their sequence are training targets; the earlier ones are context."""
    user_id_S: IntArray

    def __len__(self) -> int:
        return len(self.start_S)


@dataclass(frozen=True, kw_only=True)
class Events:
    """All interactions, ordered by user, time, source order."""

    user_E: IntArray
    item_E: IntArray
    time_E: LongArray
    """Seconds; 0 where the time is unknown."""


class Dataset:
    """A folder written by `windlass data import`. Arrays are read when first asked for."""

    def __init__(self, path: Path, card: Card) -> None:
        self.path = path
        self.card = card
        counts = card["counts"]
        if not isinstance(counts, dict):
            raise RequestError(str(path), f"counts {counts!r}", "a table of counts")
        self.name = str(card["name"])
        self.fingerprint = str(card["fingerprint"])
        self.n_items = _count(path, counts, "items")
        self.n_users = _count(path, counts, "users")
        self.split = _parse_split(path, card["split"])

    @classmethod
    def open(cls, path: Path | str) -> Dataset:
        """Open a dataset folder.

        Raises:
            RequestError: no dataset there, or another format version.
        """
        return cls(Path(path), read_card(Path(path)))

    def items(self) -> pa.Table:
        """The item table, row i is item i."""
        path = self.path / ITEMS
        table = read_table(path, pa.schema(ITEM_FIELDS), exact=False)
        if len(table) != self.n_items or not np.array_equal(table["item_id"].to_numpy(), np.arange(self.n_items)):
            raise RequestError(str(path), f"{len(table)} rows", f"ids 0 to {self.n_items - 1} in order; import again")
        return table

    def users(self) -> pa.Table:
        """user_id and the original key of every user."""
        return read_table(self.path / USERS, USER_SCHEMA)

    @cached_property
    def events(self) -> Events:
        """All interactions, of every split; only evaluation may look behind the boundary.

        Raises:
            RequestError: part files are missing, damaged or not the ones that were imported.
        """
        table = self._interactions()
        events = Events(
            user_E=_ints(table, "user_id"),
            item_E=_ints(table, "item_id"),
            time_E=_longs(table, "timestamp"),
        )
        folder = self.path / INTERACTIONS
        self._check_digest("interactions", folder, events.user_E, events.item_E, events.time_E)
        return events

    @cached_property
    def rating_E(self) -> FloatArray:
        """Rating of each of `events`, NaN where the source has none."""
        column = self._interactions()["rating"].combine_chunks()
        return np.ascontiguousarray(column.to_numpy(zero_copy_only=False), dtype=np.float32)

    def _interactions(self) -> pa.Table:
        parts = sorted((self.path / INTERACTIONS).glob("part-*.parquet"))
        tables = [read_table(part, INTERACTION_SCHEMA) for part in parts]
        return pa.concat_tables(tables) if tables else INTERACTION_SCHEMA.empty_table()

    @cached_property
    def _part_E(self) -> npt.NDArray[np.int8]:
        split = self.split
        if isinstance(split, Given):
            raise ValueError("a given split has rows, not parts of events")
        return part_of_events(self.events.user_E, self.events.time_E, split)

    def samples(self, split: str) -> Samples:
        """The rows of "train", "valid" or "test".

        Raises:
            RequestError: unknown split name.
        """
        part = _part_number(split)
        if isinstance(self.split, Given):
            return self._given_samples(split)
        events = self.events
        rows = np.flatnonzero((self._part_E == part) & is_target(events.user_E))
        rows = rows[np.argsort(events.time_E[rows], kind="stable")]
        return Samples(
            user_id_N=events.user_E[rows],
            target_N=events.item_E[rows],
            timestamp_N=events.time_E[rows],
            sample_id_N=np.arange(len(rows), dtype=np.int64),
            values=events.item_E,
            start_N=user_starts(events.user_E)[rows],
            end_N=rows.astype(np.int64),
        )

    def sequences(self, split: str = "train") -> Sequences:
        """Whole sequences whose targets are the targets of the split, each exactly once.

        For "train" the sequences hold events before the validation boundary only. For "valid" (early stopping) and
        "test" they start with the user's earlier events as context, and hold no event of a later split.
        """
        part = _part_number(split)
        if isinstance(self.split, Given):
            return chain_rows(self._given_samples(split))
        events = self.events
        kept = np.flatnonzero(self._part_E <= part)
        user_E, target_E = events.user_E[kept], (self._part_E[kept] == part) & is_target(events.user_E)[kept]
        begin = np.flatnonzero(np.concatenate([[True], user_E[1:] != user_E[:-1]])) if len(kept) else kept
        end = np.append(begin[1:], len(kept))
        first_target = np.flatnonzero(target_E)
        where = np.searchsorted(first_target, begin)
        first = np.append(first_target, len(kept))[where]
        with_target = first < end
        return Sequences(
            values=events.item_E[kept],
            start_S=begin[with_target].astype(np.int64),
            end_S=end[with_target].astype(np.int64),
            loss_from_S=(first - begin)[with_target].astype(np.int64),
            user_id_S=user_E[begin[with_target]],
        )

    def train_counts(self) -> npt.NDArray[np.int64]:
        """[n_items] number of events of each item before the validation boundary."""
        if isinstance(self.split, Given):
            chains = chain_rows(self._given_samples("train"))
            return np.bincount(chains.values, minlength=self.n_items)
        return np.bincount(self.events.item_E[self._part_E == 0], minlength=self.n_items)

    def seen(self, samples: Samples, i: int) -> IntArray:
        """Sorted item ids of the whole history of row i, for `exclude_seen`."""
        return np.unique(samples.values[int(samples.start_N[i]) : int(samples.end_N[i])])

    def _given_samples(self, split: str) -> Samples:
        path = self.path / SPLITS / f"{split}.parquet"
        table = read_table(path, SPLIT_SCHEMA).combine_chunks()
        user, target = _ints(table, "user_id"), _ints(table, "target")
        time = _longs(table, "timestamp")
        history = table["history"].combine_chunks()
        values = history.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
        length = history.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        end = np.cumsum(length)
        self._check_digest(split, path, user, target, time, values, length)
        order = np.argsort(time, kind="stable")
        return Samples(
            user_id_N=user[order],
            target_N=target[order],
            timestamp_N=time[order],
            sample_id_N=np.arange(len(order), dtype=np.int64),
            values=values,
            start_N=(end - length)[order],
            end_N=end[order],
        )

    def _check_digest(self, name: str, path: Path, *arrays: npt.NDArray[np.generic]) -> None:
        digests = self.card["digests"]
        expected = digests.get(name) if isinstance(digests, dict) else None
        found = digest_arrays(*arrays)
        if found != expected:
            raise RequestError(str(path), f"content digest {found}", f"{expected} as imported; import the data again")


def chain_rows(samples: Samples) -> Sequences:
    """Join the rows of a given split into whole sequences, so that every row's target is a target once.

    Rows of a user are taken in order; a row whose history is the end of what the user's chain holds extends it by its
    target, any other row starts a new chain with its whole history as context.
    """
    values: list[npt.NDArray[np.int32]] = []
    starts: list[int] = []
    loss_from: list[int] = []
    users: list[int] = []
    size = 0
    chain: list[int] = []
    user = None
    for i in np.argsort(samples.user_id_N, kind="stable"):
        history = samples.values[samples.start_N[i] : samples.end_N[i]].tolist()
        target = int(samples.target_N[i])
        if (
            samples.user_id_N[i] == user
            and len(history) <= len(chain)
            and chain[len(chain) - len(history) :] == history
        ):
            chain.append(target)
            continue
        if chain:
            values.append(np.asarray(chain, np.int32))
            size += len(chain)
        user = samples.user_id_N[i]
        chain = [*history, target]
        starts.append(size)
        loss_from.append(len(history))
        users.append(int(user))
    values.append(np.asarray(chain, np.int32))
    size += len(chain)
    return Sequences(
        values=np.concatenate(values),
        start_S=np.asarray(starts, np.int64),
        end_S=np.asarray([*starts, size][1:], np.int64),
        loss_from_S=np.asarray(loss_from, np.int64),
        user_id_S=np.asarray(users, np.int32),
    )


def _part_number(split: str) -> int:
    if split not in SPLIT_NAMES:
        raise RequestError("split", split, " | ".join(SPLIT_NAMES))
    return SPLIT_NAMES.index(split)


def _ints(table: pa.Table, name: str) -> IntArray:
    return np.ascontiguousarray(table[name].combine_chunks().to_numpy(zero_copy_only=False), dtype=np.int32)


def _longs(table: pa.Table, name: str) -> LongArray:
    column = table[name].combine_chunks().fill_null(0)
    return np.ascontiguousarray(column.to_numpy(zero_copy_only=False), dtype=np.int64)


def _count(path: Path, counts: dict[str, object], name: str) -> int:
    value = counts.get(name)
    if not isinstance(value, int) or value < 0:
        raise RequestError(f"{path}: counts.{name}", repr(value), "a number of rows; import the data again")
    return value


def _parse_split(path: Path, description: object) -> Split:
    fields = dict(description) if isinstance(description, dict) else {}
    kind = fields.get("kind")
    if kind == "chronological":
        bounds = [fields.get("valid_from"), fields.get("test_from")]
        if not all(isinstance(bound, int) for bound in bounds):
            raise RequestError(str(path), f"boundaries {bounds}", "valid_from and test_from in seconds; import again")
        return Chronological(valid_from=int(fields["valid_from"]), test_from=int(fields["test_from"]))
    if kind == "leave_one_out":
        return LeaveOneOut()
    if kind == "given":
        return Given()
    raise RequestError(str(path), f"split {kind!r}", "chronological | leave_one_out | given")
