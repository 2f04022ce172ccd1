"""Stands in for `Files` and dies at the n-th change of the disk, as a SIGKILL would."""

from __future__ import annotations

from pathlib import Path

from launch.continual.files import Files


class Killed(BaseException):
    """No handler of the code under test may take it for an error."""


class DyingFiles(Files):
    """Counts the changes; at number `at` (from 0), and at every later one, nothing happens but `Killed`."""

    def __init__(self, at: int | None = None, *, torn: bool = False) -> None:
        self.at = at
        self.torn = torn
        self.calls: list[str] = []

    def before(self, call: str, path: Path) -> None:
        if self.at is not None and len(self.calls) >= self.at:
            if self.torn and call in ("write", "copy") and len(self.calls) == self.at:
                path.write_bytes(b"{")
            self.calls.append(call)
            raise Killed
        self.calls.append(call)
