"""Checkpoints: atomic folders with a manifest, verified when they are read.

A checkpoint is written under a temporary name, every file and folder is synced, `MANIFEST.json` with sizes and
digests comes last, and a rename makes it visible. So a folder named `step-NNNNNN` is whole, or somebody damaged it
later, which reading detects. Deleting goes the other way round: rename first, then remove.

This module knows nothing about models: the caller fills the folder, and says by `Facts` what must match on reading.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError

from data.errors import RequestError, RunError
from data.faults import fault_point
from trainer.durable import sync_file, sync_tree
from trainer.run_settings import CheckpointSettings

FORMAT = 1
MANIFEST = "MANIFEST.json"
CHUNK_BYTES = 1 << 20
MARGIN = 1.2
"""The space asked for, relative to the newest checkpoint: it, and something for what other processes write."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a checkpoint belongs to."""

    catalogue_digest: str
    vocabulary_size: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of MANIFEST.json."""

    format: int
    step: int
    facts: Facts
    metric: str | None
    """Name of the selection metric that `score` is a value of."""
    score: float | None
    """Larger is better; none when the step was not evaluated."""
    files: dict[str, dict[str, Any]]
    """`{"bytes": int, "xxh3_128": hex}` by path relative to the checkpoint."""


class CheckpointStore:
    """The `checkpoints/` folder of a run. One process writes; any may read."""

    def __init__(self, root: Path, settings: CheckpointSettings) -> None:
        self.root = root
        self._settings = settings
        root.mkdir(parents=True, exist_ok=True)
        for left in [*root.glob(".*.partial"), *root.glob(".*.deleted")]:
            # What a crash left behind was never a checkpoint, or no longer is one.
            shutil.rmtree(left)

    @contextmanager
    def writing(
        self,
        step: int,
        facts: Facts,
        *,
        metric: str | None = None,
        score: float | None = None,
        expected_bytes: int | None = None,
    ) -> Iterator[Path]:
        """Yield the folder to fill; on leaving, make it the checkpoint of `step` and apply the retention.

        When the body raises, nothing becomes visible. `expected_bytes` defaults to the size of the newest checkpoint.

        Raises:
            RunError: too little space on the disk, or the disk refuses; the earlier checkpoints are untouched.
        """
        self._check_space(step, expected_bytes)
        partial = self.root / f".{folder_name(step)}.partial"
        try:
            partial.mkdir()
            yield partial
            sync_tree(partial)
            fault_point("checkpoint_write")
            manifest = Manifest(
                format=FORMAT, step=step, facts=facts, metric=metric, score=score, files=file_digests(partial)
            )
            (partial / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
            sync_file(partial / MANIFEST)
            sync_file(partial)
            fault_point("checkpoint_write")
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(
                f"{self.root}: the checkpoint of step {step} could not be written ({error}); {self._kept()}"
            ) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        final = self.path(step)
        replaced = self.root / f".{final.name}.deleted"
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        sync_file(self.root)
        if replaced.exists():
            shutil.rmtree(replaced)
        self._retain()

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.root / folder_name(step)

    def latest(self) -> Path | None:
        """The newest checkpoint, unverified; none in a fresh run."""
        return latest_checkpoint(self.root)

    def best(self) -> Path | None:
        """The evaluated checkpoint with the largest score, the earliest among equals."""
        return best_checkpoint(self.root)

    def _retain(self) -> None:
        steps = checkpoint_steps(self.root)
        kept = set(steps[-self._settings.last :]) | set(steps_by_score(self.root)[: self._settings.best])
        if self._settings.every:
            kept |= {step for step in steps if step % self._settings.every == 0}
        for step in steps:
            if step not in kept:
                self._delete(self.path(step))

    def _delete(self, path: Path) -> None:
        doomed = self.root / f".{path.name}.deleted"
        path.rename(doomed)
        sync_file(self.root)
        shutil.rmtree(doomed)

    def _check_space(self, step: int, expected_bytes: int | None) -> None:
        newest = self.latest()
        if expected_bytes is None and newest is not None:
            expected_bytes = sum(int(f["bytes"]) for f in read_manifest(newest).files.values())
        needed = int((expected_bytes or 0) * MARGIN)
        free = shutil.disk_usage(self.root).free
        if free < needed:
            raise RunError(
                f"{self.root}: the checkpoint of step {step} needs {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB "
                f"are free; {self._kept()}"
            )

    def _kept(self) -> str:
        newest = self.latest()
        return f"{newest} stays" if newest else "there is no checkpoint yet"


def checkpoint_steps(root: Path) -> list[int]:
    """Steps with a checkpoint below a `checkpoints/` folder, ascending."""
    names = (path.name.removeprefix("step-") for path in root.glob("step-*"))
    return sorted(int(name) for name in names if name.isdecimal())


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint, unverified."""
    steps = checkpoint_steps(root)
    return root / folder_name(steps[-1]) if steps else None


def best_checkpoint(root: Path) -> Path | None:
    """The evaluated checkpoint with the largest score, the earliest among equals."""
    ranked = steps_by_score(root)
    return root / folder_name(ranked[0]) if ranked else None


def steps_by_score(root: Path) -> list[int]:
    """Steps of the evaluated checkpoints, best first; equals by step."""
    manifests = {step: read_manifest(root / folder_name(step)) for step in checkpoint_steps(root)}
    scored = [(-m.score, step) for step, m in manifests.items() if m.score is not None]
    return [step for _, step in sorted(scored)]


def folder_name(step: int) -> str:
    """Name of the checkpoint folder of a step."""
    return f"step-{step:06d}"


def file_digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of every file below a folder, but for the manifest."""
    digests: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            digests[name] = {"bytes": path.stat().st_size, "xxh3_128": file_digest(path)}
    return digests


def file_digest(path: Path) -> str:
    """xxh3_128 of a file's content, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, without a look at the files.

    Raises:
        RequestError: no manifest, no JSON, an unknown format version, or a part is missing.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(
            str(folder), f"no {MANIFEST} ({error.strerror})", "a checkpoint folder that was written to its end"
        ) from error
    except ValueError as error:
        raise RequestError(str(path), "is damaged: not JSON", "a checkpoint as windlass wrote it") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise RequestError(str(path), f"format {found!r}", f"format {FORMAT}")
    try:
        files = {
            str(name): {"bytes": int(f["bytes"]), "xxh3_128": str(f["xxh3_128"])}
            for name, f in content["files"].items()
        }
        facts = content["facts"]
        return Manifest(
            format=FORMAT,
            step=int(content["step"]),
            facts=Facts(catalogue_digest=str(facts["catalogue_digest"]), vocabulary_size=int(facts["vocabulary_size"])),
            metric=content["metric"],
            score=None if content["score"] is None else float(content["score"]),
            files=files,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(str(path), f"is damaged ({error!r})", "a checkpoint as windlass wrote it") from error


def open_checkpoint(folder: Path, expected: Facts | None = None, *, below: str = "") -> Manifest:
    """Verify a checkpoint: manifest, every file's size and digest (or of those `below` a path), what it belongs to.

    Raises:
        RequestError: the first thing that is wrong.
    """
    manifest = read_manifest(folder)
    for name, told in manifest.files.items():
        path = folder / name
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise RequestError(str(folder / MANIFEST), f"names {name}", "paths inside the checkpoint")
        if not name.startswith(below):
            continue
        if not path.is_file():
            raise RequestError(str(path), "is missing", "the files of the manifest; take another checkpoint")
        if path.stat().st_size != told["bytes"]:
            found = f"{path.stat().st_size} bytes"
            raise RequestError(str(path), found, f"{told['bytes']} bytes; take another checkpoint")
        if file_digest(path) != told["xxh3_128"]:
            raise RequestError(str(path), "wrong digest", "the content that was written; take another checkpoint")
    if expected is not None:
        _check_facts(folder, manifest.facts, expected)
    return manifest


def check_own(root: Path, folder: Path) -> None:
    """Refuse learner state that somebody else could have put there: only a run's own checkpoints are continued.

    From anywhere else a job takes `hf/` alone (`init`), which holds no code.

    Raises:
        RequestError: the checkpoint lies outside `root`, or belongs to another user, or everyone may write to it.
    """
    if not folder.resolve().is_relative_to(root.resolve()):
        raise RequestError(str(folder), f"leads to {folder.resolve()}", f"a checkpoint inside {root}; or init for hf/")
    for path in [folder, *sorted(folder.rglob("*"))]:
        facts = path.lstat()
        if facts.st_uid != os.geteuid():
            legal = "a file of the user who continues the run; init takes hf/ of any checkpoint"
            raise RequestError(str(path), f"belongs to user {facts.st_uid}", legal)
        if stat.S_ISLNK(facts.st_mode):
            raise RequestError(str(path), "is a link", "the files that the run wrote")
        if facts.st_mode & stat.S_IWOTH:
            raise RequestError(
                str(path), "may be written by everyone", f"chmod -R o-w {folder}, if you trust its content"
            )


def _check_facts(folder: Path, found: Facts, expected: Facts) -> None:
    if found.vocabulary_size != expected.vocabulary_size:
        raise RequestError(
            str(folder), f"vocabulary of {found.vocabulary_size} tokens", f"{expected.vocabulary_size} as in data.codes"
        )
    if found.catalogue_digest != expected.catalogue_digest:
        raise RequestError(
            str(folder),
            f"belongs to the catalogue {found.catalogue_digest}",
            f"a checkpoint of the catalogue {expected.catalogue_digest}, or the dataset and codes it was trained with",
        )


def open_model(path: Path) -> Path:
    """The hf folder that a path means (`model_folder`), verified where it is part of a checkpoint.

    Raises:
        RequestError: no model there, or a checkpoint without its manifest or with files that are not those written.
    """
    folder = model_folder(path).resolve()
    owner = folder.parent
    # An hf folder that somebody copied elsewhere has no manifest to be held against.
    part_of_checkpoint = (owner / MANIFEST).exists() or owner.name.startswith("step-") or path.resolve() == owner
    if folder.name == "hf" and part_of_checkpoint:
        open_checkpoint(owner, below="hf/")
    return folder


def model_folder(path: Path) -> Path:
    """The hf folder that a path means: an hf folder, a checkpoint, or a run (its best checkpoint, else the newest).

    Raises:
        RequestError: it is none of these.
    """
    if (path / "config.json").is_file():
        return path
    if (path / "hf" / "config.json").is_file():
        return path / "hf"
    root = path if path.name == "checkpoints" else path / "checkpoints"
    found = best_checkpoint(root) or latest_checkpoint(root)
    if found is not None and (found / "hf" / "config.json").is_file():
        return found / "hf"
    raise RequestError("model", path, "an hf folder, a checkpoint folder or a run folder that is there")
