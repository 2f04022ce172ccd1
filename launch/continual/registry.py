"""The registry: immutable versions of the model, and which of them is served.

    registry.json          format
    versions/000003/       a plain model folder (`vllm serve REGISTRY/current` loads it), with
        LINEAGE.json       where it comes from and why it was promoted or rejected
        VERSION.json       digest of every file, written last
    promotions.json        what was served since when; its last entry is what is served now
    current -> versions/000003

A version appears by a rename and never changes. `promotions.json` is replaced before the link; a crash between the two
leaves the link on the earlier version, whole, and the next opening moves it on. Readers follow `current`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import xxhash

from data.errors import RequestError, RunError
from launch.continual.files import Files, json_bytes, read_record
from trainer.checkpoints import file_digest

FORMAT: Final = 1
LINEAGE: Final = "LINEAGE.json"
VERSION: Final = "VERSION.json"
CURRENT: Final = "current"
DIGITS: Final = 6


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """One entry of `promotions.json`."""

    version: int
    at: float
    """Seconds since 1970."""
    why: str


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version, as its folder tells."""

    number: int
    path: Path
    digest: str
    """Of the names and contents of its model files."""
    lineage: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What feedback rows call it: number and digest, so that rows of another registry do not pass for its own."""
        return f"{self.number:0{DIGITS}d}-{self.digest[:16]}"


class Registry:
    """A registry folder. One process changes it (`launch.continual.lock`); any may read."""

    def __init__(self, root: Path, files: Files | None = None, *, create: bool = False) -> None:
        """Open a registry; with write access, finish what a crash interrupted.

        Args:
            root: the folder.
            files: how the disk is changed; a test's may die.
            create: make it where there is none.

        Raises:
            RequestError: no registry there, an unknown format, or a file system without what switching needs.
        """
        self.root = root
        self._files = files or Files()
        if create and not (root / "registry.json").exists():
            self._create()
        read_record(root / "registry.json", FORMAT, "a registry; `windlass continual` makes one")
        self._versions = root / "versions"

    def recover(self) -> None:
        """Finish what a crash interrupted: leftovers go, the link follows the promotions. For the one that writes."""
        self._files.clear_leftovers(self.root)
        self._files.clear_leftovers(self._versions)
        promotions = self.promotions()
        if promotions and self._linked() != promotions[-1].version:
            self._point(promotions[-1].version)

    def resolve(self, policy_version: str) -> Version:
        """The version that a feedback row names, as `Version.name`.

        Raises:
            RequestError: no version has that name.
        """
        for number in self.numbers():
            version = self.version(number)
            if version.name == policy_version:
                return version
        known = ", ".join(self.version(number).name for number in self.numbers()) or "none yet"
        raise RequestError("policy_version", policy_version, known)

    def numbers(self) -> list[int]:
        """Numbers of the versions, ascending."""
        return sorted(int(path.name) for path in self._versions.iterdir() if path.name.isdecimal())

    def version(self, number: int) -> Version:
        """One version, unverified.

        Raises:
            RequestError: there is none of that number, or its files are damaged.
        """
        path = self._path(number)
        if not path.is_dir():
            known = ", ".join(str(n) for n in self.numbers()) or "none yet"
            raise RequestError("version", number, known)
        told = read_record(path / VERSION, FORMAT, "a version as windlass wrote it")
        lineage = read_record(path / LINEAGE, FORMAT, "a version as windlass wrote it")
        return Version(number=number, path=path, digest=str(told["digest"]), lineage=lineage)

    def current(self) -> Version | None:
        """What is served; none before the first promotion."""
        promotions = self.promotions()
        return self.version(promotions[-1].version) if promotions else None

    def promotions(self) -> list[Promotion]:
        """What was served, in order."""
        path = self.root / "promotions.json"
        if not path.exists():
            return []
        return [Promotion(**entry) for entry in read_record(path, FORMAT, "a registry's promotions")["promotions"]]

    def add(self, number: int, model: Path, lineage: Mapping[str, Any]) -> Version:
        """Make a version of a model folder; the same number with the same content again changes nothing.

        Raises:
            RequestError: the number is taken by another content.
            RunError: the disk refused; nothing became visible.
        """
        digests = folder_digests(model)
        digest = digest_of(digests)
        if self._path(number).is_dir():
            found = self.version(number)
            if found.digest != digest:
                raise RequestError("version", f"{number} is there with the digest {found.digest}", "a free number")
            return found
        self._check_space(model)
        partial = self._versions / f".{number:0{DIGITS}d}.partial"
        try:
            if partial.exists():
                self._files.remove(partial)
            self._files.copy_folder(model, partial)
            self._files.write(partial / LINEAGE, json_bytes({"format": FORMAT, "number": number, **lineage}))
            record = {"format": FORMAT, "number": number, "digest": digest, "files": digests}
            self._files.write(partial / VERSION, json_bytes(record))
            self._files.rename(partial, self._path(number))
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(f"{self.root}: version {number} could not be written ({error}); the others stay") from error
        return self.version(number)

    def promote(self, number: int, *, at: float, why: str) -> None:
        """Serve a version; again, when it is served already, changes nothing.

        Raises:
            RequestError: no such version, or one whose files are not those written.
        """
        self.verify(number)
        promotions = self.promotions()
        if not promotions or promotions[-1].version != number:
            promotions.append(Promotion(version=number, at=at, why=why))
            content = {"format": FORMAT, "promotions": [asdict(entry) for entry in promotions]}
            self._files.replace_file(self.root / "promotions.json", json_bytes(content))
        if self._linked() != number:
            self._point(number)

    def rollback(self, *, at: float, why: str) -> Version:
        """Serve again what was served before the present version.

        Raises:
            RequestError: nothing was served before.
        """
        promotions = self.promotions()
        earlier = [entry.version for entry in promotions if entry.version != promotions[-1].version]
        if not earlier:
            raise RequestError("rollback", f"{len(set(p.version for p in promotions))} promoted versions", "at least 2")
        self.promote(earlier[-1], at=at, why=why)
        return self.version(earlier[-1])

    def prune(self, keep: int) -> list[int]:
        """Remove all but the newest `keep` versions, never the served one nor the one that a rollback would take.

        Returns:
            The numbers that were removed.

        Raises:
            RequestError: `keep` below 1.
        """
        if keep < 1:
            raise RequestError("keep", keep, "1 or more")
        served = [entry.version for entry in self.promotions()]
        spared = set(self.numbers()[-keep:]) | set(served[-1:])
        spared |= set([number for number in served if number != served[-1]][-1:])
        removed = [number for number in self.numbers() if number not in spared]
        for number in removed:
            self._files.remove_folder(self._path(number))
        return removed

    def verify(self, number: int) -> Version:
        """A version whose files are those that were written.

        Raises:
            RequestError: the first file that is not.
        """
        version = self.version(number)
        told = read_record(version.path / VERSION, FORMAT, "a version as windlass wrote it")["files"]
        found = folder_digests(version.path)
        for name in sorted(told.keys() | found.keys()):
            if told.get(name) != found.get(name):
                raise RequestError(str(version.path / name), "not as it was written", "the file of the version")
        return version

    def _create(self) -> None:
        self._files.make_folder(self.root / "versions")
        probe = self.root / ".probe.partial"
        try:
            for target in ("a", "b"):
                self._files.replace_link(probe, target)
            self._files.remove(probe)
        except OSError as error:
            raise RequestError(
                str(self.root), f"cannot switch a link there ({error})", "a file system with symbolic links and rename"
            ) from error
        self._files.replace_file(self.root / "registry.json", json_bytes({"format": FORMAT}))

    def _path(self, number: int) -> Path:
        return self._versions / f"{number:0{DIGITS}d}"

    def _point(self, number: int) -> None:
        self._files.replace_link(self.root / CURRENT, f"versions/{number:0{DIGITS}d}")

    def _linked(self) -> int | None:
        link = self.root / CURRENT
        return int(os.readlink(link).rpartition("/")[2]) if link.is_symlink() else None

    def _check_space(self, model: Path) -> None:
        needed = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise RunError(
                f"{self.root}: a version needs {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free; "
                "the others stay"
            )


def folder_digests(folder: Path) -> dict[str, str]:
    """Digest of every model file below a folder, by its relative name; the registry's own two files do not count."""
    return {
        path.relative_to(folder).as_posix(): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in (LINEAGE, VERSION)
    }


def digest_of(digests: Mapping[str, str]) -> str:
    """One digest of all files, by which feedback names the version that showed it."""
    return xxhash.xxh3_128_hexdigest("".join(f"{name}:{digests[name]};" for name in sorted(digests)).encode())
