"""`windlass bench data`: importing a file of made-up events beside only reading it, and the item trie.

The file holds events with text keys as in the Amazon sets: a tenth as many users as rows, half a million items at
most, long-tailed. Every import runs in a process of its own, whose peak memory is reported.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq
import tyro
from pydantic import Field

from launch.bench.child import Child, Functions
from launch.bench.frame import Local, Way, answer, paired, ratio
from launch.bench.settings import BenchSettings, Device
from launch.bench.trie import measure_trie

GOAL_MIB: Final = 2048
"""Peak memory that an import of ten million rows must stay under."""
_SCHEMA: Final = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64()), ("rating", pa.int8())]
)


class FileKind(StrEnum):
    """Format of the file of events."""

    CSV = "csv"
    PARQUET = "parquet"


class DataBench(BenchSettings):
    """Arguments of `windlass bench data`; of the common ones, only `--repeats`, `--threads` and `--seed` count."""

    rows: int = Field(1_000_000, ge=1_000)
    """Events of the file."""
    kind: FileKind = FileKind.CSV
    """csv or parquet."""
    items: int = Field(100_000, ge=0)
    """Items of the trie; 0 leaves the trie out."""


def data_command(
    settings: Annotated[DataBench, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Time an import and its peak memory, and the legal sets of the item trie."""
    settings.check_device(Device.CPU)
    with tempfile.TemporaryDirectory(prefix="windlass-import-") as folder:
        path = Path(folder) / f"events.{settings.kind.value}"
        write_events(path, settings.rows, settings.seed)
        importer = Importer(path, settings.threads)
        read = Local(lambda: read_only(path))
        ways = {
            "ours": Way(time=importer.time, peak_mib=lambda: importer.peak_mib, settings={"processes": 1}),
            "read": Way(time=read.time, peak_mib=read.peak_mib, settings={"columns": list(_SCHEMA.names)}),
        }
        seconds = paired(ways, settings.repeats)
        file_mib = path.stat().st_size / 2**20
    trie = measure_trie(settings.items, settings.seed) if settings.items else None
    filled = answer(
        settings,
        ways,
        seconds,
        checked=importer.every_row_counted(settings.rows) and (trie is None or bool(trie["checked"])),
        fraction_of_read=ratio(seconds, "read", "ours"),
        counts=importer.counts,
        file_mib=file_mib,
        trie=trie,
    )
    return {"rows_per_s": settings.rows / filled["seconds"]["median"], **filled}


class Importer:
    """Imports one file again and again, each time in a new process."""

    def __init__(self, path: Path, threads: int) -> None:
        self._path = path
        self._environment = {"OMP_NUM_THREADS": str(threads)}
        self._runs = 0
        self.peak_mib = 0.0
        self.counts: dict[str, dict[str, int]] = {}

    def time(self) -> float:
        """Seconds of one import, without the start of its process."""
        self._runs += 1
        out = self._path.with_name(f"dataset-{self._runs}")
        with Child(build_import, self._path, out, environment=self._environment) as child:
            seconds = child.timer("import")()
            self.peak_mib = max(self.peak_mib, child.peak_mib("import"))
            self.counts = child.call("counts")
        return seconds

    def every_row_counted(self, rows: int) -> bool:
        """Whether all rows were read, and each is an event or has a reason why not."""
        dropped = sum(count for reason, count in self.counts["dropped"].items() if reason != "item_without_events")
        return self.counts["counts"]["rows_read"] == rows == self.counts["counts"]["events"] + dropped


def build_import(path: Path, out: Path) -> Functions:
    """An import, and the counts of its card."""
    from data.dataset import Dataset
    from data.importing import ImportRules, import_source
    from data.sources import TimeUnit
    from data.tabular import ColumnNames, table

    def run() -> None:
        source = table(path, None, ColumnNames(), TimeUnit.SECONDS)
        import_source(source, out, ImportRules(user_core=2, item_core=2))

    def counts() -> dict[str, Any]:
        card = Dataset.open(out).card
        return {"counts": card["counts"], "dropped": card["dropped"]}

    return {"import": run, "counts": counts, "close": lambda: None}


def read_only(path: Path) -> int:
    """Rows of the file, every column parsed and dropped again: what no import can beat."""
    if path.suffix == ".csv":
        with pv.open_csv(path) as reader:
            return sum(batch.num_rows for batch in reader)
    return sum(batch.num_rows for batch in pq.ParquetFile(path).iter_batches())


def write_events(path: Path, rows: int, seed: int) -> None:
    """Write the file."""
    if path.suffix == ".csv":
        with pv.CSVWriter(path, _SCHEMA) as csv:
            for batch in _events(rows, seed):
                csv.write_batch(batch)
        return
    with pq.ParquetWriter(path, _SCHEMA) as parquet:
        for batch in _events(rows, seed):
            parquet.write_batch(batch)


def _events(rows: int, seed: int, batch_rows: int = 250_000) -> Iterator[pa.RecordBatch]:
    random = np.random.default_rng(seed)
    users, items = max(rows // 10, 1), max(min(rows // 20, 500_000), 1)
    for first in range(0, rows, batch_rows):
        size = min(batch_rows, rows - first)
        user = random.integers(0, users, size)
        item = (items * random.random(size) ** 2).astype(np.int64)
        columns = [
            pa.array([f"A{number:013X}" for number in user.tolist()]),
            pa.array([f"B{number:09X}" for number in item.tolist()]),
            pa.array(random.integers(1_100_000_000, 1_540_000_000, size)),
            pa.array(random.integers(1, 6, size).astype(np.int8)),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)
