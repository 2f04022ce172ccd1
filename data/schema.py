"""Layout of a dataset folder: Parquet schemas, file names and the card `dataset.json`.

Every folder carries `FORMAT`; another number is refused, because a reader that guesses is worse than one that stops.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa

from data.errors import RequestError

FORMAT = 1
"""Version of the layout of a dataset folder."""

CARD = "dataset.json"
ITEMS = "items.parquet"
USERS = "users.parquet"
INTERACTIONS = "interactions"
QUARANTINE = "quarantine"
SPLITS = "splits"
SPLIT_NAMES = ("train", "valid", "test")

INTERACTION_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.int32(), nullable=False),
        pa.field("item_id", pa.int32(), nullable=False),
        pa.field("timestamp", pa.int64()),
        pa.field("rating", pa.float32()),
    ]
)
"""Events, ordered by user, time, and the order of the source. Timestamps are seconds; null where unknown."""

USER_SCHEMA = pa.schema([pa.field("user_id", pa.int32(), nullable=False), pa.field("user_key", pa.string())])
"""The original key of every user."""

ITEM_FIELDS = [
    pa.field("item_id", pa.int32(), nullable=False),
    pa.field("item_key", pa.string(), nullable=False),
    pa.field("title", pa.string(), nullable=False),
    pa.field("has_title", pa.bool_(), nullable=False),
    pa.field("active_from", pa.int64()),
    pa.field("active_to", pa.int64()),
]
"""First columns of items.parquet; further attributes follow as they come. An item without a title carries its key
as title and `has_title` false. `active_from` and `active_to` are seconds, null for always."""

SPLIT_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.int32(), nullable=False),
        pa.field("history", pa.list_(pa.int32()), nullable=False),
        pa.field("target", pa.int32(), nullable=False),
        pa.field("timestamp", pa.int64()),
    ]
)
"""Rows of a given split in the order of the source: the history (oldest first), the target and its time."""

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("action", pa.string(), nullable=False),
        pa.field("content", pa.string(), nullable=False),
    ]
)
"""Rows that were not taken as they are: file, 0-based row, `Reason`, `dropped` or `repaired`, the row as JSON."""

Card = dict[str, Any]


def write_card(folder: Path, card: Card) -> None:
    """Write dataset.json, the last file of an import, and flush it to disk."""
    with open(folder / CARD, "w", encoding="utf-8") as file:
        json.dump(card, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_card(folder: Path) -> Card:
    """Read dataset.json.

    Raises:
        RequestError: not a dataset folder, an unreadable card, or another format version.
    """
    path = folder / CARD
    legal = "a folder written by `windlass data import`"
    if not path.is_file():
        raise RequestError(str(folder), "no dataset.json in it" if folder.is_dir() else "no such folder", legal)
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RequestError(str(path), f"unreadable ({error})", legal) from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        version = card.get("format") if isinstance(card, dict) else card
        raise RequestError(str(path), f"format {version!r}", f"format {FORMAT}; import the data again")
    missing = [key for key in ("name", "counts", "split", "digests", "fingerprint") if key not in card]
    if missing:
        raise RequestError(str(path), f"without {', '.join(missing)}", legal)
    return card
