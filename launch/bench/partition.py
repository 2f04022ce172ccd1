"""`windlass bench partition`: reading, validating and joining a day of a feedback log, beside only reading its files.

The day is made up: ids of 32 characters, histories of `--history` items in the mean, one shown item, a response in the
row for one in twenty and in files of responses for another one. Journal and registry are timed beside it, as often as
a promoted partition needs them.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from pydantic import Field

from data.feedback import DAY_SECONDS, FORMAT, METADATA, ROWS_PER_FILE, SCHEMA, SUCCESS, day_start
from data.feedback_reading import FeedbackChecks
from data.responses import RESPONSES, write_responses
from launch.bench.child import Child, Functions
from launch.bench.frame import Way, answer, ratio
from launch.bench.frame import paired as interleaved
from launch.bench.settings import BenchSettings, Device
from launch.continual.files import Files
from launch.continual.journal import Journal, Pass, PassState
from launch.continual.log_folder import LogFolder
from launch.continual.registry import Registry
from launch.continual.rows import RowSettings, read_rows

GOAL_ROWS_PER_S: Final = 500_000
"""On two cores, in less than `GOAL_MIB`."""
GOAL_MIB: Final = 2048
DAY: Final = "2026-01-31"
ITEMS: Final = 50_000
RESPONSE_EVERY: Final = 20
JOURNAL_WRITES: Final = 3
"""Of a promoted pass: began, decided, done."""


class PartitionBench(BenchSettings):
    """Arguments of `windlass bench partition`; of the common ones, only `--repeats` and `--seed` count."""

    rows: int = Field(2_000_000, ge=1_000)
    """Rows of the day."""
    history: int = Field(20, ge=0, le=1_000)
    """Items of a history in the mean."""
    model_mib: int = Field(2, ge=1, le=4096)
    """Size of the model that the registry takes."""


def partition_command(
    settings: Annotated[PartitionBench, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Time a partition from its files to rows that an update can use, and its peak memory."""
    settings.check_device(Device.CPU)
    with tempfile.TemporaryDirectory(prefix="windlass-partition-") as folder:
        log = Path(folder) / "log"
        write_day(log, settings)
        with Child(build_reading, log, Path(folder), environment={}) as child:
            ways = {
                "ours": Way(time=child.timer("join"), peak_mib=lambda: child.peak_mib("join")),
                "read": Way(time=child.timer("read"), peak_mib=lambda: child.peak_mib("read")),
            }
            seconds = interleaved(ways, settings.repeats)
            counts = child.call("counts")
        keeping = [keep_seconds(Path(folder) / f"registry-{n}", settings.model_mib) for n in range(settings.repeats)]
    filled = answer(
        settings,
        ways,
        seconds,
        checked=counts["train"] + counts["held_out"] == settings.rows == counts["rows"],
        fraction_of_read=ratio(seconds, "read", "ours"),
        counts=counts,
        journal_and_registry_s=sorted(keeping)[len(keeping) // 2],
    )
    return {"rows_per_s": settings.rows / filled["seconds"]["median"], **filled}


def build_reading(log: Path, folder: Path) -> Functions:
    """The reading of the day, and only its files."""
    checks = FeedbackChecks(n_items=ITEMS, catalogues=frozenset({"c"}), policies=frozenset({"v"}))
    reports: list[dict[str, int]] = []

    def join() -> None:
        source = LogFolder(str(log))
        listing = source.listing(DAY)
        source.facts(listing, {})
        out = folder / f"rows-{len(reports)}"
        out.mkdir()
        report = read_rows(source, listing, listing.exposures, out, checks=checks, settings=RowSettings())
        reports.append(dict(report.counts))

    def read() -> None:
        for path in sorted((log / f"day={DAY}").glob("*.parquet")):
            for _ in pq.ParquetFile(path).iter_batches():
                pass

    return {"join": join, "read": read, "counts": lambda: reports[-1], "close": lambda: None}


def keep_seconds(root: Path, model_mib: int) -> float:
    """Seconds of journal and registry for one promoted partition."""
    model = root.with_name(f"{root.name}-model")
    model.mkdir()
    (model / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(model_mib << 20))
    files = Files()
    registry = Registry(root, files, create=True)
    journal = Journal(root / "journal", files)
    journal.recover()
    one = Pass(
        day=DAY, number=0, order=0, state=PassState.BEGAN, files={}, parent=0, candidate=1, began_at=0.0, counts={}
    )
    begun = time.perf_counter()
    for _ in range(JOURNAL_WRITES):
        journal.write(one)
    registry.add(1, model, {})
    registry.promote(1, at=0.0, why="benchmark")
    return time.perf_counter() - begun


def write_day(log: Path, settings: PartitionBench) -> None:
    """Write the exposures and responses of a day."""
    day = log / f"day={DAY}"
    day.mkdir(parents=True)
    random = np.random.default_rng(settings.seed)
    promised = {}
    marked = SCHEMA.with_metadata({METADATA: json.dumps({"format": FORMAT})})
    for number, first in enumerate(range(0, settings.rows, ROWS_PER_FILE)):
        table = _exposures(random, min(ROWS_PER_FILE, settings.rows - first), settings.history)
        promised[f"part-{number:05d}.parquet"] = len(table)
        pq.write_table(table.cast(marked), day / f"part-{number:05d}.parquet", compression="zstd")
        late = table.slice(RESPONSE_EVERY // 2).take(pa.array(np.arange(0, len(table) - 10, RESPONSE_EVERY)))
        columns = [
            late["request_id"],
            pa.chunked_array([late["exposed"].combine_chunks().flatten()]),
            pa.chunked_array([np.ones(len(late), np.float32)]),
            late["timestamp"],
        ]
        write_responses(day, f"part-{number:05d}", pa.table(columns, schema=RESPONSES))
    (day / SUCCESS).write_text(json.dumps({"format": FORMAT, "rows": promised}), encoding="utf-8")


def _exposures(random: np.random.Generator, rows: int, history: int) -> pa.Table:
    length = random.integers(0, 2 * history + 1, rows)
    ends = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
    each = pa.array(np.arange(rows + 1, dtype=np.int32))

    response = (np.arange(rows) % RESPONSE_EVERY == 0).astype(np.float32)

    def items(count: int) -> pa.Array:
        return pa.array(random.integers(0, ITEMS, count).astype(np.int32))

    columns = {
        "request_id": pa.array([f"{number:032x}" for number in random.integers(0, 2**63, rows).tolist()]),
        "user_id": pa.array(random.integers(0, 1_000_000, rows).astype(np.int32)),
        "timestamp": pa.array(day_start(DAY) + np.sort(random.integers(0, DAY_SECONDS, rows))),
        "history": pa.ListArray.from_arrays(pa.array(ends), items(int(ends[-1]))),
        "exposed": pa.ListArray.from_arrays(each, items(rows)),
        "response": pa.ListArray.from_arrays(each, pa.array(response)),
        "logp0": pa.ListArray.from_arrays(each, pa.array((-9 - random.random(rows)).astype(np.float32))),
        "temperature": pa.array(np.ones(rows, np.float32)),
    }
    for name, word in (
        ("propensity_kind", "sample"),
        ("policy_version", "v"),
        ("decode", "sample"),
        ("catalogue_digest", "c"),
    ):
        columns[name] = pa.array([word] * rows)
    return pa.table([columns.get(field.name, pa.nulls(rows, field.type)) for field in SCHEMA], schema=SCHEMA)
