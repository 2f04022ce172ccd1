"""Boards of the ring movers: counters and an error text that sender and receivers see, in shared memory or files."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from rollout.movers import MoverError, PeerError

_ERROR_BYTES = 2048
_PAGE = 4096


class Board(ABC):
    """Counters and an error text that both sides see."""

    @abstractmethod
    def sent(self) -> int:
        """Buffers sent."""

    @abstractmethod
    def post_sent(self, count: int) -> None:
        """Set the sender's counter; everything written before is visible to who reads the new value."""

    @abstractmethod
    def taken(self, rank: int) -> int:
        """Buffers receiver `rank` has taken."""

    @abstractmethod
    def post_taken(self, rank: int, count: int) -> None:
        """Set the counter of a receiver."""

    @abstractmethod
    def error(self) -> str:
        """What failed on either side; empty while all is well."""

    @abstractmethod
    def post_error(self, text: str) -> None:
        """Tell both sides; the first text stays."""

    @abstractmethod
    def close(self) -> None:
        """Free."""


class Segment:
    """Anonymous shared memory (memfd): it has no name to leak, and no /dev/shm limit of a container applies.

    Other processes of the same user on the same host open it through /proc. A kill of all sides frees it.
    """

    def __init__(self, size: int, address: str = "") -> None:
        if address:
            self.address = address
            pid, descriptor, token = address.split(":")
            path = f"/proc/{pid}/fd/{descriptor}"
            try:
                self._descriptor = os.open(path, os.O_RDWR)
            except OSError as error:
                raise MoverError(
                    f"shared memory of process {pid} cannot be opened ({error.strerror}): it ended, or runs on another "
                    "host, in another container or as another user; there, use the file or gloo mover"
                ) from error
            if os.fstat(self._descriptor).st_size != size:
                os.close(self._descriptor)
                raise MoverError(f"{path} is not the shared memory that was announced")
        else:
            self._descriptor = os.memfd_create("windlass-push")
            os.ftruncate(self._descriptor, size)
            token = secrets.token_hex(7)
            self.address = f"{os.getpid()}:{self._descriptor}:{token}"
        self._map = mmap.mmap(self._descriptor, size)
        self.bytes: np.ndarray | None = np.frombuffer(self._map, dtype=np.uint8)
        self.words = self.bytes[: _PAGE * (size // _PAGE)].view(np.int64)
        if not address:
            self.words[0] = int(token, 16)
        elif self.words[0] != int(token, 16):
            self.close()
            raise MoverError(f"/proc/{pid}/fd/{descriptor} belongs to another push")

    def close(self) -> None:
        """Unmap; views that live on keep the mapping until they go."""
        if self.bytes is None:
            return
        self.bytes = None
        self.words = np.zeros(0, dtype=np.int64)
        os.close(self._descriptor)
        # Somebody else's view: the mapping goes with it.
        with contextlib.suppress(BufferError):
            self._map.close()


class MemoryBoard(Board):
    """A board in the first bytes of a segment: token, sent, error length, taken per receiver, error text."""

    def __init__(self, segment: Segment, receivers: int) -> None:
        self._segment = segment
        self._words: np.ndarray | None = segment.words[: 3 + receivers]
        self._error_at = 8 * (3 + receivers)

    @staticmethod
    def size(receivers: int) -> int:
        """Bytes of the board, whole pages."""
        return -(-(8 * (3 + receivers) + _ERROR_BYTES) // _PAGE) * _PAGE

    @property
    def _open(self) -> np.ndarray:
        if self._words is None:
            raise MoverError("the connection is closed")
        return self._words

    def sent(self) -> int:
        """See `Board`."""
        return int(self._open[1])

    def post_sent(self, count: int) -> None:
        """See `Board`."""
        # Gives the interpreter lock up and takes it again; its atomics order the payload before the counter also on
        # machines that reorder stores.
        time.sleep(0)
        self._open[1] = count

    def taken(self, rank: int) -> int:
        """See `Board`."""
        return int(self._open[3 + rank])

    def post_taken(self, rank: int, count: int) -> None:
        """See `Board`."""
        time.sleep(0)
        self._open[3 + rank] = count

    def error(self) -> str:
        """See `Board`."""
        length = int(self._open[2])
        if not length or self._segment.bytes is None:
            return ""
        return bytes(self._segment.bytes[self._error_at : self._error_at + length]).decode(errors="replace")

    def post_error(self, text: str) -> None:
        """See `Board`."""
        if self._words is None or self._words[2] or self._segment.bytes is None:
            return
        data = text.encode()[:_ERROR_BYTES]
        self._segment.bytes[self._error_at : self._error_at + len(data)] = np.frombuffer(data, dtype=np.uint8)
        time.sleep(0)
        self._words[2] = len(data)

    def close(self) -> None:
        """See `Board`."""
        self._words = None
        self._segment.close()


class FileBoard(Board):
    """A board of small files, each replaced whole by a rename."""

    def __init__(self, folder: Path, *, owner: bool) -> None:
        self._folder = folder
        self._owner = owner

    def _read(self, name: str) -> str:
        try:
            return (self._folder / name).read_text()
        except FileNotFoundError as error:
            if not self._folder.is_dir():
                raise PeerError("the sender closed the connection") from error
            return ""

    def _write(self, name: str, text: str) -> None:
        temporary = self._folder / f".{name}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            temporary.write_text(text)
            temporary.rename(self._folder / name)
        except FileNotFoundError as error:
            raise PeerError("the sender closed the connection") from error

    def sent(self) -> int:
        """See `Board`."""
        return int(self._read("sent") or 0)

    def post_sent(self, count: int) -> None:
        """See `Board`."""
        self._write("sent", str(count))

    def taken(self, rank: int) -> int:
        """See `Board`."""
        return int(self._read(f"taken-{rank}") or 0)

    def post_taken(self, rank: int, count: int) -> None:
        """See `Board`."""
        self._write(f"taken-{rank}", str(count))

    def error(self) -> str:
        """See `Board`."""
        return self._read("error")

    def post_error(self, text: str) -> None:
        """See `Board`."""
        if self._folder.is_dir() and not (self._folder / "error").exists():
            self._write("error", text[:_ERROR_BYTES])

    def close(self) -> None:
        """See `Board`."""
        if self._owner:
            shutil.rmtree(self._folder, ignore_errors=True)
