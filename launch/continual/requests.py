"""Which requests were seen before, in bounded memory: 64-bit digests of the request ids, sorted, in a file per pass.

A partition's digests are spread over buckets on disk by their leading bits, and each bucket is sorted on its own and
held against the same range of every earlier file. Two of 100 million different ids share a digest with probability
3e-4; the later one then counts as repeated.

Suffixes: `_N` row of the partition, `_B` row of a batch, `_K` digest of a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Final, NamedTuple, Self

import numpy as np

from data.records import BoolArray
from data.responses import DigestArray, PairArray

ROWS_PER_BUCKET: Final = 1 << 21


class Repeated(NamedTuple):
    """Rows whose request was seen before."""

    within_N: BoolArray
    """An earlier row of the partition has it."""
    across_N: BoolArray
    """An earlier pass has it."""
    answered_N: BoolArray
    """A file of responses has it."""

    def any_of(self, rows: slice) -> BoolArray:
        """Either, for some rows."""
        found: BoolArray = self.within_N[rows] | self.across_N[rows]
        return found


class Buckets:
    """Sorts pairs (digest, word) by their digests, whatever their number; use as a context manager."""

    def __init__(
        self, folder: Path, rows: int, *, name: str = "bucket", rows_per_bucket: int = ROWS_PER_BUCKET
    ) -> None:
        """
        Args:
            folder: for the buckets; it exists, and nobody else uses the name there.
            rows: at least about as many pairs as will come.
            name: of the buckets' files.
            rows_per_bucket: what is sorted at once.
        """
        self.bits = max(0, (rows - 1) // rows_per_bucket).bit_length()
        self._stack = ExitStack()
        self._paths = [folder / f"{name}-{number:04d}" for number in range(1 << self.bits)]
        self._files: list[IO[bytes]] = [self._stack.enter_context(path.open("w+b")) for path in self._paths]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def add_pairs(self, pair_B: PairArray) -> None:
        """Further pairs."""
        if not self.bits:
            pair_B.tofile(self._files[0])
            return
        bucket_B = (pair_B[:, 0] >> np.uint64(64 - self.bits)).astype(np.uint16)
        ordered = pair_B[np.argsort(bucket_B, kind="stable")]
        ends = np.cumsum(np.bincount(bucket_B, minlength=len(self._files)))
        for file, part in zip(self._files, np.split(ordered, ends[:-1]), strict=True):
            part.tofile(file)

    def sorted(self) -> Iterator[PairArray]:
        """The pairs of one bucket after the other; of equal digests, as they came."""
        for file in self._files:
            file.seek(0)
            pair_B = np.fromfile(file, np.uint64).reshape(-1, 2)
            yield pair_B[np.argsort(pair_B[:, 0], kind="stable")]

    def range_of(self, digests: DigestArray, bucket: int) -> DigestArray:
        """The part of a sorted file that falls into a bucket."""
        if not self.bits:
            return digests
        width = 1 << (64 - self.bits)
        first = int(np.searchsorted(digests, np.uint64(bucket * width)))
        last = len(digests)
        if bucket + 1 < len(self._files):
            last = int(np.searchsorted(digests, np.uint64((bucket + 1) * width)))
        # A copy, so that the pages of the file do not stay.
        return np.array(digests[first:last])


class RequestSorter(Buckets):
    """Takes the digests of a partition in the order of its rows; use as a context manager."""

    def __init__(self, folder: Path, rows: int, *, rows_per_bucket: int = ROWS_PER_BUCKET) -> None:
        """
        Args:
            folder: for the buckets; it exists, and nobody else looks there.
            rows: of the partition.
            rows_per_bucket: what is sorted at once.
        """
        super().__init__(folder, rows, rows_per_bucket=rows_per_bucket)
        self._rows = rows
        self._next = 0
        self._in_order = folder / "digests.u64"
        self._paths.append(self._in_order)
        self._column = self._stack.enter_context(self._in_order.open("wb"))

    def add(self, digest_B: DigestArray) -> None:
        """The next rows."""
        pair_B = np.empty((len(digest_B), 2), np.uint64)
        pair_B[:, 0] = digest_B
        pair_B[:, 1] = np.arange(self._next, self._next + len(digest_B), dtype=np.uint64)
        self._next += len(digest_B)
        digest_B.tofile(self._column)
        self.add_pairs(pair_B)

    def digests(self, rows: slice) -> DigestArray:
        """The digests of some rows, in the order in which they came."""
        self._column.flush()
        return np.array(mapped(self._in_order)[rows])

    def finish(self, target: Path, earlier: Sequence[Path], answers: DigestArray | None = None) -> Repeated:
        """Write the sorted digests to `target`, and say which rows repeat a request or have a response.

        Args:
            target: a new file.
            earlier: files of earlier passes, as written here.
            answers: sorted digests of the requests of responses.
        """
        found = Repeated(*(np.zeros(self._rows, np.bool_) for _ in Repeated._fields))
        known = [mapped(path) for path in earlier]
        with target.open("wb") as out:
            for number, pair_B in enumerate(self.sorted()):
                digest_B, row_B = pair_B[:, 0].copy(), pair_B[:, 1].astype(np.int64)
                found.within_N[row_B[1:][digest_B[1:] == digest_B[:-1]]] = True
                for digests in known:
                    found.across_N[row_B[_among(digest_B, self.range_of(digests, number))]] = True
                if answers is not None:
                    found.answered_N[row_B[_among(digest_B, self.range_of(answers, number))]] = True
                digest_B.tofile(out)
        return found


class DigestWriter(Buckets):
    """A sorted file of the digests of some rows; use as a context manager, which writes it at its end."""

    def __init__(self, folder: Path, name: str, rows: int) -> None:
        """
        Args:
            folder: for the file and its buckets.
            name: of the file.
            rows: most digests that will come.
        """
        super().__init__(folder, rows, name=f"bucket-{name}")
        self._target = folder / name

    def __exit__(self, *found: object) -> None:
        with self._target.open("wb") as out:
            for pair_B in self.sorted():
                pair_B[:, 0].copy().tofile(out)
        super().__exit__(*found)

    def add(self, digest_B: DigestArray) -> None:
        """Further digests."""
        self.add_pairs(np.stack([digest_B, digest_B], axis=1))


class DigestFiles:
    """Sorted files of digests, asked for few digests at a time."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)

    def has(self, digest_B: DigestArray) -> BoolArray:
        """[B] whether any of the files has it."""
        found_B = np.zeros(len(digest_B), np.bool_)
        if len(digest_B):
            for path in self._paths:
                # Mapped anew each time, so that the pages of the files do not stay.
                found_B |= _among(digest_B, mapped(path))
        return found_B


def mapped(path: Path) -> DigestArray:
    """A file of words, read where it is asked."""
    if path.stat().st_size == 0:
        return np.zeros(0, np.uint64)
    return np.memmap(path, np.uint64, mode="r")


def _among(digest_B: DigestArray, sorted_K: DigestArray) -> BoolArray:
    if len(sorted_K) == 0:
        return np.zeros(len(digest_B), np.bool_)
    place_B = np.minimum(np.searchsorted(sorted_K, digest_B), len(sorted_K) - 1)
    found: BoolArray = sorted_K[place_B] == digest_B
    return found
