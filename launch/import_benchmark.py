"""Memory and time of an import of ten million rows: `python -m launch.import_benchmark [ROWS] [csv|parquet]`.

It writes a file of events with text keys as in the Amazon sets (a tenth as many users as rows, half a million items,
long-tailed), imports it in a process of its own, and reports that process's peak resident memory against the goal of
2 GiB. Not a test: it takes minutes and disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq

from data.errors import RequestError, RunError

GOAL_GIB = 2.0
_SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64()), ("rating", pa.int8())]
)
_CHILD = """
import json, resource, sys, time
from pathlib import Path
from data.importing import ImportRules, import_source
from data.sources import TimeUnit
from data.tabular import ColumnNames, table
begin = time.perf_counter()
source = table(Path(sys.argv[1]), None, ColumnNames(), TimeUnit.SECONDS)
dataset = import_source(source, Path(sys.argv[2]), ImportRules(user_core=2, item_core=2))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"seconds": time.perf_counter() - begin, "peak_gib": peak, **dataset.card["counts"]}))
"""


def measure_import(rows: int = 10_000_000, kind: str = "csv") -> dict[str, float]:
    """Import `rows` made-up events and return peak memory (GiB), seconds and counts.

    Raises:
        RunError: the import failed; its message is passed on.
    """
    with tempfile.TemporaryDirectory(prefix="windlass-import-") as folder:
        path = Path(folder) / f"events.{kind}"
        begin = time.perf_counter()
        _write_events(path, rows)
        written = time.perf_counter() - begin
        child = [sys.executable, "-c", _CHILD, str(path), str(Path(folder) / "dataset")]
        done = subprocess.run(child, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(f"the import failed: {done.stderr.strip().splitlines()[-1]}")
        answer: dict[str, float] = json.loads(done.stdout)
        return {**answer, "file_gib": path.stat().st_size / 2**30, "write_seconds": written, "goal_gib": GOAL_GIB}


def _write_events(path: Path, rows: int) -> None:
    if path.suffix == ".csv":
        with pv.CSVWriter(path, _SCHEMA) as csv:
            for batch in _events(rows):
                csv.write_batch(batch)
        return
    with pq.ParquetWriter(path, _SCHEMA) as parquet:
        for batch in _events(rows):
            parquet.write_batch(batch)


def _events(rows: int, batch_rows: int = 250_000) -> Iterator[pa.RecordBatch]:
    random = np.random.default_rng(0)
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


def main(arguments: list[str]) -> None:
    """Print the measurement as JSON."""
    if len(arguments) > 2 or (arguments and not arguments[0].isdecimal()):
        raise RequestError("arguments", " ".join(arguments), "[ROWS] [csv|parquet]")
    rows = int(arguments[0]) if arguments else 10_000_000
    print(json.dumps(measure_import(rows, arguments[1] if len(arguments) > 1 else "csv"), indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
