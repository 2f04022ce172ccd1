"""`windlass registry`: look at the versions of a registry, and switch the served one by hand."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import Field

from data.settings import Settings
from launch.continual.lock import writing
from launch.continual.registry import Registry, Version


class RegistryCommand(Settings):
    """Arguments of `windlass registry list`."""

    registry: tyro.conf.Positional[Path]
    """Folder of the registry."""


class VersionCommand(RegistryCommand):
    """Arguments of `windlass registry show`."""

    version: int | None = None
    """Number of the version; by default the served one."""


class PromoteCommand(RegistryCommand):
    """Arguments of `windlass registry promote`."""

    version: int
    """Number of the version."""
    why: str = "by hand"
    """Kept with the promotion."""


class RollbackCommand(RegistryCommand):
    """Arguments of `windlass registry rollback`."""

    why: str = "rolled back by hand"
    """Kept with the promotion."""


class PruneCommand(RegistryCommand):
    """Arguments of `windlass registry prune`."""

    keep: int = Field(10, ge=1)
    """Newest versions that stay; so do the served one and the one that a rollback would take."""


def list_command(arguments: Annotated[RegistryCommand, tyro.conf.arg(name="")]) -> dict[str, Any]:
    """List the versions and what was served since when."""
    registry = Registry(arguments.registry)
    current = registry.current()
    versions = [brief(registry.version(number)) for number in registry.numbers()]
    for one in versions:
        mark = "*" if current is not None and one["version"] == current.number else " "
        print(f"{mark} {one['name']}  {one['decision'] or 'first':<9} {one['day'] or ''}  from {one['parent']}")
    served = [{"version": entry.version, "at": entry.at, "why": entry.why} for entry in registry.promotions()]
    return {"current": None if current is None else current.number, "versions": versions, "promotions": served}


def show_command(arguments: Annotated[VersionCommand, tyro.conf.arg(name="")]) -> dict[str, Any]:
    """Show a version, its lineage and the numbers behind its decision; its files are verified."""
    registry = Registry(arguments.registry)
    number = arguments.version
    if number is None:
        current = registry.current()
        number = 0 if current is None else current.number
    version = registry.verify(number)
    answer = brief(version) | {"path": str(version.path), "digest": version.digest, "lineage": dict(version.lineage)}
    print(f"{version.name}: {answer['decision'] or 'the first version'}, updated from {answer['parent']}")
    for told in version.lineage.get("reasons", []):
        print(f"  {told['reason'].replace('_', ' ')}: {told['found']}")
    return answer


def promote_command(arguments: Annotated[PromoteCommand, tyro.conf.arg(name="")]) -> dict[str, Any]:
    """Serve a version, after its files were verified."""
    with changing(arguments.registry) as registry:
        registry.promote(arguments.version, at=time.time(), why=arguments.why)
        return switched(registry.version(arguments.version))


def rollback_command(arguments: Annotated[RollbackCommand, tyro.conf.arg(name="")]) -> dict[str, Any]:
    """Serve again the version that was served before the present one."""
    with changing(arguments.registry) as registry:
        return switched(registry.rollback(at=time.time(), why=arguments.why))


def prune_command(arguments: Annotated[PruneCommand, tyro.conf.arg(name="")]) -> dict[str, Any]:
    """Remove all but the newest versions."""
    with changing(arguments.registry) as registry:
        removed = registry.prune(arguments.keep)
    print(f"removed {len(removed)} versions: {', '.join(map(str, removed)) or 'none'}")
    return {"removed": removed, "versions": registry.numbers()}


@contextmanager
def changing(root: Path) -> Iterator[Registry]:
    """A registry that nobody else changes meanwhile.

    Raises:
        RequestError: there is none, or another process is at work.
    """
    registry = Registry(root)
    with writing(root):
        registry.recover()
        yield registry


def brief(version: Version) -> dict[str, Any]:
    """What a list says of a version."""
    lineage = version.lineage
    return {
        "version": version.number,
        "name": version.name,
        "parent": lineage.get("parent"),
        "day": lineage.get("day"),
        "decision": lineage.get("decision"),
    }


def switched(version: Version) -> dict[str, Any]:
    """Say what is served now."""
    print(f"serving {version.name}")
    return {"current": version.number, "name": version.name}
