"""Which requests were seen before, in bounded memory: 64-bit digests of the request ids, sorted, in a file per pass.

A partition's digests are spread over buckets on disk by their leading bits, and each bucket is sorted on its own and
held against the same range of every earlier file. Two of 100 million different ids share a digest with probability
3e-4; the later one then counts as repeated.

Suffixes: `_N` row of the partition, `_B` row of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Final, NamedTuple

import numpy as np

from data.records import BoolArray
from data.responses import DigestArray

ROWS_PER_BUCKET: Final = 1 << 21


class Repeated(NamedTuple):
    """Rows whose request was seen before."""

    within_N: BoolArray
    """An earlier row of the partition has it."""
    across_N: BoolArray
    """An earlier pass has it."""

    def any_of(self, rows: slice) -> BoolArray:
        """Either, for some rows."""
        found: BoolArray = self.within_N[rows] | self.across_N[rows]
        return found


class RequestSorter:
    """Takes the digests of a partition in the order of its rows; use as a context manager."""

    def __init__(self, folder: Path, rows: int, *, rows_per_bucket: int = ROWS_PER_BUCKET) -> None:
        """
        Args:
            folder: for the buckets; it exists, and nobody else looks there.
            rows: of the partition.
            rows_per_bucket: what is sorted at once.
        """
        self._bits = max(0, (rows - 1) // rows_per_bucket).bit_length()
        self._rows = rows
        self._next = 0
        self._stack = ExitStack()
        self._paths = [folder / f"bucket-{number:04d}" for number in range(1 << self._bits)]
        self._files: list[IO[bytes]] = [self._stack.enter_context(path.open("w+b")) for path in self._paths]

    def __enter__(self) -> RequestSorter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def add(self, digest_B: DigestArray) -> None:
        """The next rows."""
        pair_B = np.empty((len(digest_B), 2), np.uint64)
        pair_B[:, 0] = digest_B
        pair_B[:, 1] = np.arange(self._next, self._next + len(digest_B), dtype=np.uint64)
        self._next += len(digest_B)
        if not self._bits:
            pair_B.tofile(self._files[0])
            return
        bucket_B = (digest_B >> np.uint64(64 - self._bits)).astype(np.int64)
        ordered = pair_B[np.argsort(bucket_B, kind="stable")]
        ends = np.cumsum(np.bincount(bucket_B, minlength=len(self._files)))
        for file, part in zip(self._files, np.split(ordered, ends[:-1]), strict=True):
            part.tofile(file)

    def finish(self, target: Path, earlier: Sequence[Path]) -> Repeated:
        """Write the sorted digests to `target`, and say which rows repeat a request.

        Args:
            target: a new file.
            earlier: files of earlier passes, as written here.
        """
        found = Repeated(np.zeros(self._rows, np.bool_), np.zeros(self._rows, np.bool_))
        known = [_mapped(path) for path in earlier]
        with target.open("wb") as out:
            for number, file in enumerate(self._files):
                file.seek(0)
                pair_B = np.fromfile(file, np.uint64).reshape(-1, 2)
                pair_B = pair_B[np.argsort(pair_B[:, 0], kind="stable")]
                digest_B, row_B = pair_B[:, 0].copy(), pair_B[:, 1].astype(np.int64)
                found.within_N[row_B[1:][digest_B[1:] == digest_B[:-1]]] = True
                for digests in known:
                    found.across_N[row_B[_among(digest_B, self._range(digests, number))]] = True
                digest_B.tofile(out)
        return found

    def _range(self, digests: DigestArray, bucket: int) -> DigestArray:
        """The part of a sorted file that falls into a bucket."""
        if not self._bits:
            return digests
        width = 1 << (64 - self._bits)
        first = int(np.searchsorted(digests, np.uint64(bucket * width)))
        last = len(digests)
        if bucket + 1 < len(self._files):
            last = int(np.searchsorted(digests, np.uint64((bucket + 1) * width)))
        # A copy, so that the pages of the file do not stay.
        return np.array(digests[first:last])


def _mapped(path: Path) -> DigestArray:
    if path.stat().st_size == 0:
        return np.zeros(0, np.uint64)
    return np.memmap(path, np.uint64, mode="r")


def _among(digest_B: DigestArray, sorted_K: DigestArray) -> BoolArray:
    if len(sorted_K) == 0:
        return np.zeros(len(digest_B), np.bool_)
    place_B = np.minimum(np.searchsorted(sorted_K, digest_B), len(sorted_K) - 1)
    found: BoolArray = sorted_K[place_B] == digest_B
    return found
