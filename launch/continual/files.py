"""Changes to the disk, each a call of its own, so that a test can die at every one of them.

Registry and journal change files through a `Files` only. What a reader sees changes by a rename alone; everything
before it happens under names that readers ignore (`.NAME.partial`, `.NAME.deleted`).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from data.errors import RequestError
from trainer.durable import sync_file, sync_tree

PARTIAL = ".partial"
DELETED = ".deleted"


class Files:
    """The calls. `before` is passed ahead of each; a test's subclass raises there."""

    def before(self, call: str, path: Path) -> None:
        """Called ahead of every change, with its name and the path it concerns."""

    def make_folder(self, path: Path) -> None:
        """Make a folder and its parents; one that is there stays."""
        self.before("make_folder", path)
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, content: bytes) -> None:
        """Write a file in place and sync it: for names that no reader looks at."""
        self.before("write", path)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def copy(self, source: Path, target: Path) -> None:
        """Copy one file and sync the copy."""
        self.before("copy", target)
        shutil.copyfile(source, target)
        sync_file(target)

    def rename(self, source: Path, target: Path) -> None:
        """Rename within a folder, replacing a file or link, and sync the folder."""
        self.before("rename", target)
        source.replace(target)
        sync_file(target.parent)

    def publish(self, partial: Path, target: Path) -> None:
        """Give a folder that was filled under a name of no reader its own name, once all of it is on the disk."""
        sync_tree(partial)
        self.rename(partial, target)

    def link(self, path: Path, target: str) -> None:
        """Make a symbolic link."""
        self.before("link", path)
        path.symlink_to(target)

    def remove(self, path: Path) -> None:
        """Remove a file, a link or a folder with what is in it."""
        self.before("remove", path)
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)

    def replace_file(self, path: Path, content: bytes) -> None:
        """Replace a file as a whole: a reader sees the old or the new content, also after a crash."""
        partial = path.with_name(f".{path.name}{PARTIAL}")
        self.write(partial, content)
        self.rename(partial, path)

    def replace_link(self, path: Path, target: str) -> None:
        """Point a link elsewhere: a reader sees the old or the new target."""
        partial = path.with_name(f".{path.name}{PARTIAL}")
        if partial.is_symlink():
            self.remove(partial)
        self.link(partial, target)
        self.rename(partial, path)

    def copy_folder(self, source: Path, target: Path) -> None:
        """Copy a folder's files under a name that no reader looks at."""
        self.make_folder(target)
        for path in sorted(source.rglob("*")):
            place = target / path.relative_to(source)
            if path.is_dir():
                self.make_folder(place)
            else:
                self.copy(path, place)

    def remove_folder(self, path: Path) -> None:
        """Remove a folder that readers know: it loses its name first."""
        doomed = path.with_name(f".{path.name}{DELETED}")
        self.rename(path, doomed)
        self.remove(doomed)

    def clear_leftovers(self, folder: Path) -> None:
        """Remove what a crash left under names that no reader looks at."""
        for path in sorted([*folder.glob(f".*{PARTIAL}"), *folder.glob(f".*{DELETED}")]):
            self.remove(path)


def json_bytes(content: Any) -> bytes:
    """A JSON file's content."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def read_record(path: Path, format_version: int, what: str) -> dict[str, Any]:
    """A JSON file with a format version.

    Raises:
        RequestError: absent, damaged, or of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(str(path), f"cannot be read ({error})", what) from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != format_version:
        raise RequestError(str(path), f"format {found!r}", f"format {format_version}")
    record: dict[str, Any] = content
    return record
