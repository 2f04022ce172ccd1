"""Semantic IDs on disk: `codes/NAME.parquet` of a dataset, one path of codes per item, with where they come from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import RequestError
from data.parquet import first_line, open_parquet, read_table
from data.records import IntArray, LongArray

FORMAT: Final = 1
"""Version of the layout of codes/NAME.parquet."""
FOLDER: Final = "codes"
_METADATA_KEY: Final = b"windlass.codes"
_SCHEMA: Final = pa.schema(
    [pa.field("item_id", pa.int32(), nullable=False), pa.field("path", pa.list_(pa.int32()), nullable=False)]
)


class OnCollision(StrEnum):
    """What happens to items that the quantiser gives the same codes."""

    RESOLVE = "resolve"
    """Every item gets a path of its own: the nearest free one."""
    SHARE = "share"
    """Items share a leaf; metrics are reported per path and per item."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """Paths of the items 0..n_items-1."""

    values: IntArray
    """Codes (not token ids) of all items, one path after the other."""
    start: LongArray
    """[n_items+1]; path of item i is `values[start[i]:start[i+1]]`, level 0 first."""
    level_sizes: tuple[int, ...]
    """Number of codes that exist at each level, used or not; it fixes the vocabulary."""
    on_collision: OnCollision
    provenance: dict[str, Any]
    """How they were made: settings, dataset fingerprint, embeddings, collisions, versions."""

    @property
    def n_items(self) -> int:
        """Number of items."""
        return len(self.start) - 1

    @staticmethod
    def from_lists(
        paths: list[list[int]],
        level_sizes: list[int] | None = None,
        on_collision: OnCollision = OnCollision.SHARE,
        provenance: dict[str, Any] | None = None,
    ) -> Codes:
        """Codes of paths as lists; the level sizes default to what the paths use."""
        lengths = [len(path) for path in paths]
        values = np.asarray([code for path in paths for code in path], dtype=np.int32)
        start = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        if level_sizes is None:
            used = range(max(lengths, default=0))
            level_sizes = [1 + max(path[level] for path in paths if level < len(path)) for level in used]
        return Codes(
            values=values,
            start=start,
            level_sizes=tuple(level_sizes),
            on_collision=on_collision,
            provenance=provenance or {},
        )

    def save(self, path: Path) -> None:
        """Write the file: a temporary one first, then renamed."""
        metadata = {
            "format": FORMAT,
            "level_sizes": list(self.level_sizes),
            "on_collision": self.on_collision.value,
            "provenance": self.provenance,
        }
        column = pa.ListArray.from_arrays(pa.array(self.start.astype(np.int32)), pa.array(self.values))
        table = pa.table([pa.array(np.arange(self.n_items, dtype=np.int32)), column], schema=_SCHEMA)
        table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()})
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        pq.write_table(table, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)

    @staticmethod
    def load(path: Path) -> Codes:
        """Read a codes file.

        Raises:
            RequestError: missing or damaged file, another format version, ids that are not 0..n-1, codes outside their
                level, or two items with one path where the file says that collisions were resolved.
        """
        metadata = _metadata(path)
        table = read_table(path, _SCHEMA)
        ids = table["item_id"].combine_chunks()
        if ids.null_count or not np.array_equal(ids.to_numpy(), np.arange(len(table))):
            raise RequestError(f"{path}: item_id", "not 0, 1, 2, …", "every item once, in order")
        paths = table["path"].combine_chunks()
        if paths.null_count or paths.flatten().null_count:
            raise RequestError(f"{path}: path", "a null", "a list of codes for every item")
        lengths = paths.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        codes = Codes(
            values=np.ascontiguousarray(paths.flatten().to_numpy(zero_copy_only=False), dtype=np.int32),
            start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            level_sizes=tuple(int(size) for size in metadata["level_sizes"]),
            on_collision=OnCollision(metadata["on_collision"]),
            provenance=dict(metadata["provenance"]),
        )
        codes.check(str(path))
        return codes

    def check(self, where: str) -> None:
        """Refuse paths that are empty, leave their level, or collide although collisions were resolved."""
        lengths = np.diff(self.start)
        if lengths.size == 0 or lengths.min() < 1:
            raise RequestError(where, "an item without codes" if lengths.size else "no item", "codes for every item")
        level = np.arange(len(self.values)) - np.repeat(self.start[:-1], lengths)
        if lengths.max() > len(self.level_sizes):
            raise RequestError(where, f"a path of {lengths.max()} codes", f"at most {len(self.level_sizes)} levels")
        outside = (self.values < 0) | (self.values >= np.asarray(self.level_sizes)[level])
        if outside.any():
            at = int(np.flatnonzero(outside)[0])
            item = int(np.searchsorted(self.start, at, "right")) - 1
            legal = f"0 to {self.level_sizes[level[at]] - 1}"
            raise RequestError(f"{where}: item {item}, level {level[at]}", int(self.values[at]), legal)
        if self.on_collision is OnCollision.RESOLVE:
            distinct = self.distinct_paths()
            if distinct < self.n_items:
                raise RequestError(
                    where, f"{self.n_items} items on {distinct} paths", "a path of its own for every item"
                )

    def distinct_paths(self) -> int:
        """Number of different paths."""
        bounds = zip(self.start[:-1], self.start[1:], strict=True)
        return len({self.values[start:stop].tobytes() for start, stop in bounds})


def codes_path(dataset_path: Path, name: str) -> Path:
    """Where the codes called `name` of a dataset lie."""
    return dataset_path / FOLDER / f"{name}.parquet"


def load_codes(dataset_path: Path, name: str, n_items: int) -> Codes:
    """Codes of a dataset by name.

    Raises:
        RequestError: no such codes (the legal names are told), or codes for another number of items.
    """
    path = codes_path(dataset_path, name)
    if not path.is_file():
        names = sorted(file.stem for file in (dataset_path / FOLDER).glob("*.parquet"))
        legal = " | ".join(names) if names else "none yet; make them with `windlass data ids`"
        raise RequestError(f"codes of {dataset_path}", name, legal)
    codes = Codes.load(path)
    if codes.n_items != n_items:
        raise RequestError(
            str(path), f"codes of {codes.n_items} items", f"the dataset's {n_items} items; make codes anew"
        )
    return codes


def parse_card(where: str, text: bytes, version: int, legal: str) -> dict[str, Any]:
    """The JSON object that describes codes, here and in a catalogue's card.

    Raises:
        RequestError: not a JSON object, another format version, or keys missing or of the wrong type.
    """
    try:
        card = json.loads(text)
    except ValueError as error:
        raise RequestError(where, f"not JSON ({first_line(error)})", legal) from error
    if not isinstance(card, dict) or card.get("format") != version:
        found = card.get("format") if isinstance(card, dict) else card
        raise RequestError(where, f"format {found!r}", f"format {version}")
    modes = [mode.value for mode in OnCollision]
    if card.get("on_collision") not in modes:
        raise RequestError(f"{where}: on_collision", repr(card.get("on_collision")), " | ".join(modes))
    if not isinstance(card.get("provenance"), dict):
        raise RequestError(f"{where}: provenance", repr(card.get("provenance")), "an object")
    sizes = card.get("level_sizes")
    if not isinstance(sizes, list) or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise RequestError(f"{where}: level_sizes", repr(sizes), "a list of positive numbers")
    return card


def _metadata(path: Path) -> dict[str, Any]:
    legal = "a file written by `windlass data ids`"
    raw = (open_parquet(path).schema_arrow.metadata or {}).get(_METADATA_KEY)
    if raw is None:
        raise RequestError(str(path), "Parquet without our metadata", legal)
    return parse_card(str(path), raw, FORMAT, legal)
