"""A feedback log as the service sees it: days, their files, and whether a day is complete.

The log is a local folder or a pyarrow file-system URI. It belongs to its writer: nothing is changed there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import xxhash
from pydantic import Field

from data.errors import RequestError
from data.feedback import DAY_SECONDS, FORMAT, METADATA, SCHEMA, SUCCESS, day_start, is_day
from data.parquet import READ_ERRORS, first_line, wrong_columns
from data.responses import FOLDER, wrong_responses
from data.settings import Settings
from launch.continual.journal import FileFacts
from launch.continual.reasons import Reason, Told

PREFIX: Final = "day="
CHUNK_BYTES: Final = 1 << 20
ENCODED: Final = ["propensity_kind", "policy_version", "decode", "catalogue_digest"]
"""Text of few different words, read without making a string of every row."""


class CompletenessSettings(Settings):
    """When a day of the log is complete."""

    settle_s: float | None = Field(None, ge=0)
    """Seconds after the last change of a day without `_SUCCESS` after which it counts as complete; null waits for
    `_SUCCESS` for ever."""
    response_window_s: float = Field(86_400.0, ge=0)
    """Seconds after the end of a day in which its requests may still be answered: no-response means none until then."""


class UnusableFile(Exception):
    """A file of the log cannot be used; caught where the partition is decided on."""

    def __init__(self, told: Told) -> None:
        super().__init__(str(told))
        self.told = told


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What lies in the folder of a day."""

    day: str
    files: Mapping[str, tuple[int, int]]
    """(bytes, time of change in ns) of every Parquet file by name; those of responses as `responses/NAME`."""
    success: bool
    promised: Mapping[str, int] = field(default_factory=dict)
    """Rows of each file as `_SUCCESS` tells; empty where it tells nothing."""
    newest_s: float = 0.0
    """Time of the last change of the exposures; infinite on a file system that tells no times."""

    @property
    def exposures(self) -> tuple[str, ...]:
        """Names of the files of exposures, in order."""
        return tuple(sorted(name for name in self.files if not is_response(name)))

    @property
    def responses(self) -> tuple[str, ...]:
        """Names of the files of responses, in order."""
        return tuple(sorted(name for name in self.files if is_response(name)))


class LogFolder:
    """A feedback log, read only."""

    def __init__(self, where: str) -> None:
        """Open a log.

        Args:
            where: folder or URI.

        Raises:
            RequestError: no such folder, or a URI that pyarrow does not know.
        """
        self.where = where
        try:
            if "://" in where:
                self._system, self._root = pafs.FileSystem.from_uri(where)
            else:
                self._system, self._root = pafs.LocalFileSystem(), str(Path(where).expanduser().resolve())
            kind = self._system.get_file_info(self._root).type
        except READ_ERRORS as error:
            raise RequestError("--log", f"{where} ({first_line(error)})", "a folder, or a pyarrow URI") from error
        if kind != pafs.FileType.Directory:
            raise RequestError("--log", f"{where} is no folder", "a feedback log (`windlass data simulate` writes one)")

    def days(self) -> list[str]:
        """Days that have a folder, in order.

        Raises:
            RequestError: a folder `day=...` that names no day.
        """
        infos = self._system.get_file_info(pafs.FileSelector(self._root))
        names = [info.base_name for info in infos if info.type == pafs.FileType.Directory]
        days = sorted(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))
        for day in days:
            if not is_day(day):
                raise RequestError(f"{self.where}/{PREFIX}{day}", "not a day", "folders day=YYYY-MM-DD")
        return days

    def listing(self, day: str) -> Listing:
        """What lies there now; names that begin with a dot or an underscore are the writer's own."""
        infos = self._system.get_file_info(pafs.FileSelector(f"{self._root}/{PREFIX}{day}"))
        late = pafs.FileSelector(f"{self._root}/{PREFIX}{day}/{FOLDER}", allow_not_found=True)
        parquet = _parquet(infos) | {
            f"{FOLDER}/{name}": facts for name, facts in _parquet(self._system.get_file_info(late)).items()
        }
        done = [info for info in infos if info.base_name == SUCCESS]
        promised = _promised(self._read(f"{PREFIX}{day}/{SUCCESS}")) if done else {}
        changed = [info.mtime_ns / 1e9 if info.mtime_ns else math.inf for info in infos if info.is_file]
        return Listing(
            day=day, files=parquet, success=bool(done), promised=promised, newest_s=max(changed, default=0.0)
        )

    def facts(self, listing: Listing, known: Mapping[str, FileFacts]) -> dict[str, FileFacts]:
        """Digests of the files of a day; those with known size and time of change are not read again.

        On a file system that tells no times, every file is.
        """
        found = {}
        for name, (size, modified_ns) in listing.files.items():
            before = known.get(name)
            if modified_ns and before is not None and (before.bytes, before.modified_ns) == (size, modified_ns):
                found[name] = before
            else:
                digest = self._digest(f"{PREFIX}{listing.day}/{name}")
                found[name] = FileFacts(digest=digest, bytes=size, modified_ns=modified_ns)
        return found

    def parquet(self, day: str, name: str, *, promised: int | None = None) -> pq.ParquetFile:
        """Open a file and check what it claims to be.

        Args:
            day: of the log.
            name: of the file.
            promised: rows that `_SUCCESS` tells of it.

        Raises:
            UnusableFile: not Parquet, another schema or format, or another number of rows.
        """
        file = self._parquet(day, name, wrong_schema, ENCODED)
        rows = file.metadata.num_rows
        if promised is not None and rows != promised:
            found = f"{name} has {rows} rows, {SUCCESS} says {promised}"
            raise UnusableFile(Told(reason=Reason.DAMAGED_FILE, found=found))
        return file

    def responses(self, day: str, name: str) -> pq.ParquetFile:
        """Open a file of responses and check what it claims to be.

        Raises:
            UnusableFile: not Parquet, or another schema or format.
        """
        return self._parquet(day, f"{FOLDER}/{name}", wrong_responses, [])

    def _parquet(
        self, day: str, name: str, wrong_in: Callable[[pa.Schema], str | None], encoded: list[str]
    ) -> pq.ParquetFile:
        try:
            stream = self._system.open_input_file(f"{self._root}/{PREFIX}{day}/{name}")
            file = pq.ParquetFile(stream, read_dictionary=encoded)
        except READ_ERRORS as error:
            raise UnusableFile(Told(reason=Reason.DAMAGED_FILE, found=f"{name} ({first_line(error)})")) from error
        wrong = wrong_in(file.schema_arrow)
        if wrong is not None:
            raise UnusableFile(Told(reason=Reason.OTHER_SCHEMA, found=f"{name}: {wrong}"))
        return file

    def _read(self, name: str) -> bytes:
        with self._system.open_input_stream(f"{self._root}/{name}") as stream:
            content: bytes = stream.read()
        return content

    def _digest(self, name: str) -> str:
        digest = xxhash.xxh3_128()
        with self._system.open_input_stream(f"{self._root}/{name}") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()


def is_response(name: str) -> bool:
    """Whether a file of a day, by its name within it, is one of responses."""
    return name.startswith(f"{FOLDER}/")


def _parquet(infos: Sequence[pafs.FileInfo]) -> dict[str, tuple[int, int]]:
    """(bytes, time of change in ns) of the files that are a reader's, by name."""
    return {
        info.base_name: (int(info.size), int(info.mtime_ns or 0))
        for info in infos
        if info.type == pafs.FileType.File
        and info.base_name.endswith(".parquet")
        and not info.base_name.startswith((".", "_"))
    }


def waits_for(listing: Listing, settings: CompletenessSettings, now: float) -> Told | None:
    """Why a day is not to be read yet; None when it is complete.

    Args:
        listing: what lies there.
        settings: the rules.
        now: seconds since 1970.
    """
    over = day_start(listing.day) + DAY_SECONDS
    if not listing.success:
        if settings.settle_s is None:
            return Told(reason=Reason.STILL_WRITTEN, found=f"no {SUCCESS}")
        if now < listing.newest_s + settings.settle_s:
            ago = (
                "at a time that is not told" if math.isinf(listing.newest_s) else f"{now - listing.newest_s:.0f} s ago"
            )
            return Told(reason=Reason.STILL_WRITTEN, found=f"changed {ago}")
    absent = sorted(listing.promised.keys() - listing.files.keys())
    if absent:
        return Told(reason=Reason.FILES_MISSING, found=", ".join(absent))
    if now < over:
        return Told(reason=Reason.DAY_NOT_OVER, found=f"{over - now:.0f} s are left by our clock")
    if now < over + settings.response_window_s:
        return Told(reason=Reason.RESPONSE_WINDOW_OPEN, found=f"{over + settings.response_window_s - now:.0f} s")
    return None


def wrong_schema(schema: pa.Schema) -> str | None:
    """What is wrong with the columns of a file, or its format; None when it is one of a feedback log."""
    return wrong_columns(schema, SCHEMA, metadata=METADATA, version=FORMAT)


def missing_days(day: str, earlier: list[str]) -> list[str]:
    """Days between the newest of `earlier` and `day` that are not there."""
    if not earlier or max(earlier) >= day:
        return []
    first, last = date.fromisoformat(max(earlier)), date.fromisoformat(day)
    return [(first + timedelta(days=ahead)).isoformat() for ahead in range(1, (last - first).days)]


def _promised(content: bytes) -> dict[str, int]:
    """Rows by file as our own writer tells them; other writers leave `_SUCCESS` empty."""
    try:
        told: Any = json.loads(content)
    except ValueError:
        return {}
    rows = told.get("rows") if isinstance(told, dict) else None
    if not isinstance(rows, dict):
        return {}
    return {name: count for name, count in rows.items() if isinstance(name, str) and isinstance(count, int)}
