"""The folder that a Ray job is shipped with: which of its files, copied to a place of their own.

In a git checkout these are the tracked files and the new ones that git does not ignore; elsewhere everything but hidden
folders, caches and the folders of datasets and runs. Files that usually hold secrets stay.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from data.errors import RequestError

LARGEST_MIB = 200
"""Ray keeps a working directory in the head's memory, and every node unpacks it."""
STAYS = ("datasets", "runs", "feedback", "registry", "node_modules", "__pycache__", "venv")
"""Folders outside of git that hold no code."""
SECRET_FILES = (".env", ".env.*", "*.pem", "*.key", "id_rsa*", "id_ed25519*", ".netrc", ".pypirc", "credentials*")


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """The files of a working directory that travel."""

    folder: Path
    files: list[str]
    """Paths in `folder`, sorted."""
    left_out: list[str]
    """Files that look like secrets."""
    nbytes: int

    @property
    def has_packages(self) -> bool:
        """Whether our own packages are in it, so that nothing need be installed on the nodes but their dependencies."""
        return "launch/cli.py" in self.files and "data/errors.py" in self.files


def shipment(folder: Path) -> Shipment:
    """What of a folder is shipped.

    Raises:
        RequestError: no folder, nothing in it, or too much.
    """
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise RequestError("--working-dir", folder, "an existing folder")
    names = [name for name in sorted(_listed(folder)) if (folder / name).is_file()]
    left_out = [name for name in names if any(fnmatch(Path(name).name, pattern) for pattern in SECRET_FILES)]
    files = [name for name in names if name not in left_out]
    nbytes = sum((folder / name).stat().st_size for name in files)
    if nbytes > LARGEST_MIB * 2**20:
        largest = max(files, key=lambda name: (folder / name).stat().st_size)
        raise RequestError(
            "--working-dir",
            f"{folder} has {nbytes / 2**20:.0f} MiB to ship (the largest file is {largest})",
            f"at most {LARGEST_MIB} MiB; what git ignores stays, large data belongs in a shared folder",
        )
    return Shipment(folder=folder, files=files, left_out=left_out, nbytes=nbytes)


def _listed(folder: Path) -> Iterator[str]:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        # No git, or no checkout: the folder is walked instead.
        yield from _walked(folder)
        return
    yield from (name for name in done.stdout.split("\0") if name)


def _walked(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in STAYS and not name.startswith(".")]
        for name in names:
            yield str((Path(root) / name).relative_to(folder))


@contextmanager
def staged(what: Shipment) -> Iterator[Path]:
    """A temporary folder with copies of the files, which Ray packs as it is."""
    with TemporaryDirectory(prefix="windlass-ship-") as temporary:
        for name in what.files:
            target = Path(temporary) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(what.folder / name, target)
        yield Path(temporary)
