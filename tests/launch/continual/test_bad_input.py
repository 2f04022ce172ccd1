"""Contract: what docs/continual.md says of bad input and is not in test_cycle.py: files of another schema or format,
several policies, propensities that are none, files that vanish, responses that are damaged, a log on a file system that
is not local, with and without times, a registry where links cannot be switched.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from data.errors import RequestError
from data.responses import responses_table, write_responses
from launch.continual.cycle import Cycle, begin_registry
from launch.continual.files import Files
from launch.continual.log_folder import CompletenessSettings, LogFolder
from launch.continual.registry import Registry
from launch.continual.results import Result
from launch.continual.settings import ServiceSettings
from tests.launch.continual import world
from tests.launch.continual.world import NOW, SETTINGS, days, finish_day, rows, write_file

ONE, TWO = days(2)


class Place:
    """A log, a registry and the first model."""

    def __init__(self, folder: Path) -> None:
        self.log, self.root = folder / "log", folder / "registry"
        self.log.mkdir()
        self.policy = world.first_name(folder / "first")
        self.model = folder / "first" / "model"

    def day(self, day: str, name: str = "a.parquet", numbers: range = range(40), **changes: object) -> None:
        write_file(self.log, day, name, rows(day, numbers, self.policy, **changes))
        finish_day(self.log, day)

    def run(
        self, where: str = "", *, settings: ServiceSettings = SETTINGS, root: Path | None = None, now: float = NOW
    ) -> list[Result]:
        registry = Registry(root or self.root, create=True)
        begin_registry(registry, self.model, at=0.0)
        log = LogFolder(where or str(self.log))
        return Cycle(log, registry, world.StubUpdater(), settings, clock=lambda: now, files=Files()).run()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def told(results: list[Result]) -> list[tuple[str, str, list[str]]]:
    return [(one.day, one.decision.value, [each.reason.value for each in one.reasons]) for one in results]


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["logp0"]),
        lambda table: table.replace_schema_metadata({}),
        lambda table: table.replace_schema_metadata({"windlass.feedback": '{"format": 2}'}),
    ],
)
def test_a_day_of_another_schema_is_skipped_and_repaired(place: Place, change: Any) -> None:
    place.day(ONE)
    path = place.log / f"day={ONE}" / "a.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    assert told(place.run()) == [(ONE, "skipped", ["other_schema"])]
    assert place.run() == []
    place.day(ONE)
    assert told(place.run()) == [(ONE, "promoted", ["rewritten_file", "guard_passed"])]


def test_several_known_policies_are_told(place: Place) -> None:
    place.day(ONE)
    place.day(ONE, "b.parquet", range(40, 60), policy_version="trusted")
    (result,) = place.run(settings=SETTINGS.model_copy(update={"policies": ("trusted",)}))
    assert told([result]) == [(ONE, "promoted", ["mixed_policies", "guard_passed"])]
    assert f"40 of {place.policy}, 20 of trusted" in result.reasons[0].found
    assert Registry(place.root).version(2).lineage["policies"] == [
        {"name": place.policy, "version": 1, "rows": 40},
        {"name": "trusted", "version": None, "rows": 20},
    ]


@pytest.mark.parametrize("logp0", [[None], [float("nan")], [float("-inf")], [0.5], []])
def test_propensities_that_are_none(place: Place, logp0: list[Any]) -> None:
    place.day(ONE, logp0=logp0)
    assert told(place.run()) == [(ONE, "skipped", ["too_many_bad_rows"])]


def test_files_that_vanish_undo_nothing(place: Place) -> None:
    place.day(ONE)
    place.day(ONE, "b.parquet", range(40, 60))
    place.run()
    (place.log / f"day={ONE}" / "b.parquet").unlink()
    assert place.run() == []
    place.day(ONE, "c.parquet", range(60, 100))
    assert told(place.run()) == [(ONE, "promoted", ["late_file", "vanished_file", "guard_passed"])]


def test_damaged_responses_skip_the_day_until_they_are_whole(place: Place) -> None:
    place.day(ONE)
    path = write_responses(place.log / f"day={ONE}", "part-0", responses_table([(f"{ONE}-0", 2, 1.0, 0)]))
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    assert told(place.run()) == [(ONE, "skipped", ["damaged_file"])]
    path.write_bytes(whole)
    place.day(ONE, numbers=range(41))
    assert told(place.run()) == [(ONE, "promoted", ["rewritten_file", "guard_passed"])]


def upload(source: Path, name: str) -> str:
    """A copy of a log in fsspec's file system in memory; its URI."""
    system = fsspec.filesystem("memory")
    system.put(str(source), f"/{name}", recursive=True)
    return f"fsspec+memory:///{name}"


def test_a_log_on_any_pyarrow_file_system(place: Place, tmp_path: Path) -> None:
    world.write_log(place.log, place.policy)
    write_responses(place.log / f"day={ONE}", "part-0", responses_table([(f"{ONE}-0", 2, 1.0, 0)]))
    expected = told(place.run())
    assert len(expected) == 6
    assert told(place.run(f"file://{place.log}", root=tmp_path / "by-file")) == expected
    by_memory = place.run(upload(place.log, tmp_path.name), root=tmp_path / "by-memory")
    assert told(by_memory) == expected
    assert (tmp_path / "by-memory" / "current" / world.WEIGHTS).read_bytes() == (
        place.root / "current" / world.WEIGHTS
    ).read_bytes()


def test_a_file_system_without_times(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.day(ONE)
    listing = LogFolder.listing

    def without_times(self: LogFolder, day: str) -> Any:
        found = listing(self, day)
        files = {name: (size, 0) for name, (size, _) in found.files.items()}
        return type(found)(day=day, files=files, success=found.success, promised=found.promised, newest_s=float("inf"))

    monkeypatch.setattr(LogFolder, "listing", without_times)
    place.run()
    place.day(ONE, response=[0.0])
    write_file(place.log, ONE, "a.parquet", rows(ONE, range(100, 140), place.policy))
    assert told(place.run())[0] == (ONE, "promoted", ["rewritten_file", "guard_passed"])
    (place.log / f"day={ONE}" / "_SUCCESS").unlink()
    place.day(TWO)
    (place.log / f"day={TWO}" / "_SUCCESS").unlink()
    settled = SETTINGS.model_copy(update={"complete": CompletenessSettings(settle_s=60)})
    assert told(place.run(settings=settled))[-1] == (TWO, "waiting", ["still_written"])


@pytest.mark.parametrize("refused", ["link", "rename"])
def test_a_registry_where_links_cannot_be_switched(tmp_path: Path, refused: str) -> None:
    class Refusing(Files):
        def before(self, call: str, path: Path) -> None:
            if call == refused:
                raise OSError(errno.EPERM, "Operation not permitted", str(path))

    with pytest.raises(RequestError, match="a file system with symbolic links and rename"):
        Registry(tmp_path / "registry", Refusing(), create=True)
    with pytest.raises(RequestError, match=r"registry\.json"):
        Registry(tmp_path / "registry")
