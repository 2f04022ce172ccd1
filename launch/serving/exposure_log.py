"""The feedback log as its writer keeps it: what was answered is on the disk before the answer leaves.

    LOG/.serving/open/DAY/00001.jsonl   exposures and responses of a day whose responses may still come
    LOG/day=YYYY-MM-DD/                 a day that is closed: Parquet files and `_SUCCESS` (`data.feedback.write_day`),
                                        and responses that came later (`data.responses`)

A line is a digest and a JSON record. A file is only appended to, and synced once per batch; every start begins new
files. The last line of a file may be torn by a crash: it was not synced, so nobody got the answer. A day is closed when
the window of its last request is over: its folder appears by one rename, then its lines go. A crash between the two
leaves lines of a day that is there; the next start compares the requests and removes the lines.

| who | waits for whom |
|---|---|
| `append`, `join` | one thread of the service calls them, one batch after the other; each waits for the disk |
| `close_days` | another thread; it takes a day out between two batches. Until the day is there its responses are |
|              | refused, and may be sent again |

Memory: the open requests (id, time, items, responses), some 400 bytes each.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data.errors import RequestError, RunError
from data.feedback import DAY_SECONDS, ROWS_PER_FILE, SCHEMA, day_of, day_start, is_day, write_day
from data.responses import RESPONSES, write_responses
from launch.serving.request_ids import time_of
from trainer.durable import sync_file

FORMAT: Final = 1
FOLDER: Final = ".serving"
_DIGEST: Final = 16
CHUNK_ROWS: Final = 8192


class Joined(StrEnum):
    """What became of a response. Values are labels of a metric."""

    JOINED = "joined"
    """It raised the response of the item; the largest one counts."""
    UNCHANGED = "unchanged"
    """The item had as large a response before, as when a response is sent again."""
    LATE = "late"
    """The day of the request is closed. Kept beside it, as a response that came later."""
    UNKNOWN_REQUEST = "unknown_request"
    UNKNOWN_ITEM = "unknown_item"
    """The request did not show the item."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """What somebody did with a shown item."""

    request_id: str
    item: int | None
    """None where the request showed one item only."""
    value: float


@dataclass(kw_only=True)
class _Open:
    """A request whose window is open."""

    timestamp: int
    items: tuple[int, ...]
    responses: list[float]


class ExposureLog:
    """The open end of a feedback log. One process writes it (`launch.continual.lock`)."""

    def __init__(self, root: Path, *, window_s: float, clock: Callable[[], float]) -> None:
        """Open the log and take up what an earlier process left.

        Args:
            root: the feedback log, a local folder; made when missing.
            window_s: how long a request waits for responses.
            clock: seconds since 1970.

        Raises:
            RequestError: no folder, lines that are damaged, or a day that somebody else wrote.
        """
        self.root = root
        self.window_s = window_s
        self._clock = clock
        self._base = root / FOLDER
        self._open: dict[str, dict[str, _Open]] = {}
        self._closing: dict[str, dict[str, _Open]] = {}
        self._files: dict[str, BinaryIO] = {}
        self._turn = threading.Lock()
        self._latest = 0
        self.torn = 0
        """Lines that a crash had left half-written."""
        (self._base / "open").mkdir(parents=True, exist_ok=True)
        for path in (self._base / "open").glob(".*.deleted"):
            shutil.rmtree(path)
        card = self._base / "format.json"
        if not card.exists():
            card.write_text(json.dumps({"format": FORMAT}) + "\n", encoding="utf-8")
            sync_file(card)
        if json.loads(card.read_text(encoding="utf-8") or "{}").get("format") != FORMAT:
            raise RequestError(str(card), card.read_text(encoding="utf-8").strip(), f"format {FORMAT}")
        for path in sorted((self._base / "open").iterdir()):
            if is_day(path.name):
                self._recover(path)

    @property
    def open_requests(self) -> int:
        """Requests that wait for responses."""
        return sum(len(day) for day in list(self._open.values()))

    def now(self) -> int:
        """Seconds since 1970, which never go back, so that no request falls into a day that is closed."""
        self._latest = max(self._latest, int(self._clock()))
        return self._latest

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep exposures; they are on the disk when this returns.

        Args:
            rows: by the columns of `data.feedback.SCHEMA` without `response`.

        Raises:
            RunError: the disk refused; none of the rows counts.
        """
        by_day: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            by_day.setdefault(day_of(row["timestamp"]), []).append(row)
        with self._turn:
            for day, some in by_day.items():
                if day in self._closing or (self.root / f"day={day}").exists():
                    raise RunError(f"{self.root}/day={day} is closed, or was not written by this service")
                self._write(day, [{"exposure": row} for row in some])
                self._remember(self._open.setdefault(day, {}), some)

    def join(self, responses: Sequence[Response]) -> list[Joined]:
        """Keep responses; those that count are on the disk when this returns.

        Raises:
            RunError: the disk refused, or a day is just being closed; sent again, they are joined.
        """
        with self._turn:
            return self._join(responses)

    def _join(self, responses: Sequence[Response]) -> list[Joined]:
        raised: dict[tuple[str, int], float] = {}
        late: dict[str, list[Response]] = {}
        outcomes = []
        for response in responses:
            outcome, slot = self._place(response)
            if outcome is Joined.JOINED:
                key = (response.request_id, slot)
                opened = self._find(response.request_id)
                assert opened is not None
                if response.value > raised.get(key, opened.responses[slot]):
                    raised[key] = response.value
                else:
                    outcome = Joined.UNCHANGED
            elif outcome is Joined.LATE:
                late.setdefault(_day(response.request_id), []).append(response)
            outcomes.append(outcome)
        by_day: dict[str, list[tuple[str, int, float]]] = {}
        for (request_id, slot), value in raised.items():
            by_day.setdefault(_day(request_id), []).append((request_id, slot, value))
        for day, some in by_day.items():
            self._write(day, [{"response": list(one)} for one in some])
            for request_id, slot, value in some:
                self._open[day][request_id].responses[slot] = value
        for day, kept in late.items():
            self._keep_late(day, kept)
        return outcomes

    def close_days(self) -> dict[str, int]:
        """Write the days whose windows are all over, and return their rows by day.

        Raises:
            RunError: the disk refused; the lines stay, and the next call tries again.
        """
        over = [day for day in sorted(list(self._open)) if day_start(day) + DAY_SECONDS + self.window_s <= self.now()]
        return {day: self._close(day) for day in over}

    def close(self) -> None:
        """Close the files; everything in them is on the disk."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    # --- joining ---

    def _find(self, request_id: str) -> _Open | None:
        return self._open.get(_day(request_id), {}).get(request_id)

    def _place(self, response: Response) -> tuple[Joined, int]:
        """Whether a response may be joined, and to which slot."""
        found = self._find(response.request_id)
        if found is None:
            day = _day(response.request_id)
            if day in self._closing:
                raise RunError(f"{self.root}/day={day} is just being closed; send the responses again")
            closed = day and day not in self._open and (self.root / f"day={day}").is_dir()
            return (Joined.LATE if closed else Joined.UNKNOWN_REQUEST), -1
        if response.item is None:
            return (Joined.JOINED, 0) if len(found.items) == 1 else (Joined.UNKNOWN_ITEM, -1)
        shown = response.item in found.items
        return (Joined.JOINED, found.items.index(response.item)) if shown else (Joined.UNKNOWN_ITEM, -1)

    def _keep_late(self, day: str, responses: Sequence[Response]) -> None:
        """Write responses beside a closed day; readers leave out those of requests that were never there."""
        folder, now = self.root / f"day={day}", self.now()
        nameless = [response.request_id for response in responses if response.item is None]
        try:
            shown = _shown(folder, nameless) if nameless else {}
            columns = {
                "request_id": [response.request_id for response in responses],
                "item_id": [
                    shown.get(response.request_id) if response.item is None else response.item for response in responses
                ],
                "response": [response.value for response in responses],
                "timestamp": [now] * len(responses),
            }
            write_responses(folder, f"part-{time.time_ns():020d}", pa.table(columns, schema=RESPONSES))
        except OSError as error:
            raise RunError(f"{folder}: {error.strerror or error}; send the responses again") from error

    def _remember(self, opened: dict[str, _Open], rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            items = tuple(row["exposed"])
            opened[row["request_id"]] = _Open(timestamp=row["timestamp"], items=items, responses=[0.0] * len(items))

    # --- lines ---

    def _write(self, day: str, records: Sequence[dict[str, Any]]) -> None:
        if day in self._files:
            path = Path(os.fsdecode(self._files[day].name))
        else:
            folder = self._base / "open" / day
            number = 1 + max((int(path.stem) for path in folder.glob("*.jsonl")), default=0)
            path = folder / f"{number:05d}.jsonl"
        self._append_lines(day, path, records)

    def _append_lines(self, key: str, path: Path, records: Sequence[dict[str, Any]]) -> None:
        """Append and sync; what a disk took of a batch that it refused is taken back."""
        content = b"".join(map(line_of, records))
        try:
            if key not in self._files:
                path.parent.mkdir(exist_ok=True)
                self._files[key] = path.open("ab", buffering=0)
                sync_file(path.parent)
                sync_file(path.parent.parent)
            file = self._files[key]
            at = os.fstat(file.fileno()).st_size
            try:
                if file.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fdatasync(file.fileno())
            except OSError:
                # The next batch begins a new file, so that at worst the last line of this one is torn.
                self._files.pop(key).close()
                os.truncate(path, at)
                raise
        except OSError as error:
            raise RunError(f"{path}: {error.strerror or error}; nothing of it was answered") from error

    def _recover(self, folder: Path) -> None:
        """Take up the lines of a day, or remove them where the day is closed."""
        opened: dict[str, _Open] = {}
        for kind, record in self._records(folder):
            if kind == "exposure":
                self._remember(opened, [record])
                continue
            request_id, slot, value = record
            if request_id not in opened:
                raise RequestError(
                    str(folder), f"a response to {request_id}, which is not there", "lines of its request"
                )
            opened[request_id].responses[slot] = value
        self._latest = max([self._latest, *(one.timestamp for one in opened.values())])
        day = self.root / f"day={folder.name}"
        if not day.exists():
            self._open[folder.name] = opened
        else:
            there = {
                request_id
                for path in _parts_of(day)
                for request_id in pq.read_table(path, columns=["request_id"])["request_id"].to_pylist()
            }
            lost = opened.keys() - there
            if lost:
                raise RequestError(
                    str(day), f"lacks {len(lost)} requests of {folder}", "a day that this service wrote; move one away"
                )
            self._drop(folder.name)

    def _records(self, folder: Path) -> Iterator[tuple[str, Any]]:
        """Kind and content of every line, in the order of writing."""
        for path in sorted(folder.glob("*.jsonl")):
            damaged = 0
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if damaged:
                        raise RequestError(f"{path}, line {damaged}", "damaged", "a line as the service wrote it")
                    record = record_of(line.rstrip(b"\n"))
                    if record is None:
                        damaged = number
                    else:
                        yield next(iter(record.items()))
            self.torn += bool(damaged)

    # --- days ---

    def _close(self, day: str) -> int:
        with self._turn:
            opened = self._closing[day] = self._open.pop(day)
            file = self._files.pop(day, None)
            if file is not None:
                file.close()
        try:
            write_day(self.root / f"day={day}", self._parts(day, opened))
            self._drop(day)
        except OSError as error:
            with self._turn:
                self._open[day] = opened
            raise RunError(f"{self.root}/day={day}: {error.strerror or error}; its requests stay open") from error
        finally:
            with self._turn:
                del self._closing[day]
        return len(opened)

    def _parts(self, day: str, opened: Mapping[str, _Open]) -> Iterator[pa.Table]:
        """The rows of a day, a file at a time; only a chunk of them is ever Python objects."""
        exposures = (record for kind, record in self._records(self._base / "open" / day) if kind == "exposure")
        while chunks := list(islice(_chunks(exposures, opened), ROWS_PER_FILE // CHUNK_ROWS)):
            yield pa.concat_tables(chunks)

    def _drop(self, day: str) -> None:
        folder = self._base / "open" / day
        doomed = folder.with_name(f".{day}.deleted")
        folder.rename(doomed)
        sync_file(folder.parent)
        shutil.rmtree(doomed)


def _day(request_id: str) -> str:
    """The day that the name of a request tells; empty for a name that is not ours."""
    at = time_of(request_id)
    return "" if at is None else day_of(at)


def _shown(folder: Path, request_ids: Sequence[str]) -> dict[str, int]:
    """The item of each request of a closed day that showed one only."""
    filters = [("request_id", "in", list(request_ids))]
    tables = [pq.read_table(path, columns=["request_id", "exposed"], filters=filters) for path in _parts_of(folder)]
    rows = pa.concat_tables(tables).to_pylist()
    return {row["request_id"]: row["exposed"][0] for row in rows if len(row["exposed"]) == 1}


def _parts_of(folder: Path) -> list[Path]:
    """The files of a closed day that hold exposures."""
    return sorted(folder.glob("*.parquet"))


def _chunks(exposures: Iterator[dict[str, Any]], opened: Mapping[str, _Open]) -> Iterator[pa.Table]:
    while some := list(islice(exposures, CHUNK_ROWS)):
        rows = [{**row, "response": opened[row["request_id"]].responses} for row in some]
        yield pa.Table.from_pylist(rows, schema=SCHEMA)


def line_of(record: dict[str, Any]) -> bytes:
    """A record as a line with its digest."""
    text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def record_of(line: bytes) -> dict[str, Any] | None:
    """The record of a line without its end, None when it is damaged."""
    digest, text = line[:_DIGEST], line[_DIGEST + 1 :]
    if xxhash.xxh3_64_hexdigest(text).encode() != digest:
        return None
    record: dict[str, Any] = json.loads(text)
    return record


def outcomes_by_kind(outcomes: Sequence[Joined]) -> dict[str, int]:
    """How often each outcome, zero included."""
    counts = Counter(outcomes)
    return {kind.value: counts[kind] for kind in Joined}
