"""What a push leaves behind: its buckets in a file that every node sees, for engines that come up after it.

The sender writes the buckets down as it sends them, headers and all. An engine that comes later reads them in its
ordinary receiving loop, so that it checks and loads exactly what the others got, and nobody who is at work takes part.

| waits              | for                    | unblocked by                                              |
|--------------------|------------------------|-----------------------------------------------------------|
| a joining engine   | nobody: it reads       | the file system; whoever asked it has a deadline          |
| the sender         | the file system        | itself: a push that fails removes what it has written     |
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rollout.movers import BucketReceiver, Deadline, MoverError


@dataclass(frozen=True, kw_only=True)
class KeptBuckets:
    """Where the buckets lie; takes the place of an endpoint in the metadata message."""

    address: str
    """Path of the file."""


def kept_path(folder: Path, version: int) -> Path:
    """File of a version's buckets."""
    return folder / f"version-{version:06d}.buckets"


class KeptWriter:
    """Writes the buckets of one push down; the file has its name once it is whole."""

    def __init__(self, path: Path) -> None:
        """Begin.

        Raises:
            MoverError: the file cannot be written.
        """
        self._path = path
        self._temporary = path.with_suffix(".part")
        with self._named():
            self._file = self._temporary.open("wb")

    def write(self, buffer: Tensor) -> None:
        """Append a sealed bucket.

        Raises:
            MoverError: there is no room.
        """
        with self._named():
            self._file.write(buffer.cpu().numpy().data)

    def finish(self) -> None:
        """All buckets are there.

        Raises:
            MoverError: there was no room for the last bytes, or the folder is gone.
        """
        with self._named():
            self._file.close()
            self._temporary.replace(self._path)

    def abandon(self) -> None:
        """The push failed: nothing of it stays. Quiet, because whoever calls has an error to tell already."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MoverError(f"{self._temporary}: {error.strerror}, so the push cannot be kept") from error


class KeptReceiver(BucketReceiver):
    """Reads the buckets, in order, as if a sender sent them."""

    def __init__(self, kept: KeptBuckets) -> None:
        self._path = kept.address
        self._read = 0

    def receive(self, nbytes: int, deadline: Deadline) -> Tensor:
        """See `BucketReceiver`."""
        try:
            data = np.fromfile(self._path, dtype=np.uint8, count=nbytes, offset=self._read)
        except OSError as error:
            raise MoverError(f"{self._path}: {error.strerror}") from error
        if len(data) != nbytes:
            raise MoverError(f"{self._path}: ends after {len(data)} of the {nbytes} bytes of a bucket")
        self._read += nbytes
        return torch.from_numpy(data)

    def fail(self, error: str) -> None:
        """Nobody listens: who asked for it hears it from the engine."""

    def close(self) -> None:
        """Nothing is held."""
