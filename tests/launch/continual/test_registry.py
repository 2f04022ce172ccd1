"""The registry: versions never change, the served one is whole at every instant, switching back, pruning, bad input.

The process dies at every single change of the disk while a version is added and promoted; afterwards `current` points
at a whole version and doing the same again ends in the undisturbed registry. Not checked: two processes at once (the
lock), the content of the lineage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.errors import RequestError
from launch.continual.files import Files
from launch.continual.registry import Registry, folder_digests
from tests.launch.continual.dying_files import DyingFiles, Killed


def model(folder: Path, weights: str) -> Path:
    """A folder in place of a model."""
    (folder / "catalogue").mkdir(parents=True)
    (folder / "model.safetensors").write_text(weights)
    (folder / "catalogue" / "items.parquet").write_text("items")
    return folder


def served(root: Path) -> str:
    """What a reader that follows `current` loads; every file of the version is there."""
    version = Registry(root).version(int((root / "current").resolve().name))
    assert Registry(root).verify(version.number)
    return (root / "current" / "model.safetensors").read_text()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "registry", create=True)
    registry.add(1, model(tmp_path / "one", "first"), {"parent": None})
    registry.promote(1, at=1.0, why="the first")
    return registry


def add_and_promote(root: Path, files: Files, source: Path) -> None:
    """A cycle's use of the registry; it can be done again."""
    registry = Registry(root, files, create=True)
    registry.recover()
    registry.add(2, source, {"parent": 1})
    registry.promote(2, at=2.0, why="better")


def content(root: Path) -> dict[str, Any]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("torn", [False, True])
def test_dying_at_every_change(tmp_path: Path, torn: bool) -> None:
    source = model(tmp_path / "two", "second")
    counting = DyingFiles()
    plain = fresh(tmp_path / "plain")
    add_and_promote(plain, counting, source)
    assert len(counting.calls) > 10
    for at in range(len(counting.calls)):
        root = fresh(tmp_path / f"at-{at}")
        with pytest.raises(Killed):
            add_and_promote(root, DyingFiles(at, torn=torn), source)
        assert served(root) in ("first", "second")
        add_and_promote(root, Files(), source)
        assert served(root) == "second"
        assert content(root) == content(plain)


def fresh(root: Path) -> Path:
    """A registry that serves a first version."""
    registry = Registry(root, create=True)
    registry.add(1, model(root.parent / f"{root.name}-one", "first"), {"parent": None})
    registry.promote(1, at=1.0, why="the first")
    return root


def test_dying_while_the_registry_is_made(tmp_path: Path) -> None:
    counting = DyingFiles()
    Registry(tmp_path / "whole", counting, create=True)
    for at in range(len(counting.calls)):
        root = tmp_path / f"at-{at}"
        with pytest.raises(Killed):
            Registry(root, DyingFiles(at), create=True)
        Registry(root, create=True).recover()
        assert Registry(root).numbers() == []


def test_a_version_never_changes(registry: Registry, tmp_path: Path) -> None:
    same = registry.add(1, model(tmp_path / "again", "first"), {"parent": "another"})
    assert same.lineage["parent"] is None
    with pytest.raises(RequestError, match="free number"):
        registry.add(1, model(tmp_path / "other", "changed"), {})


def test_rollback_and_back_again(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="rollback"):
        registry.rollback(at=2.0, why="no earlier one")
    registry.add(2, model(tmp_path / "two", "second"), {"parent": 1})
    registry.promote(2, at=2.0, why="better")
    assert registry.rollback(at=3.0, why="worse after all").number == 1
    assert served(registry.root) == "first"
    assert [entry.version for entry in registry.promotions()] == [1, 2, 1]
    assert registry.rollback(at=4.0, why="no").number == 2


def test_prune_spares_what_is_served_and_what_was(registry: Registry, tmp_path: Path) -> None:
    for number in (2, 3, 4, 5):
        registry.add(number, model(tmp_path / str(number), f"weights {number}"), {"parent": number - 1})
    registry.promote(2, at=2.0, why="better")
    assert registry.prune(1) == [3, 4]
    assert registry.numbers() == [1, 2, 5]
    with pytest.raises(RequestError, match="keep"):
        registry.prune(0)


def test_names_of_feedback_rows(registry: Registry, tmp_path: Path) -> None:
    name = registry.version(1).name
    assert registry.resolve(name).number == 1
    with pytest.raises(RequestError, match=name):
        registry.resolve("000001-0000000000000000")


def test_damage_is_named(registry: Registry) -> None:
    (registry.root / "versions" / "000001" / "model.safetensors").write_text("changed")
    with pytest.raises(RequestError, match=r"model\.safetensors"):
        registry.promote(1, at=2.0, why="again")
    with pytest.raises(RequestError, match="version: 7"):
        registry.version(7)


def test_no_registry_and_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"registry\.json"):
        Registry(tmp_path)
    (tmp_path / "registry.json").write_text('{"format": 99}')
    with pytest.raises(RequestError, match="format 99"):
        Registry(tmp_path)


def test_digests_leave_the_registrys_own_files_out(registry: Registry) -> None:
    assert set(folder_digests(registry.version(1).path)) == {"model.safetensors", "catalogue/items.parquet"}
