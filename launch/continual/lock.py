"""One process at a time changes a registry and its journal; the other says so in one line and ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from data.errors import RequestError

LOCK: Final = ".lock"


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Hold a folder for writing; the kernel lets go of it when the process dies, however it dies.

    Raises:
        RequestError: another process holds it, or it cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise RequestError(str(root), error.strerror or str(error), "a folder that can be written") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise RequestError(str(root), f"is being changed by process {holder}", "one at a time; wait") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
