"""The row folders of all passes: logs made of them for updates, and what of them is still needed.

A source is `DAY.N/train` or `DAY.N/held_out`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from data.feedback import FORMAT, SUCCESS
from launch.continual.files import PARTIAL, Files, json_bytes
from launch.continual.rows import HELD_OUT, TRAIN, RowReport


class RowFolders:
    """A folder of row folders."""

    def __init__(self, root: Path, files: Files) -> None:
        self.root = root
        self._files = files

    def files_of(self, source: str) -> dict[Path, int]:
        """Rows by Parquet file."""
        folder, _, part = source.partition("/")
        report = RowReport.read(self.root / folder)
        return {self.root / folder / name: rows for name, rows in report.files.items() if name.startswith(f"{part}/")}

    def rows(self, sources: Sequence[str]) -> int:
        """Rows of some sources."""
        return sum(sum(self.files_of(source).values()) for source in sources)

    def responses(self, sources: Sequence[str]) -> int:
        """Rows of some sources that have a response."""
        count = 0
        for source in sources:
            folder, _, part = source.partition("/")
            count += RowReport.read(self.root / folder).responses.get(part, 0)
        return count

    def feedback(self, folder: Path, sources: Sequence[str]) -> Path:
        """A feedback log of links to the files of some sources; a crash leaves it absent or whole."""
        if folder.exists():
            return folder
        partial = folder.with_name(f".{folder.name}{PARTIAL}")
        if partial.exists():
            self._files.remove(partial)
        promised: dict[Path, dict[str, int]] = {}
        for source in sources:
            day = partial / f"day={source.split('.')[0]}"
            self._files.make_folder(day)
            for path, rows in self.files_of(source).items():
                name = f"{source.replace('/', '-')}-{path.name}"
                self._files.link(day / name, str(path.resolve()))
                promised.setdefault(day, {})[name] = rows
        for day, files in promised.items():
            self._files.write(day / SUCCESS, json_bytes({"format": FORMAT, "rows": files}))
        self._files.rename(partial, folder)
        return folder

    def sweep(self, carried: Collection[str], opened: Collection[str]) -> None:
        """Remove rows that no update will ask for: neither carried nor of an open pass.

        Args:
            carried: sources.
            opened: names of passes.
        """
        for path in sorted(self.root.iterdir()):
            if path.name in opened:
                continue
            self._files.clear_leftovers(path)
            for part in (TRAIN, HELD_OUT):
                if f"{path.name}/{part}" not in carried and (path / part).exists():
                    self._files.remove_folder(path / part)
