"""Taking a user out of a registry: rows that wait for an update, and what the journal knows of rewritten files.

`REGISTRY/forgotten.json` keeps who was taken out when; the lineage of every later version holds it. Digests of request
ids stay, so that no request of the user is used again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.errors import RequestError
from data.forgetting import Forgotten, rewrite
from launch.continual.files import Files, json_bytes, read_record
from launch.continual.journal import FileFacts, Journal, PassState
from launch.continual.log_folder import LogFolder
from launch.continual.parts import responded
from launch.continual.registry import Registry
from launch.continual.rows import PARTS, QUARANTINE, RowReport

FORMAT: Final = 1
FORGOTTEN: Final = "forgotten.json"


class ForgettingRegistry:
    """A registry whose lock the caller holds."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files = Files()
        self._registry = Registry(root, self._files)
        self._rows = root / "continual" / "rows"
        self._journal = Journal(root / "continual" / "journal", self._files)

    def check(self) -> None:
        """Refuse where an update is under way, whose rows must not change.

        Raises:
            RequestError: names its day.
        """
        opened = [one.name for one in self._journal.passes() if one.state is not PassState.DONE]
        if opened:
            raise RequestError(str(self._root), f"{opened[0]} is under way", "`windlass continual … --once` first")

    def known(self, log: LogFolder) -> dict[tuple[str, str], FileFacts]:
        """What the journal knows of files that are as it knows them, by day and name."""
        found: dict[tuple[str, str], FileFacts] = {}
        for day in self._journal.days():
            if day.day not in log.days():
                continue
            facts = log.facts(log.listing(day.day), day.files)
            same = {name for name, one in day.files.items() if name in facts and facts[name].digest == one.digest}
            found |= {(day.day, name): day.files[name] for name in same}
        return found

    def follow(
        self, log: LogFolder, changed: Sequence[tuple[str, str]], known: dict[tuple[str, str], FileFacts]
    ) -> None:
        """Let the journal know rewritten files by their new content, so that they are not taken for late ones."""
        for day in {day for day, _ in changed}:
            facts = log.facts(log.listing(day), {})
            names = {name for of, name in changed if of == day and (of, name) in known}
            for one in self._journal.day(day).passes:
                if names & one.files.keys():
                    files = {name: facts[name] if name in names else old for name, old in one.files.items()}
                    self._journal.write(replace(one, files=files))

    def forget_rows(self, user: int, forgotten: Forgotten) -> None:
        """Take a user's rows out of those that wait for an update, or may be drawn again, and out of quarantines."""
        for folder in sorted(path for path in self._rows.glob("*.*") if path.is_dir()):
            quarantine = folder / QUARANTINE
            if quarantine.is_file():
                forgotten.add("quarantined", rewrite(quarantine, lambda table: _others(table, user)))
            report = RowReport.read(folder)
            files, responses = dict(report.files), dict(report.responses)
            for part in PARTS:
                paths = sorted((folder / part).glob("*.parquet"))
                gone = sum(rewrite(path, lambda table: _others(table, user)) for path in paths)
                if gone:
                    forgotten.add("waiting", gone)
                    files |= {f"{part}/{path.name}": pq.ParquetFile(path).metadata.num_rows for path in paths}
                    responses[part] = sum(int(responded(pq.read_table(path)).sum()) for path in paths)
            if files != report.files:
                self._files.replace_file(
                    folder / "ROWS.json", json_bytes(vars(replace(report, files=files, responses=responses)))
                )

    def record(self, user: int, forgotten: Forgotten, *, at: float) -> dict[str, Any]:
        """Keep that a user was taken out; returns the entry."""
        entry = {"user_id": user, "at": at, "rows": forgotten.rows, "versions": self._registry.numbers()}
        entries = [*forgotten_users(self._root), entry]
        self._files.replace_file(self._root / FORGOTTEN, json_bytes({"format": FORMAT, "users": entries}))
        return entry


def forgotten_users(root: Path) -> list[dict[str, Any]]:
    """Who was taken out of a registry's data: number, time, rows by place, and the versions that there were then."""
    path = root / FORGOTTEN
    if not path.exists():
        return []
    users: list[dict[str, Any]] = read_record(path, FORMAT, "what `windlass data forget` wrote")["users"]
    return users


def _others(table: Any, user: int) -> Any:
    return pc.not_equal(pc.fill_null(table["user_id"], -1), user)
