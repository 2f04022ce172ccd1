"""The cycle: what becomes of each kind of partition, what is trained on, and that rules are followed.

With the real journal, registry, guard and row reading, and an updater that writes a file. Not checked here: dying
(test_dying.py), a real update.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launch.continual.files import Files
from launch.continual.journal import Journal, PassState
from launch.continual.log_folder import CompletenessSettings
from launch.continual.reasons import Decision, Reason
from launch.continual.registry import Registry
from launch.continual.results import Result
from launch.continual.settings import GapRule, LateRule, RejectRule, ServiceSettings
from launch.continual.updating import Interrupted, Update
from tests.launch.continual import world
from tests.launch.continual.dying_files import Killed
from tests.launch.continual.world import NOW, SETTINGS, WEIGHTS, cycle, days, finish_day, rows, write_file, write_log


class Place:
    """A log, a registry and the first model."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.root = folder / "registry"
        self.policy = world.first_name(folder / "first")
        self.model = folder / "first" / "model"
        self.log.mkdir(parents=True)

    def run(self, settings: ServiceSettings = SETTINGS, *, now: float = NOW, first_day: str = "") -> list[Result]:
        return cycle(self.log, self.root, self.model, settings=settings, now=now).run(first_day)

    def weights(self) -> list[set[str]]:
        """The request ids of every update behind the served model."""
        return [set(line.split()) for line in (self.root / "current" / WEIGHTS).read_text().splitlines()]

    def day(self, day: str, numbers: range = range(40), **changes: object) -> None:
        write_file(self.log, day, "a.parquet", rows(day, numbers, self.policy, **changes))
        finish_day(self.log, day)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def told(results: list[Result]) -> list[tuple[str, str, list[str]]]:
    return [(one.day[-2:], one.decision.value, [each.reason.value for each in one.reasons]) for one in results]


def ids(day: str, *numbers: range) -> set[str]:
    return {f"{day}-{number}" for some in numbers for number in some}


def test_a_log_with_everything(place: Place) -> None:
    write_log(place.log, place.policy)
    results = place.run()
    assert told(results) == [
        ("01", "promoted", ["guard_passed"]),
        ("01", "promoted", ["late_file", "guard_passed"]),
        ("02", "rejected", ["guard"]),
        ("03", "promoted", ["guard_passed"]),
        ("04", "skipped", ["empty"]),
        ("06", "promoted", ["missing_day", "guard_passed"]),
    ]
    assert [one.version for one in results] == [2, 3, 4, 5, None, 6]
    one, _, three, _, _, six = days(6)
    # Held out are the last tenth, which the next update trains on; request ids that were seen count once.
    assert place.weights() == [
        {"first"},
        ids(one, range(36)),
        ids(one, range(36, 58)),
        ids(one, range(58, 60)) | ids(three, range(54)),
        ids(three, range(54, 59)) | ids(six, range(36)),
    ]
    assert results[1].counts == {
        "rows": 30,
        "train": 18,
        "held_out": 2,
        "duplicate_request": 10,
        "request_of_earlier_pass": 10,
    }
    assert results[3].counts["duplicate_request"] == 3
    assert results[3].counts["request_of_earlier_pass"] == 2
    assert place.run() == []
    lineage = Registry(place.root).version(4).lineage
    assert lineage["decision"] == "rejected"
    assert lineage["metrics"]["guard"][0]["outcome"] == "loss"


def test_rows_of_a_rejected_update_can_be_accumulated(place: Place) -> None:
    one, two, three = days(3)
    place.day(one)
    place.day(two, response=[0.0])
    place.day(three)
    results = place.run(SETTINGS.model_copy(update={"on_reject": RejectRule.ACCUMULATE}))
    assert [one.decision for one in results] == [Decision.PROMOTED, Decision.REJECTED, Decision.PROMOTED]
    assert place.weights()[2] == ids(one, range(36, 40)) | ids(two, range(40)) | ids(three, range(36))


def test_what_a_rejected_update_had_from_before_is_not_lost(place: Place) -> None:
    one, two, three = days(3)
    place.day(one)
    place.day(two, response=[0.0])
    place.day(three)
    place.run()
    assert place.weights()[2] == ids(one, range(36, 40)) | ids(three, range(36))


def test_few_rows_wait_for_more(place: Place) -> None:
    one, two = days(2)
    place.day(one, range(20))
    place.day(two)
    assert told(place.run()) == [("01", "skipped", ["too_few_rows"]), ("02", "promoted", ["guard_passed"])]
    assert place.weights()[1] == ids(one, range(20)) | ids(two, range(36))


def test_late_and_rewritten_files_can_be_quarantined(place: Place) -> None:
    one, two = days(2)
    quarantine = SETTINGS.model_copy(update={"late": LateRule.QUARANTINE})
    place.day(two)
    place.run(quarantine)
    place.day(one)
    place.day(two, range(50))
    write_file(place.log, two, "b.parquet", rows(two, range(50, 60), place.policy))
    assert told(place.run(quarantine)) == [
        ("01", "skipped", ["late_day"]),
        ("02", "skipped", ["late_file", "rewritten_file"]),
    ]
    assert place.run(quarantine) == []
    assert place.weights() == [{"first"}, ids(two, range(36))]


def test_a_rewritten_file_gives_its_new_requests(place: Place) -> None:
    (one,) = days(1)
    place.day(one)
    place.run()
    place.day(one, range(60))
    (result,) = place.run()
    assert [each.reason for each in result.reasons] == [Reason.REWRITTEN_FILE, Reason.GUARD_PASSED]
    assert place.weights()[2] == ids(one, range(36, 58))


def test_a_repaired_day_is_not_late(place: Place) -> None:
    (one,) = days(1)
    place.day(one, logp0=[0.5])
    quarantine = SETTINGS.model_copy(update={"late": LateRule.QUARANTINE})
    assert told(place.run(quarantine)) == [("01", "skipped", ["too_many_bad_rows"])]
    place.day(one)
    assert told(place.run(quarantine)) == [("01", "promoted", ["rewritten_file", "guard_passed"])]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"policy_version": "000007-0123456789abcdef"}, "too_many_bad_rows"),
        ({"timestamp": 0}, "too_many_bad_rows"),
        ({"logp0": [-9.0]}, "propensities_do_not_fit"),
    ],
)
def test_partitions_that_are_not_used(place: Place, change: dict[str, object], reason: str) -> None:
    place.day(days(1)[0], **change)
    assert told(place.run()) == [("01", "skipped", [reason])]
    assert (place.root / "current").readlink().name == "000001"


def test_damaged_files_and_other_schemas(place: Place) -> None:
    one, two = days(2)
    place.day(one)
    (place.log / f"day={one}" / "a.parquet").write_bytes(b"PAR1 and then nothing")
    place.day(two)
    finish_day(place.log, two, {"a.parquet": 41})
    results = place.run()
    assert told(results) == [("01", "skipped", ["damaged_file"]), ("02", "skipped", ["damaged_file"])]
    assert "41" in results[1].reasons[0].found


def test_days_that_wait(place: Place) -> None:
    one, two, three = days(3)
    write_file(place.log, one, "a.parquet", rows(one, range(40), place.policy))
    place.day(two)
    finish_day(place.log, two, {"a.parquet": 40, "b.parquet": 1})
    place.day(three)
    now = world.day_start(three) + 90_000.0
    assert told(place.run(now=now)) == [
        ("01", "waiting", ["still_written"]),
        ("02", "waiting", ["files_missing"]),
        ("03", "waiting", ["response_window_open"]),
    ]
    assert told(place.run(now=now - 10_000))[2] == ("03", "waiting", ["day_not_over"])
    wait = SETTINGS.model_copy(update={"gaps": GapRule.WAIT})
    assert told(place.run(wait))[2] == ("03", "waiting", ["earlier_day_waits"])
    settled = SETTINGS.model_copy(update={"complete": CompletenessSettings(settle_s=60)})
    changed = (place.log / f"day={one}" / "a.parquet").stat().st_mtime
    assert told(place.run(settled, now=changed + 30))[0][2] == ["still_written"]
    assert told(place.run(settled, now=changed + 90))[0] == ("01", "promoted", ["late_day", "guard_passed"])


def test_a_dry_run_changes_nothing(place: Place) -> None:
    write_log(place.log, place.policy)
    service = cycle(place.log, place.root, place.model)
    before = world.content(place.root)
    planned = told(service.plan())
    assert planned[0] == ("01", "waiting", ["would_run"])
    assert world.content(place.root) == before


def test_the_day_to_begin_with(place: Place) -> None:
    one, two = days(2)
    place.day(one)
    place.day(two)
    assert told(place.run(first_day=two)) == [("02", "promoted", ["guard_passed"])]


def test_a_switch_by_hand_is_followed(place: Place) -> None:
    one, two = days(2)
    place.day(one)
    place.run()
    Registry(place.root).rollback(at=NOW, why="by hand")
    place.day(two)
    (result,) = place.run()
    assert result.version == 3
    assert Journal(place.root / "continual" / "journal", Files()).passes()[-1].parent == 1
    assert place.weights()[1] == ids(one, range(36, 40)) | ids(two, range(36))


class Stopping(world.StubUpdater):
    """Is asked to stop in the midst of its first update."""

    def __init__(self) -> None:
        self.stopped = False

    def update(self, task: Update) -> Path:
        if not self.stopped:
            self.stopped = True
            raise Interrupted
        return super().update(task)


def test_an_interrupted_update_is_taken_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = days(2)
    place.day(one)
    place.day(two)
    updater = Stopping()
    monkeypatch.setattr(world, "StubUpdater", lambda: updater)
    assert told(place.run()) == [("01", "waiting", ["interrupted"])]
    assert (place.root / "current").readlink().name == "000001"
    assert [one.decision for one in place.run()] == [Decision.PROMOTED, Decision.PROMOTED]


def test_files_that_change_during_an_update_begin_it_anew(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = days(1)
    place.day(one)
    updater = Stopping()
    monkeypatch.setattr(world, "StubUpdater", lambda: updater)
    place.run()
    place.day(one, range(100, 140))
    assert [one.decision for one in place.run()] == [Decision.PROMOTED]
    assert place.weights()[1] == ids(one, range(100, 136))


def test_a_switch_during_an_update_begins_it_anew(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = days(2)
    place.day(one)
    place.run()
    updater = Stopping()
    monkeypatch.setattr(world, "StubUpdater", lambda: updater)
    place.day(two)
    place.run()
    Registry(place.root).rollback(at=NOW, why="by hand")
    assert [one.decision for one in place.run()] == [Decision.PROMOTED]
    assert Registry(place.root).version(3).lineage["parent"] == 1


class DiesBeforeVersions(Files):
    """Dies when a version is to appear."""

    def before(self, call: str, path: Path) -> None:
        if call == "rename" and path.parent.name == "versions" and path.name != "000001":
            raise Killed


@pytest.mark.parametrize("what", ["switch", "lost model", "nothing"])
def test_a_decision_is_followed_only_while_it_holds(place: Place, what: str) -> None:
    one, two = days(2)
    place.day(one)
    place.run()
    place.day(two)
    with pytest.raises(Killed):
        cycle(place.log, place.root, place.model, files=DiesBeforeVersions()).run()
    journal = Journal(place.root / "continual" / "journal", Files())
    assert journal.passes()[-1].state is PassState.DECIDED
    if what == "switch":
        Registry(place.root).rollback(at=NOW, why="by hand")
    if what == "lost model":
        shutil.rmtree(place.root / "continual" / "work")
    assert [one.decision for one in place.run()] == [Decision.PROMOTED]
    version = Registry(place.root).version(3)
    assert version.lineage["parent"] == (1 if what == "switch" else 2)
    assert len(place.weights()) == (2 if what == "switch" else 3)
