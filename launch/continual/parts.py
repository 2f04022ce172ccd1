"""Row folders as they are written: files of bounded size, and the quarantine.

Suffixes: `_B` row of a batch, `_E` entry of a list column.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data.feedback import FORMAT, METADATA, ROWS_PER_FILE, SCHEMA
from data.feedback_reading import FAULTS
from data.records import BoolArray

MARKED: Final = SCHEMA.with_metadata({METADATA: json.dumps({"format": FORMAT})})
FEW_WORDS: Final = ["need", "propensity_kind", "policy_version", "decode", "catalogue_digest"]


class Parts:
    """Rows as files of bounded size, written by a thread of its own; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: pq.ParquetWriter | None = None
        self._in_file = 0
        self.files: dict[str, int] = {}
        """Rows by file, once the parts are closed."""
        self.rows = 0
        self.responses = 0
        """Rows with a response."""
        self._thread = ThreadPoolExecutor(1)
        self._behind: Future[None] | None = None
        folder.mkdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._thread:
            self._settle()
            self._close()

    def write(self, table: pa.Table) -> None:
        """The next rows; waits for those before, so that no more than one batch is held."""
        self._settle()
        self.rows += len(table)
        self.responses += int(responded(table).sum())
        self._behind = self._thread.submit(self._write, table)

    def _settle(self) -> None:
        if self._behind is not None:
            self._behind.result()
        self._behind = None

    def _write(self, table: pa.Table) -> None:
        if not len(table):
            return
        if self._writer is None:
            path = self._folder / f"part-{len(self.files):05d}.parquet"
            # These files are read once or twice and removed: speed counts more than size.
            self._writer = pq.ParquetWriter(
                path, MARKED, compression="lz4", use_dictionary=FEW_WORDS, write_statistics=False
            )
        self._writer.write_table(table.cast(MARKED))
        self._in_file += len(table)
        if self._in_file >= ROWS_PER_FILE:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self.files[f"{self._folder.name}/part-{len(self.files):05d}.parquet"] = self._in_file
        self._writer, self._in_file = None, 0


class Quarantine:
    """Rows with their faults; no file where there are none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, table: pa.Table, code_B: npt.NDArray[np.uint8]) -> None:
        """Further rows and the numbers of their faults."""
        if not len(table):
            return
        faults = pa.array([FAULTS[code - 1].value for code in code_B.tolist()])
        rows = table.cast(SCHEMA).append_column("fault", faults)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, rows.schema, compression="zstd")
        self._writer.write_table(rows)


def responded(table: pa.Table) -> BoolArray:
    """[B] rows with a response above 0 to any of their items."""
    response = table["response"].combine_chunks()
    ends_B = np.cumsum(response.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
    above_E = np.concatenate([[0], np.cumsum(response.flatten().fill_null(0.0).to_numpy(zero_copy_only=False) > 0)])
    found: BoolArray = np.diff(above_E[ends_B], prepend=0) > 0
    return found
