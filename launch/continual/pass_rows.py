"""The rows of passes: read once, kept while an update may need them, and drawn again for later updates."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from data.feedback_reading import FeedbackChecks
from launch.continual.files import Files
from launch.continual.journal import Journal, Pass, PassState
from launch.continual.log_folder import LogFolder, is_response
from launch.continual.reasons import Decision
from launch.continual.registry import Registry
from launch.continual.row_folders import RowFolders
from launch.continual.rows import (
    CORRECTED,
    HELD_OUT,
    REQUESTS,
    RESPONDED,
    TRAIN,
    Before,
    RowCount,
    RowReport,
    read_rows,
)
from launch.continual.settings import CorrectionRule, ServiceSettings
from launch.continual.updating import Updater


class PassRows:
    """The row folders of a registry."""

    def __init__(
        self,
        root: Path,
        log: LogFolder,
        registry: Registry,
        updater: Updater,
        journal: Journal,
        settings: ServiceSettings,
        files: Files,
    ) -> None:
        self.root = root
        self.folders = RowFolders(root, files)
        self._log = log
        self._registry = registry
        self._updater = updater
        self._journal = journal
        self._settings = settings
        self._files = files

    def read(self, one: Pass) -> RowReport:
        """The rows of a pass; read when they were not yet.

        Raises:
            UnusableFile: a file of the log cannot be used.
        """
        target = self.root / one.name
        if target.exists():
            return RowReport.read(target)
        partial = self.root / f".{one.name}.partial"
        if partial.exists():
            self._files.remove(partial)
        self._files.make_folder(partial)
        listing = self._log.listing(one.day)
        late_responses = is_late_responses(one)
        used = self._journal.day(one.day).used
        again = {name for other in used for name in other.files if name in listing.exposures}
        report = read_rows(
            self._log,
            listing,
            sorted(again if late_responses else filter(lambda name: not is_response(name), one.files)),
            partial,
            checks=self._checks(one),
            settings=self._settings.rows,
            before=self._before(one),
            read_again=late_responses,
        )
        self._files.publish(partial, target)
        return report

    def _checks(self, one: Pass) -> FeedbackChecks:
        versions = [self._registry.version(number) for number in self._registry.numbers()]
        parent = self._registry.version(one.parent).path
        checks = self._updater.checks(parent, [version.path for version in versions])
        names = {version.name for version in versions}
        return replace(checks, policies=frozenset(names | set(self._settings.policies)))

    def _before(self, one: Pass) -> Before:
        """Digests of the passes whose rows were or will be used, near enough in time."""
        first = date.fromisoformat(one.day)
        near = [
            other
            for other in self._journal.passes()
            if other.used
            and other.name != one.name
            and abs((date.fromisoformat(other.day) - first).days) <= self._settings.duplicate_days
        ]
        of_day = [other for other in near if other.day == one.day]

        def paths(passes: Sequence[Pass], name: str) -> list[Path]:
            every = [self.root / other.name / name for other in passes]
            return [path for path in every if path.exists()]

        return Before(
            requests=paths(near, REQUESTS), of_day=paths(of_day, REQUESTS), responded=paths(of_day, RESPONDED)
        )

    def corrected(self, one: Pass) -> tuple[str, ...]:
        """The row folder with what late responses corrected, where there is something to train on again."""
        retrain = self._settings.late_responses is CorrectionRule.RETRAIN
        return (f"{one.name}/{CORRECTED}",) if retrain and one.counts.get(RowCount.CORRECTED) else ()

    def carry(self) -> tuple[str, ...]:
        """Row folders that earlier passes left for the next update."""
        done = [one for one in self._journal.passes() if one.state is PassState.DONE]
        return done[-1].carry if done else ()

    def policies(self, one: Pass) -> list[dict[str, Any]]:
        """The policies that served the rows of a pass: name, version of the registry (none for a trusted one), rows."""
        versions = {self._registry.version(number).name: number for number in self._registry.numbers()}
        served = RowReport.read(self.root / one.name).policies
        return [{"name": name, "version": versions.get(name), "rows": rows} for name, rows in served.items()]

    def replayed(self, one: Pass, trained: Sequence[str]) -> dict[str, float]:
        """Sources of earlier promoted updates that join one, and the share of each that is drawn."""
        replay = self._settings.replay
        first = date.fromisoformat(one.day)
        earlier = [
            f"{other.name}/{TRAIN}"
            for other in self._journal.passes()
            if other.decision is Decision.PROMOTED
            and 0 <= (first - date.fromisoformat(other.day)).days <= replay.days
            and (self.root / other.name / TRAIN).exists()
        ]
        there = self.folders.rows(earlier)
        if not replay.share or not there:
            return {}
        share = min(1.0, replay.share * self.folders.rows(trained) / there)
        return {source: share for source in earlier if source not in trained}

    def salt(self, one: Pass) -> str:
        """What a draw for the update of a pass depends on."""
        return f"{self._settings.replay.seed}:{one.name}"

    def sweep(self, opened: Collection[str]) -> None:
        """Remove rows that no update will ask for; those of open passes stay."""
        passes = self._journal.passes()
        newest = max((date.fromisoformat(one.day) for one in passes), default=date.min)
        days = self._settings.replay.days if self._settings.replay.share else -1
        near = [one for one in passes if (newest - date.fromisoformat(one.day)).days <= days]
        kept = {f"{one.name}/{TRAIN}" for one in near if one.decision is Decision.PROMOTED}
        self.folders.sweep(kept | set(self.carry()), opened)


def is_late_responses(one: Pass) -> bool:
    """Whether a pass is over responses alone, of a day that was done."""
    return one.number > 0 and bool(one.files) and all(map(is_response, one.files))


def sources(one: Pass) -> tuple[str, str]:
    """The row folders of a pass."""
    return f"{one.name}/{TRAIN}", f"{one.name}/{HELD_OUT}"
