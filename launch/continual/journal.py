"""The journal: what was done with each day of the log, one small file per day, replaced as a whole.

A day has one pass, and a further one for every set of files that came or changed after it was done. A pass goes through
`PassState`; it is taken up where it stopped. At most one pass is not done. Files are known by their content; size and
time of change only spare reading them again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from launch.continual.files import Files, json_bytes, read_record
from launch.continual.reasons import Decision, Reason, Told

FORMAT: Final = 1


class PassState(StrEnum):
    """How far a pass is. Nothing that a reader of the registry sees happens before `decided`."""

    BEGAN = "began"
    """Files, parent and the candidate's number are fixed; the update runs."""
    DECIDED = "decided"
    """The decision is fixed; registry and rows follow it."""
    DONE = "done"


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """A Parquet file of the log as it was read."""

    digest: str
    """xxh3_128 of the content."""
    bytes: int
    modified_ns: int


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One use of files of a day."""

    day: str
    number: int
    """0 for the day's first, then 1, 2, ... for late files."""
    order: int
    """Number of this pass among all, from 0."""
    state: PassState
    files: Mapping[str, FileFacts]
    parent: int
    """Version that the update starts from."""
    candidate: int
    """Number that the updated model gets in the registry."""
    began_at: float
    """Seconds since 1970."""
    decided_at: float | None = None
    decision: Decision | None = None
    reasons: tuple[Told, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Every number behind the decision."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Rows by what became of them, by `launch.continual.rows.RowCount` and `data.feedback_reading.FeedbackFault`."""
    model: str | None = None
    """Where the candidate's files are, relative to the work folder."""
    model_digest: str | None = None
    carry: tuple[str, ...] = ()
    """Row folders that the next update trains on as well."""

    @property
    def name(self) -> str:
        """Names its folders."""
        return f"{self.day}.{self.number}"

    @property
    def used(self) -> bool:
        """Whether its rows were trained on, or will be."""
        kept = {Reason.TOO_FEW_ROWS, Reason.LATE_RESPONSES}
        updated = self.decision in (Decision.PROMOTED, Decision.REJECTED)
        return updated or any(told.reason in kept for told in self.reasons)


@dataclass(frozen=True, kw_only=True)
class Day:
    """What the journal holds of a day."""

    day: str
    passes: tuple[Pass, ...] = ()

    @property
    def files(self) -> dict[str, FileFacts]:
        """The files of all passes that were not skipped for a fault of theirs, as last read."""
        return {name: facts for one in self.passes for name, facts in one.files.items()}

    @property
    def used(self) -> tuple[Pass, ...]:
        """The passes whose rows were trained on, or will be."""
        return tuple(one for one in self.passes if one.used)

    @property
    def open(self) -> Pass | None:
        """The pass that is not done."""
        return next((one for one in self.passes if one.state is not PassState.DONE), None)

    def with_pass(self, changed: Pass) -> Day:
        """The day with a further pass, or with a changed one."""
        others = [one for one in self.passes if one.number != changed.number]
        return replace(self, passes=tuple(sorted([*others, changed], key=lambda one: one.number)))


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Files of a day that differ from what the journal knows."""

    new: tuple[str, ...]
    rewritten: tuple[str, ...]
    vanished: tuple[str, ...]

    @property
    def to_read(self) -> tuple[str, ...]:
        """Files with content that no pass has seen."""
        return tuple(sorted((*self.new, *self.rewritten)))

    def of(self, kind: Callable[[str], bool]) -> Changes:
        """The changes of some files, by their names."""
        return Changes(
            new=tuple(filter(kind, self.new)),
            rewritten=tuple(filter(kind, self.rewritten)),
            vanished=tuple(filter(kind, self.vanished)),
        )

    def told(self) -> tuple[Told, ...]:
        """The changes as reasons."""
        kinds = (
            (Reason.LATE_FILE, self.new),
            (Reason.REWRITTEN_FILE, self.rewritten),
            (Reason.VANISHED_FILE, self.vanished),
        )
        return tuple(Told(reason=reason, found=", ".join(names)) for reason, names in kinds if names)


def changes(known: Mapping[str, FileFacts], found: Mapping[str, FileFacts]) -> Changes:
    """What differs between the files a day had and those it has; a file that was only touched does not."""
    return Changes(
        new=tuple(sorted(found.keys() - known.keys())),
        rewritten=tuple(sorted(n for n in found.keys() & known.keys() if found[n].digest != known[n].digest)),
        vanished=tuple(sorted(known.keys() - found.keys())),
    )


class Journal:
    """A folder of days. One process changes it (`launch.continual.lock`); any may read."""

    def __init__(self, root: Path, files: Files) -> None:
        self.root = root
        self._files = files

    def recover(self) -> None:
        """Remove what a crash left under names that no reader looks at."""
        self._files.make_folder(self.root)
        self._files.clear_leftovers(self.root)

    def days(self) -> list[Day]:
        """Every day that was begun, in order.

        Raises:
            RequestError: a damaged file, or one of another format.
        """
        return [self._read(path) for path in sorted(self.root.glob("*.json"))]

    def day(self, name: str) -> Day:
        """One day, empty when it was never begun."""
        path = self._path(name)
        return self._read(path) if path.exists() else Day(day=name)

    def passes(self) -> list[Pass]:
        """Every pass, in the order in which they began."""
        return sorted((one for day in self.days() for one in day.passes), key=lambda one: one.order)

    def write(self, changed: Pass) -> None:
        """Keep a pass, new or changed."""
        day = self.day(changed.day).with_pass(changed)
        content = {"format": FORMAT, "day": day.day, "passes": [asdict(one) for one in day.passes]}
        self._files.replace_file(self._path(changed.day), json_bytes(content))

    def _path(self, day: str) -> Path:
        return self.root / f"{day}.json"

    def _read(self, path: Path) -> Day:
        record = read_record(path, FORMAT, "a day of the journal as windlass wrote it")
        return Day(day=record["day"], passes=tuple(_pass(one) for one in record["passes"]))


def _pass(record: Mapping[str, Any]) -> Pass:
    decision = record["decision"]
    told = [Told(reason=Reason(one["reason"]), found=one["found"]) for one in record["reasons"]]
    plain = dict(record) | {
        "state": PassState(record["state"]),
        "files": {name: FileFacts(**facts) for name, facts in record["files"].items()},
        "decision": None if decision is None else Decision(decision),
        "reasons": tuple(told),
        "carry": tuple(record["carry"]),
    }
    return Pass(**plain)
