"""Contract: whenever the service dies, the next start ends with the registry, weights, journal and rows of a run that
nothing disturbed, and `current` points at a whole model at every instant.

It dies at every change of the disk that registry, journal and cycle make (with and without a torn file), once and twice
in a row, at a disk that is full for a while, and, as a process of its own, by SIGKILL at random times. The updater
writes a file; journal, registry, guard, row reading and lock are the real ones. A seeded sample runs by default, all of
it is long. Not checked: the real fleet.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data.errors import RunError
from launch.continual.files import Files
from launch.continual.registry import Registry
from launch.provenance import ROOT
from tests.launch.continual import world
from tests.launch.continual.dying_files import DyingFiles, Killed

SAMPLE = 12
RANDOM_KILLS = 60


class Place:
    """One log for all runs, and what the undisturbed run leaves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        world.write_log(self.log, world.first_name(folder / "first"))
        self.model = folder / "first" / "model"
        counting = DyingFiles()
        self.run("undisturbed", counting)
        self.calls = len(counting.calls)
        self.expected = self.left("undisturbed")

    def run(self, name: str, files: Files) -> None:
        world.cycle(self.log, self.folder / name, self.model, files=files).run()

    def left(self, name: str) -> dict[str, Any]:
        return world.content(self.folder / name)

    def served_is_whole(self, name: str) -> None:
        """What a reader that follows `current` finds, if there is a version yet."""
        link = self.folder / name / "current"
        if link.is_symlink():
            Registry(self.folder / name).verify(int(link.resolve().name))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("dying"))


def die_and_go_on(place: Place, name: str, at: int, *, torn: bool, again: int | None = None) -> None:
    """Die at change `at`, perhaps at change `again` of the next start as well; then run to the end."""
    with pytest.raises(Killed):
        place.run(name, DyingFiles(at, torn=torn))
    place.served_is_whole(name)
    if again is not None:
        try:
            place.run(name, DyingFiles(again, torn=torn))
        except Killed:
            place.served_is_whole(name)
    place.run(name, Files())
    assert place.left(name) == place.expected


def test_the_undisturbed_run_changes_the_disk_often(place: Place) -> None:
    assert place.calls > 150
    place.run("undisturbed", Files())
    assert place.left("undisturbed") == place.expected


def test_dying_at_some_changes(place: Place) -> None:
    drawn = random.Random(6)
    for number, at in enumerate(drawn.sample(range(place.calls), SAMPLE)):
        torn = bool(number % 2)
        die_and_go_on(place, f"sample-{at}", at, torn=torn, again=drawn.randrange(40) if number % 3 == 0 else None)


@pytest.mark.long
@pytest.mark.parametrize("torn", [False, True])
def test_dying_at_every_change(place: Place, torn: bool) -> None:
    drawn = random.Random(7)
    for at in range(place.calls):
        die_and_go_on(place, f"every-{torn}-{at}", at, torn=torn, again=drawn.randrange(60) if at % 2 else None)


class FullDisk(Files):
    """Refuses one change, as a full disk would; later ones go through."""

    def __init__(self, at: int) -> None:
        self.left = at

    def before(self, call: str, path: Path) -> None:
        self.left -= 1
        if self.left == -1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_disk_that_is_full_for_a_while(place: Place) -> None:
    for at in random.Random(9).sample(range(place.calls), SAMPLE // 2):
        name = f"full-{at}"
        with pytest.raises((OSError, RunError), match="No space left"):
            place.run(name, FullDisk(at))
        place.served_is_whole(name)
        place.run(name, Files())
        assert place.left(name) == place.expected


CHILD = """
import sys
from pathlib import Path
from launch.continual.lock import writing
from tests.launch.continual import world
log, root, model = map(Path, sys.argv[1:])
print("ready", flush=True)
sys.stdin.readline()
with writing(root):
    world.cycle(log, root, model).run()
"""


def start(place: Place, name: str) -> subprocess.Popen[str]:
    """A service as a process of its own, that begins at a word."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(place.log), str(place.folder / name), str(place.model)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def kill_and_go_on(place: Place, name: str, after_s: float) -> bool:
    """SIGKILL after some time, then run to the end; whether the kill came before the end."""
    process = start(place, name)
    begin(process)
    time.sleep(after_s)
    died = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    place.served_is_whole(name)
    place.run(name, Files())
    left = place.left(name)
    left.pop(".lock", None)
    assert left == place.expected
    return died


def span(place: Place) -> float:
    """How long the service takes as a process."""
    process = start(place, "timed")
    begun = time.monotonic()
    begin(process)
    process.communicate()
    return time.monotonic() - begun


def test_a_kill_at_a_random_time(place: Place) -> None:
    kill_and_go_on(place, "killed", span(place) * 0.5)


@pytest.mark.long
def test_kills_at_random_times(place: Place) -> None:
    seconds, drawn = span(place), random.Random(8)
    died = [kill_and_go_on(place, f"killed-{number}", drawn.uniform(0, seconds)) for number in range(RANDOM_KILLS)]
    assert any(died)
