"""The row folders of all passes: logs made of them for updates, and what of them is still needed.

A source is `DAY.N/train`, `DAY.N/held_out` or `DAY.N/corrected`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data.feedback import FORMAT, SUCCESS
from data.records import BoolArray
from data.responses import DigestArray, request_digests
from launch.continual.files import PARTIAL, Files, json_bytes
from launch.continual.parquet_stream import BATCH_ROWS
from launch.continual.parts import MARKED
from launch.continual.requests import DigestFiles
from launch.continual.rows import CORRECTED, CORRECTIONS, PARTS, RowReport

REPLAYED: Final = "replayed-"
"""Begins the names of files with rows of earlier updates."""


class RowFolders:
    """A folder of row folders."""

    def __init__(self, root: Path, files: Files) -> None:
        self.root = root
        self._files = files

    def files_of(self, source: str) -> dict[Path, int]:
        """Rows by Parquet file."""
        folder, _, part = source.partition("/")
        report = RowReport.read(self.root / folder)
        return {self.root / folder / name: rows for name, rows in report.files.items() if name.startswith(f"{part}/")}

    def rows(self, sources: Sequence[str]) -> int:
        """Rows of some sources."""
        return sum(sum(self.files_of(source).values()) for source in sources)

    def responses(self, sources: Sequence[str]) -> int:
        """Rows of some sources that have a response."""
        count = 0
        for source in sources:
            folder, _, part = source.partition("/")
            count += RowReport.read(self.root / folder).responses.get(part, 0)
        return count

    def feedback(
        self, folder: Path, sources: Sequence[str], *, replayed: Mapping[str, float] | None = None, salt: str = ""
    ) -> Path:
        """A feedback log of the rows of some sources; a crash leaves it absent or whole.

        Where a source of a day corrects rows, those of the day's other sources give way to it. Files that are used
        as they are become links.

        Args:
            folder: the log.
            sources: whose rows are used.
            replayed: sources of which a share is drawn.
            salt: of the draw.
        """
        if folder.exists():
            return folder
        partial = folder.with_name(f".{folder.name}{PARTIAL}")
        if partial.exists():
            self._files.remove(partial)
        promised: dict[Path, dict[str, int]] = {}
        for source in (*sources, *(replayed or {})):
            day = partial / f"day={day_of(source)}"
            self._files.make_folder(day)
            share = (replayed or {}).get(source)
            files = promised.setdefault(day, {})
            for path, rows in self.files_of(source).items():
                name = f"{'' if share is None else REPLAYED}{source.replace('/', '-')}-{path.name}"
                wanted = _Wanted(self._corrections(source, sources, share), share, salt)
                if wanted.everything:
                    self._files.link(day / name, str(path.resolve()))
                    files[name] = rows
                elif count := self._copy(path, day / name, wanted):
                    files[name] = count
        for day, files in promised.items():
            self._files.write(day / SUCCESS, json_bytes({"format": FORMAT, "rows": files}))
        self._files.publish(partial, folder)
        return folder

    def sweep(self, needed: Collection[str], opened: Collection[str]) -> None:
        """Remove rows that no update will ask for.

        Args:
            needed: sources that stay.
            opened: names of passes all of whose rows stay.
        """
        for path in sorted(self.root.iterdir()):
            if path.name in opened:
                continue
            self._files.clear_leftovers(path)
            for part in PARTS:
                if f"{path.name}/{part}" not in needed and (path / part).exists():
                    self._files.remove_folder(path / part)

    def _corrections(self, source: str, sources: Sequence[str], share: float | None) -> list[Path]:
        """Digests of the rows that have been corrected since a source was written."""
        if source.endswith(f"/{CORRECTED}"):
            return []
        day = day_of(source)
        if share is not None:
            return sorted(self.root.glob(f"{day}.*/{CORRECTIONS}"))
        theirs = [one for one in sources if one.endswith(f"/{CORRECTED}") and day_of(one) == day]
        return [self.root / one.partition("/")[0] / CORRECTIONS for one in theirs]

    def _copy(self, source: Path, target: Path, wanted: _Wanted) -> int:
        """Copy the wanted rows of a file; returns their number, and leaves no file without rows."""
        self._files.before("copy", target)
        rows = 0
        with pq.ParquetFile(source) as file, pq.ParquetWriter(target, MARKED, compression="lz4") as writer:
            for batch in file.iter_batches(BATCH_ROWS):
                kept_B = wanted.rows(request_digests(batch.column("request_id")))
                rows += int(kept_B.sum())
                writer.write_table(pa.table(batch.columns, batch.schema).filter(pa.array(kept_B)).cast(MARKED))
        if not rows:
            target.unlink()
        return rows


class _Wanted:
    """Which rows of a source are used."""

    def __init__(self, corrections: Sequence[Path], share: float | None, salt: str) -> None:
        self._corrections = [path for path in corrections if path.exists() and path.stat().st_size]
        self._share = share
        self._salt = np.uint64(xxhash.xxh3_64_intdigest(salt.encode()))

    @property
    def everything(self) -> bool:
        """Whether all are."""
        return self._share is None and not self._corrections

    def rows(self, digest_B: DigestArray) -> BoolArray:
        """[B] those among a batch."""
        kept_B: BoolArray = ~DigestFiles(self._corrections).has(digest_B)
        if self._share is not None:
            kept_B &= scattered(digest_B ^ self._salt) < self._share
        return kept_B


def day_of(source: str) -> str:
    """The day of a source."""
    return source.split(".")[0]


def replayed_rows(folder: Path) -> int:
    """Rows of earlier updates in a log made by `RowFolders.feedback`."""
    told = [json.loads(path.read_text(encoding="utf-8"))["rows"] for path in sorted(folder.glob(f"day=*/{SUCCESS}"))]
    return sum(rows for files in told for name, rows in files.items() if name.startswith(REPLAYED))


def scattered(word_B: DigestArray) -> npt.NDArray[np.float64]:
    """[B] numbers in [0, 1) that depend on every bit of the words. Source: the finaliser of splitmix64."""
    mixed = word_B + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    drawn_B: npt.NDArray[np.float64] = ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)).astype(
        np.float64
    ) / 2.0**53
    return drawn_B
