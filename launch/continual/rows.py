"""The rows of a partition: checked and split in one stream, whatever its size.

    train/part-00000.parquet      usable rows but for the last ones
    held_out/part-00000.parquet   the last usable rows by time, which the next cycle trains on
    quarantine.parquet            rows that cannot be used, each with its fault
    requests.u64                  sorted digests of the request ids (`launch.continual.requests`)
    ROWS.json                     counts

Three passes: request ids, times, everything. Suffix `_B`: row of a batch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from data.feedback import DAY_SECONDS, FORMAT, METADATA, ROWS_PER_FILE, SCHEMA, day_start
from data.feedback_reading import EXPECTED, FAULTS, FeedbackChecks, FeedbackFault, fault_codes
from data.parquet import READ_ERRORS, first_line
from data.records import BoolArray
from data.responses import request_digests
from data.settings import Settings
from launch.continual.log_folder import Listing, LogFolder, UnusableFile
from launch.continual.reasons import Reason, Told
from launch.continual.requests import Repeated, RequestSorter

BATCH_ROWS: Final = 1 << 16
TRAIN: Final = "train"
HELD_OUT: Final = "held_out"
REQUESTS: Final = "requests.u64"
REPORT: Final = "ROWS.json"
QUARANTINE: Final = "quarantine.parquet"
MARKED: Final = SCHEMA.with_metadata({METADATA: json.dumps({"format": FORMAT})})
FEW_WORDS: Final = ["need", "propensity_kind", "policy_version", "decode", "catalogue_digest"]

Opener = Callable[[], pq.ParquetFile]


class RowSettings(Settings):
    """Which rows of a partition are used, and when it is not used at all."""

    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of a partition's rows, the last ones by time, that the guard measures on."""
    max_bad_share: float = Field(0.05, ge=0, le=1)
    """Largest share of rows with a fault that a sound log does not have."""
    weight_limit: float = Field(100.0, gt=1)
    """Largest mean of 1 / (items x propensity). In expectation it is at most 1 whatever the policy, so a sound log is
    above the limit with a probability below 1 / limit."""


class RowCount(StrEnum):
    """What became of rows, beside the faults. Keys of `Pass.counts`."""

    ROWS = "rows"
    TRAIN = "train"
    HELD_OUT = "held_out"
    REQUEST_OF_EARLIER_PASS = "request_of_earlier_pass"
    """Among `duplicate_request`: an earlier pass has the request, of another day or of this one."""


@dataclass(frozen=True, kw_only=True)
class RowReport:
    """What a partition held."""

    counts: Mapping[str, int]
    """By `RowCount` and `FeedbackFault`; those that are not zero."""
    files: Mapping[str, int] = field(default_factory=dict)
    """Rows by file, as `train/part-00000.parquet`."""
    responses: Mapping[str, int] = field(default_factory=dict)
    """Rows with a response by part: `train`, `held_out`."""
    policies: Mapping[str, int] = field(default_factory=dict)
    """Usable rows by policy version."""
    mean_weight: float = 0.0
    """Mean of 1 / (items x propensity) over the usable rows, of their first item."""

    def write(self, folder: Path) -> None:
        """Keep the report beside the rows."""
        (folder / REPORT).write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> RowReport:
        """The report of rows that were published."""
        return RowReport(**json.loads((folder / REPORT).read_text(encoding="utf-8")))


def read_rows(
    log: LogFolder,
    listing: Listing,
    names: Sequence[str],
    out: Path,
    *,
    checks: FeedbackChecks,
    settings: RowSettings,
    earlier: Sequence[Path] = (),
) -> RowReport:
    """Check, count and split the rows of some files of a day.

    Args:
        log: where they lie.
        listing: of the day.
        names: the files.
        out: an empty folder that no reader looks at.
        checks: what is asked of the rows.
        settings: the split.
        earlier: request digests of earlier passes.

    Raises:
        UnusableFile: a file that cannot be read or has another schema.
    """
    files = [partial(log.parquet, listing.day, name, promised=listing.promised.get(name)) for name in names]
    rows = sum(opened().metadata.num_rows for opened in files)
    first = day_start(listing.day)
    with RequestSorter(out, rows) as sorter:
        for batch in _batches(files, ["request_id"]):
            sorter.add(request_digests(batch.column("request_id")))
        repeated = sorter.finish(out / REQUESTS, earlier)
    second_S, at = np.zeros(DAY_SECONDS, np.int64), 0
    for batch in _batches(files, ["timestamp"]):
        time_B = pc.fill_null(batch.column("timestamp"), -1).to_numpy(zero_copy_only=False) - first
        counted_B = (time_B >= 0) & (time_B < DAY_SECONDS) & ~repeated.any_of(slice(at, at + len(batch)))
        at += len(batch)
        second_S += np.bincount(time_B[counted_B], minlength=DAY_SECONDS)
    held_from = first + split_second(second_S, settings.held_out)
    report = _split(files, out, repeated, checks, day_first=first, held_from=held_from)
    report.write(out)
    return report


def split_second(second_S: npt.NDArray[np.int64], share: float) -> int:
    """The second from which on rows are held out: as many as possible up to `share`, at least the last second's.

    Args:
        second_S: rows by second of the day.
        share: of all rows.
    """
    later_S = np.cumsum(second_S[::-1])[::-1]
    total = int(later_S[0])
    if not total:
        return DAY_SECONDS
    fits = np.flatnonzero((later_S <= share * total) & (later_S > 0))
    return int(fits[0]) if len(fits) else int(np.flatnonzero(second_S)[-1])


def unusable(report: RowReport, settings: RowSettings) -> Told | None:
    """Why a partition is not used, from its counts; None when it is."""
    counts, rows = report.counts, report.counts.get(RowCount.ROWS, 0)
    if not rows:
        return Told(reason=Reason.EMPTY, found="0 rows")
    known = counts.get(RowCount.REQUEST_OF_EARLIER_PASS, 0)
    bad = sum(counts.get(fault, 0) for fault in FeedbackFault if fault not in EXPECTED) - known
    told = ", ".join(f"{counts[fault]} {fault.value}" for fault in FeedbackFault if counts.get(fault))
    if bad > settings.max_bad_share * rows:
        return Told(reason=Reason.TOO_MANY_BAD_ROWS, found=f"{bad} of {rows} ({told})")
    if report.mean_weight > settings.weight_limit:
        found = f"mean weight of a uniform policy {report.mean_weight:.4g}, at most 1 is expected"
        return Told(reason=Reason.PROPENSITIES_DO_NOT_FIT, found=found)
    if not counts.get(RowCount.TRAIN):
        return Told(reason=Reason.NOTHING_TO_TRAIN, found=f"{rows} rows ({told})")
    if not counts.get(RowCount.HELD_OUT):
        return Told(reason=Reason.NOTHING_HELD_OUT, found=f"{rows} rows ({told})")
    return None


def _split(
    files: Sequence[Opener],
    out: Path,
    repeated: Repeated,
    checks: FeedbackChecks,
    *,
    day_first: int,
    held_from: int,
) -> RowReport:
    counts: Counter[str] = Counter()
    policies: Counter[str] = Counter()
    weights, at = 0.0, 0
    active = checks.n_items if checks.active_I is None else int(checks.active_I.sum())
    with Parts(out / TRAIN) as train, Parts(out / HELD_OUT) as held, _Quarantine(out / QUARANTINE) as quarantine:
        for batch in _batches(files, SCHEMA.names):
            table = pa.table(batch.columns, names=SCHEMA.names)
            rows = slice(at, at + len(table))
            at += len(table)
            code_B = fault_codes(table, checks, day_start_N=day_first, repeated_N=repeated.any_of(rows))
            usable_B = code_B == 0
            late_B = pc.fill_null(batch.column("timestamp"), 0).to_numpy(zero_copy_only=False) >= held_from
            for part, chosen_B in ((train, usable_B & ~late_B), (held, usable_B & late_B)):
                chosen = _chosen(table, chosen_B)
                part.write(chosen)
                policies.update(_words(chosen))
                weights += _uniform_weight(chosen, active)
            quarantine.write(_chosen(table, ~usable_B), code_B[~usable_B])
            counts.update(
                {
                    FAULTS[int(code) - 1].value: int(n)
                    for code, n in zip(*np.unique(code_B[~usable_B], return_counts=True), strict=True)
                }
            )
            duplicate_B = code_B == FAULTS.index(FeedbackFault.DUPLICATE_REQUEST) + 1
            counts[RowCount.REQUEST_OF_EARLIER_PASS] += int((duplicate_B & repeated.across_N[rows]).sum())
        counts.update({RowCount.ROWS: at, RowCount.TRAIN: train.rows, RowCount.HELD_OUT: held.rows})
    usable = counts[RowCount.TRAIN] + counts[RowCount.HELD_OUT]
    return RowReport(
        files=train.files | held.files,
        responses={TRAIN: train.responses, HELD_OUT: held.responses},
        counts={str(name): count for name, count in sorted(counts.items()) if count},
        policies=dict(sorted(policies.items())),
        mean_weight=weights / usable if usable else 0.0,
    )


def responded(table: pa.Table) -> BoolArray:
    """[B] rows of sound lists with a response above 0 to any of their items."""
    response = table["response"].combine_chunks()
    ends_B = np.cumsum(response.value_lengths().to_numpy(zero_copy_only=False))
    above_E = np.concatenate([[0], np.cumsum(response.flatten().to_numpy(zero_copy_only=False) > 0)])
    found: BoolArray = np.diff(above_E[ends_B], prepend=0) > 0
    return found


def _chosen(table: pa.Table, chosen_B: BoolArray) -> pa.Table:
    return table if chosen_B.all() else table.filter(pa.array(chosen_B))


def _words(table: pa.Table) -> dict[str, int]:
    counted = pc.value_counts(table["policy_version"].combine_chunks().dictionary_decode()).to_pylist()
    return {str(one["values"]): int(one["counts"]) for one in counted}


def _uniform_weight(table: pa.Table, n_items: int) -> float:
    """Sum over the rows of 1 / (items it could show x propensity of the first item)."""
    if not len(table):
        return 0.0
    logp0_B = pc.list_element(table["logp0"].combine_chunks(), 0).to_numpy(zero_copy_only=False)
    among = pc.fill_null(pc.list_value_length(table["candidates"].combine_chunks()), n_items)
    return float((np.exp(-logp0_B.astype(np.float64)) / among.to_numpy(zero_copy_only=False)).sum())


def _batches(files: Sequence[Opener], columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The batches of all files; the next one is read while the present one is worked on."""
    # A file that was read keeps its decoders, so that each is opened for its turn only.
    source = (batch for opened in files for batch in opened().iter_batches(BATCH_ROWS, columns=columns))
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(next, source, None)
        while True:
            try:
                batch = ahead.result()
            except READ_ERRORS as error:
                raise UnusableFile(Told(reason=Reason.DAMAGED_FILE, found=first_line(error))) from error
            if batch is None:
                return
            ahead = reader.submit(next, source, None)
            yield batch


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
            self._writer = pq.ParquetWriter(path, MARKED, compression="lz4", use_dictionary=FEW_WORDS)
        self._writer.write_table(table.cast(MARKED))
        self._in_file += len(table)
        if self._in_file >= ROWS_PER_FILE:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self.files[f"{self._folder.name}/part-{len(self.files):05d}.parquet"] = self._in_file
        self._writer, self._in_file = None, 0


class _Quarantine:
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
