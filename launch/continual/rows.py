"""The rows of a partition: checked and split in one stream, whatever its size.

    train/part-00000.parquet      usable rows but for the last ones
    held_out/part-00000.parquet   the last usable rows by time, which the next cycle trains on
    corrected/part-00000.parquet  rows that an earlier pass used without a response, and that have one now
    quarantine.parquet            rows that cannot be used, each with its fault
    requests.u64                  sorted digests of the request ids (`launch.continual.requests`)
    responded.u64                 of the used ones that have a response
    corrected.u64                 of the corrected ones
    ROWS.json                     counts

Three passes: request ids, times, everything; responses are joined in the last. Suffix `_B`: row of a batch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from data.feedback import DAY_SECONDS, SCHEMA, KeptRow, day_start
from data.feedback_reading import EXPECTED, FAULTS, FeedbackChecks, FeedbackFault, fault_codes, shows_retired
from data.records import BoolArray
from data.responses import DigestArray, Responses, request_digests
from data.settings import Settings
from launch.continual.late_responses import joined_responses
from launch.continual.log_folder import Listing, LogFolder
from launch.continual.parquet_stream import Opener, batches
from launch.continual.parts import Parts, Quarantine, responded
from launch.continual.reasons import Reason, Told
from launch.continual.requests import DigestFiles, DigestWriter, Repeated, RequestSorter

TRAIN: Final = "train"
HELD_OUT: Final = "held_out"
REQUESTS: Final = "requests.u64"
CORRECTED: Final = "corrected"
PARTS: Final = (TRAIN, HELD_OUT, CORRECTED)
REPORT: Final = "ROWS.json"
RESPONDED: Final = "responded.u64"
CORRECTIONS: Final = "corrected.u64"
QUARANTINE: Final = "quarantine.parquet"
DUPLICATE: Final = FAULTS.index(FeedbackFault.DUPLICATE_REQUEST) + 1
WITHOUT_ID: Final = FAULTS.index(FeedbackFault.MISSING_REQUEST_ID) + 1


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
    CORRECTED = "corrected"
    """Rows that an earlier pass of the day used without a response, and that have one now."""
    REPLAYED = "replayed"
    """Rows of earlier updates that joined the update."""
    RESPONSES = "responses"
    """Responses of files of responses that are of a row."""
    REQUEST_OF_EARLIER_PASS = "request_of_earlier_pass"
    """Among `duplicate_request`: an earlier pass has the request, of another day or of this one."""


@dataclass(frozen=True, kw_only=True)
class Before:
    """What earlier passes leave for this one."""

    requests: Sequence[Path] = ()
    """Request digests of passes near in time, whose requests are not used again."""
    of_day: Sequence[Path] = ()
    """Those among them of the same day, whose rows a late response corrects."""
    responded: Sequence[Path] = ()
    """Digests of the requests that had a response in these."""


@dataclass(frozen=True, kw_only=True)
class RowReport:
    """What a partition held."""

    counts: Mapping[str, int]
    """By `RowCount`, `FeedbackFault` and `KeptRow`; those that are not zero."""
    files: Mapping[str, int] = field(default_factory=dict)
    """Rows by file, as `train/part-00000.parquet`."""
    responses: Mapping[str, int] = field(default_factory=dict)
    """Rows with a response by part: `train`, `held_out`, `corrected`."""
    policies: Mapping[str, int] = field(default_factory=dict)
    """Usable rows by policy version."""
    mean_weight: float = 0.0
    """Mean of 1 / (items x propensity) over the usable rows, of their first item; 0 for rows of retired items."""

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
    before: Before = Before(),
    read_again: bool = False,
) -> RowReport:
    """Check, count and split the rows of some files of a day, joined with all its responses.

    Args:
        log: where they lie.
        listing: of the day.
        names: the files of exposures.
        out: an empty folder that no reader looks at.
        checks: what is asked of the rows.
        settings: the split.
        before: what earlier passes used.
        read_again: earlier passes used the files; only rows that late responses correct are taken from them.

    Raises:
        UnusableFile: a file that cannot be read or has another schema.
    """
    files = [partial(log.parquet, listing.day, name, promised=listing.promised.get(name)) for name in names]
    rows = sum(opened().metadata.num_rows for opened in files)
    first = day_start(listing.day)
    with (
        joined_responses(log, listing, out, checks.response_range) as (responses, unjoined),
        RequestSorter(out, rows) as sorter,
    ):
        for batch in batches(files, ["request_id"]):
            sorter.add(request_digests(batch.column("request_id")))
        repeated = sorter.finish(out / REQUESTS, before.requests, responses.digests)
        held_from = first + (0 if read_again else held_out_from(files, repeated, first, settings.held_out))
        splitter = _Splitter(checks, before, day_first=first, held_from=held_from)
        source = batches(files, SCHEMA.names)
        counts, files_of = splitter.split(source, out, repeated, responses, sorter.digests, read_again=read_again)
        found = len(responses) - responses.without_request
        # Of late files alone, the requests of other responses lie in the files that are not read.
        whole = not before.of_day or read_again
        counts += Counter({RowCount.RESPONSES: found}) + (unjoined + responses.counts() if whole else Counter())
    report = splitter.report(counts, files_of)
    report.write(out)
    return report


def held_out_from(files: Sequence[Opener], repeated: Repeated, first: int, share: float) -> int:
    """The second of the day from which on rows are held out.

    Args:
        files: of the rows.
        repeated: rows that do not count.
        first: the first second of the day.
        share: of all rows.
    """
    second_S, at = np.zeros(DAY_SECONDS, np.int64), 0
    for batch in batches(files, ["timestamp"]):
        time_B = pc.fill_null(batch.column("timestamp"), -1).to_numpy(zero_copy_only=False) - first
        counted_B = (time_B >= 0) & (time_B < DAY_SECONDS) & ~repeated.any_of(slice(at, at + len(batch)))
        at += len(batch)
        second_S += np.bincount(time_B[counted_B], minlength=DAY_SECONDS)
    return split_second(second_S, share)


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


class _Splitter:
    """The last pass over the rows."""

    def __init__(self, checks: FeedbackChecks, before: Before, *, day_first: int, held_from: int) -> None:
        self._checks = checks
        self._of_day, self._responded = DigestFiles(before.of_day), DigestFiles(before.responded)
        self._corrects = bool(before.of_day)
        self._day_first = day_first
        self._held_from = held_from
        self._active = checks.n_items if checks.active_I is None else int(checks.active_I.sum())
        self._policies: Counter[str] = Counter()
        self._weights = 0.0
        self._responses: dict[str, int] = {}

    def split(
        self,
        source: Iterator[pa.RecordBatch],
        out: Path,
        repeated: Repeated,
        responses: Responses,
        digests: Callable[[slice], DigestArray],
        *,
        read_again: bool,
    ) -> tuple[Counter[str], dict[str, int]]:
        """Write every row where it belongs; returns counts, and rows by file."""
        counts: Counter[str] = Counter()
        at = 0
        with ExitStack() as stack:
            parts = {name: stack.enter_context(Parts(out / name)) for name in PARTS}
            quarantine = stack.enter_context(Quarantine(out / QUARANTINE))
            answered = stack.enter_context(DigestWriter(out, RESPONDED, len(repeated.within_N)))
            corrections = stack.enter_context(DigestWriter(out, CORRECTIONS, len(repeated.within_N)))
            for batch in source:
                table = pa.table(batch.columns, names=SCHEMA.names)
                rows = slice(at, at + len(table))
                at += len(table)
                digest_B = digests(rows)
                table = responses.join(table, digest_B, repeated.answered_N[rows])
                code_B, corrected_B = self._codes(table, digest_B, repeated, rows)
                answered_B = (code_B == 0) & responded(table)
                chosen = self._parts(table, code_B, corrected_B, read_again)
                for name, chosen_B in chosen.items():
                    part = _chosen(table, chosen_B)
                    parts[name].write(part)
                    retired_B = shows_retired(part, self._checks)
                    counts[KeptRow.RETIRED_ITEM] += int(retired_B.sum())
                    self._policies.update(_words(part))
                    self._weights += _uniform_weight(part, retired_B, self._active)
                kept_B = np.logical_or.reduce(list(chosen.values())) & answered_B
                answered.add(digest_B[kept_B])
                corrections.add(digest_B[corrected_B])
                if not read_again:
                    quarantine.write(_chosen(table, code_B != 0), code_B[code_B != 0])
                    counts.update(_faults(code_B))
                    duplicate_B = code_B == DUPLICATE
                    counts[RowCount.REQUEST_OF_EARLIER_PASS] += int((duplicate_B & repeated.across_N[rows]).sum())
            counts[RowCount.ROWS] += 0 if read_again else at
        counts.update({name: part.rows for name, part in parts.items()})
        self._responses = {name: part.responses for name, part in parts.items()}
        return counts, {file: rows for part in parts.values() for file, rows in part.files.items()}

    def report(self, counts: Counter[str], files: Mapping[str, int]) -> RowReport:
        """What was found."""
        usable = sum(counts[name] for name in PARTS)
        return RowReport(
            files=files,
            responses=self._responses,
            counts={str(name): count for name, count in sorted(counts.items()) if count},
            policies=dict(sorted(self._policies.items())),
            mean_weight=self._weights / usable if usable else 0.0,
        )

    def _codes(
        self, table: pa.Table, digest_B: DigestArray, repeated: Repeated, rows: slice
    ) -> tuple[npt.NDArray[np.uint8], BoolArray]:
        """[B] faults, and rows that correct one of an earlier pass."""
        across_B = repeated.across_N[rows]
        within_B = repeated.within_N[rows]
        code_B = fault_codes(table, self._checks, day_start_N=self._day_first, repeated_N=within_B)
        corrected_B = np.zeros(len(table), np.bool_)
        if self._corrects:
            late = np.flatnonzero((code_B == 0) & across_B & responded(table))
            late_B = self._of_day.has(digest_B[late]) & ~self._responded.has(digest_B[late])
            corrected_B[late[late_B]] = True
        # A missing id has the digest of the empty text, and is told as what it is.
        code_B[across_B & ~corrected_B & (code_B != WITHOUT_ID)] = DUPLICATE
        return code_B, corrected_B

    def _parts(
        self, table: pa.Table, code_B: npt.NDArray[np.uint8], corrected_B: BoolArray, read_again: bool
    ) -> dict[str, BoolArray]:
        """[B] the rows of each part."""
        nothing_B = np.zeros(len(table), np.bool_)
        if read_again:
            return {TRAIN: nothing_B, HELD_OUT: nothing_B, CORRECTED: corrected_B}
        late_B = pc.fill_null(table["timestamp"], 0).to_numpy() >= self._held_from
        usable_B = (code_B == 0) & ~corrected_B
        return {TRAIN: usable_B & ~late_B, HELD_OUT: usable_B & late_B, CORRECTED: corrected_B}


def _faults(code_B: npt.NDArray[np.uint8]) -> dict[str, int]:
    found = zip(*np.unique(code_B[code_B != 0], return_counts=True), strict=True)
    return {FAULTS[int(code) - 1].value: int(n) for code, n in found}


def _chosen(table: pa.Table, chosen_B: BoolArray) -> pa.Table:
    return table if chosen_B.all() else table.filter(pa.array(chosen_B))


def _words(table: pa.Table) -> dict[str, int]:
    counted = pc.value_counts(table["policy_version"].combine_chunks().dictionary_decode()).to_pylist()
    return {str(one["values"]): int(one["counts"]) for one in counted}


def _uniform_weight(table: pa.Table, retired_B: BoolArray, n_items: int) -> float:
    """Sum over the rows of 1 / (items it could show x propensity of the first item); 0 for an item that is retired."""
    if not len(table):
        return 0.0
    logp0_B = pc.list_element(table["logp0"].combine_chunks(), 0).to_numpy(zero_copy_only=False)
    among = pc.fill_null(pc.list_value_length(table["candidates"].combine_chunks()), n_items)
    weight_B = np.exp(-logp0_B.astype(np.float64)) / among.to_numpy(zero_copy_only=False)
    return float(weight_B[~retired_B].sum())
