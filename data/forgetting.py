"""Taking a user's rows out of a dataset and out of a feedback log. Numbers of other users and items do not change.

A dataset is made anew beside itself and changes names at the end; a log loses rows file by file, each replaced as a
whole. Either can be begun again after a crash.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.dataset import Dataset
from data.errors import RequestError
from data.feedback import SUCCESS
from data.parquet import Digest, fingerprint_of, open_parquet
from data.responses import response_files
from data.schema import CARD, INTERACTIONS, QUARANTINE, SPLIT_NAMES, SPLITS, USERS, write_card

BATCH_ROWS = 1 << 16
Kept = Callable[[pa.Table], pa.Array]
"""Which rows of a table stay, as booleans."""


@dataclass(kw_only=True)
class Forgotten:
    """Rows that were taken out, by where they were."""

    rows: dict[str, int] = field(default_factory=dict)

    def add(self, where: str, rows: int) -> None:
        """Further rows."""
        self.rows[where] = self.rows.get(where, 0) + rows


def user_number(dataset: Dataset | None, user: str) -> int:
    """The user's number: by the key of the source where there is a dataset, else the number itself.

    Raises:
        RequestError: no such user.
    """
    if dataset is None:
        if not user.isdecimal():
            raise RequestError("user", user, "the user's number (user_id), or --dataset with whose keys it is named")
        return int(user)
    keys = dataset.users()["user_key"].to_pylist()
    if user not in keys:
        raise RequestError("user", user, f"a user_key of {dataset.path / USERS}")
    return int(keys.index(user))


def forget_in_dataset(dataset: Dataset, user: int, forgotten: Forgotten) -> None:
    """Take a user's events, rows of given splits, key and quarantined rows out of a dataset folder."""
    folder = dataset.path.resolve()
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial)
    key = dataset.users()["user_key"].to_pylist()[user]
    card = dict(dataset.card)
    digests, counts = dict(card["digests"]), dict(card["counts"])

    def others(table: pa.Table) -> pa.Array:
        return pc.not_equal(table["user_id"], user)

    events = sum(rewrite(path, others) for path in sorted((partial / INTERACTIONS).glob("part-*.parquet")))
    forgotten.add("interactions", events)
    if events:
        counts["events"] -= events
        digests["interactions"] = _digest(sorted((partial / INTERACTIONS).glob("part-*.parquet")))
    for path in sorted((partial / SPLITS).glob("*.parquet")):
        rows = rewrite(path, others)
        forgotten.add(f"split {path.stem}", rows)
        if rows:
            digests[path.stem] = _split_digest(path)
    _forget_key(partial / USERS, user)
    for path in sorted((partial / QUARANTINE).glob("*.parquet")):
        forgotten.add("quarantine", rewrite(path, lambda table: _without_key(table, key)))
    card |= {"digests": digests, "counts": counts, "forgotten_users": int(card.get("forgotten_users", 0)) + 1}
    write_card(partial, card)
    left = Dataset.open(partial)
    card["split"] = {**card["split"], "rows": {split: len(left.samples(split)) for split in SPLIT_NAMES}}
    card["fingerprint"] = fingerprint_of(card)
    write_card(partial, card)
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old)


def finish_interrupted(folder: Path) -> None:
    """Give a dataset its name where a crash came between the two renames; both states are whole then."""
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial")
    if not folder.exists() and (partial / CARD).is_file():
        partial.rename(folder)
        shutil.rmtree(folder.with_name(f".{folder.name}.old"), ignore_errors=True)


def forget_in_log(log: Path, user: int, forgotten: Forgotten) -> list[tuple[str, str]]:
    """Take a user's exposures and the responses to them out of a log; returns (day, file) of what was rewritten.

    Raises:
        RequestError: a file that cannot be read.
    """
    changed = []
    for day in sorted(log.glob("day=*")):
        requests: set[str] = set()
        for path in sorted(day.glob("*.parquet")):
            mine = _requests(path, user)
            if not mine:
                continue
            requests |= mine
            rows = rewrite(path, lambda table: pc.not_equal(pc.fill_null(table["user_id"], -1), user))
            _promise(day, path)
            forgotten.add("exposures", rows)
            changed.append((day.name.removeprefix("day="), path.name))
        for path in response_files(day) if requests else []:
            theirs = pa.array(sorted(requests), pa.string())
            rows = rewrite(path, lambda table: pc.invert(pc.is_in(table["request_id"], value_set=theirs)))  # noqa: B023
            forgotten.add("responses", rows)
            if rows:
                changed.append((day.name.removeprefix("day="), f"{path.parent.name}/{path.name}"))
    return changed


def rewrite(path: Path, kept: Kept) -> int:
    """Leave rows out of a Parquet file, which is replaced as a whole; returns how many. One without them stays."""
    partial = path.with_name(f".{path.name}.partial")
    source = open_parquet(path)
    gone = 0
    with pq.ParquetWriter(partial, source.schema_arrow, compression="zstd") as writer:
        for batch in source.iter_batches(BATCH_ROWS):
            table = pa.Table.from_batches([batch])
            stays = kept(table)
            gone += len(table) - int(pc.sum(stays).as_py() or 0)
            writer.write_table(table.filter(stays))
    if not gone:
        partial.unlink()
        return 0
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    return gone


def _without_key(table: pa.Table, key: str) -> pa.Array:
    """Quarantined rows in which no field is the key."""
    rows = [json.loads(content) for content in table["content"].to_pylist()]
    fields = [row.values() if isinstance(row, dict) else [row] for row in rows]
    return pa.array([all(str(value) != key for value in values) for values in fields], pa.bool_())


def _requests(path: Path, user: int) -> set[str]:
    found: set[str] = set()
    for batch in open_parquet(path).iter_batches(BATCH_ROWS, columns=["request_id", "user_id"]):
        mine = pa.Table.from_batches([batch]).filter(pc.equal(batch.column("user_id"), user))
        found |= {request for request in mine["request_id"].to_pylist() if request}
    return found


def _promise(day: Path, path: Path) -> None:
    """Let `_SUCCESS` say how many rows the file has now, where it says anything."""
    done = day / SUCCESS
    try:
        told: Any = json.loads(done.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(told, dict) and path.name in told.get("rows", {}):
        told["rows"][path.name] = pq.ParquetFile(path).metadata.num_rows
        partial = done.with_name(f".{SUCCESS}.partial")
        partial.write_text(json.dumps(told) + "\n", encoding="utf-8")
        partial.replace(done)


def _forget_key(path: Path, user: int) -> None:
    table = pq.read_table(path)
    keys = [None if number == user else key for number, key in enumerate(table["user_key"].to_pylist())]
    changed = table.set_column(1, table.schema.field("user_key"), pa.array(keys, pa.string()))
    pq.write_table(changed, path, compression="zstd")


def _digest(parts: list[Path]) -> str:
    digest = Digest(3)
    for path in parts:
        table = pq.read_table(path).combine_chunks()
        time_E = table["timestamp"].combine_chunks().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        digest.update(table["user_id"].to_numpy(), table["item_id"].to_numpy(), time_E)
    return digest.hexdigest()


def _split_digest(path: Path) -> str:
    table = pq.read_table(path).combine_chunks()
    history = table["history"].combine_chunks()
    time_N = table["timestamp"].combine_chunks().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    digest = Digest(5)
    digest.update(
        table["user_id"].to_numpy(),
        table["target"].to_numpy(),
        time_N,
        history.flatten().to_numpy(zero_copy_only=False).astype(np.int32),
        history.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64),
    )
    return digest.hexdigest()
