"""Contract: responses that came before a day was read count; those that come after its requests were used are trained
on again as positives, once, with the old propensity, whether they come as files of responses or in rewritten rows; the
row without a response gives way where both would be in one update. Rows of earlier updates join by a seeded draw that
leaves corrected ones out. What the counts say is what was done, and dying changes nothing of it.

With the real journal, registry, guard and row reading; the updater writes requests and responses to a file.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

import pytest

from data.feedback_reading import read_feedback
from data.responses import responses_table, write_responses
from launch.continual.files import Files
from launch.continual.reasons import Decision
from launch.continual.registry import Registry
from launch.continual.results import Result
from launch.continual.settings import CorrectionRule, RejectRule, ReplaySettings, ServiceSettings
from launch.continual.updating import Update
from tests.launch.continual import world
from tests.launch.continual.dying_files import DyingFiles, Killed
from tests.launch.continual.world import CHECKS, NOW, SETTINGS, WEIGHTS, days, rows

ONE, TWO, THREE = days(3)
EVERY = SETTINGS.model_copy(update={"late_responses_every_s": 0.0})
SILENT = range(0, 40, 2)
"""Requests of a day that have no response in their own rows."""


class Recording(world.StubUpdater):
    """Writes a line of `request=response` per update."""

    logp0: ClassVar[dict[str, float]] = {}
    """Log-propensity of every request in the newest update that had it."""

    def update(self, task: Update) -> Path:
        log = read_feedback(task.feedback, CHECKS)
        assert not any(log.counts.values()), log.counts
        anchors = log.anchors()
        names = zip(log.table["request_id"].to_pylist(), anchors.response_N.tolist(), strict=True)
        self.logp0.update(zip(log.table["request_id"].to_pylist(), anchors.logp0_N.tolist(), strict=True))
        model = super().update(task)
        line = " ".join(sorted(f"{name}={response:g}" for name, response in names))
        (model / WEIGHTS).write_text((task.parent / WEIGHTS).read_text() + line + "\n")
        return model

    def measure(self, candidate: Path, parent: Path, held_out: Path, trained: Path, wanted: Any) -> Any:
        return super().measure(parent, parent, held_out, trained, wanted)


class Place:
    """A log, a registry and the first model."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.log.mkdir(parents=True)
        self.root = folder / "registry"
        self.policy = world.first_name(folder / "first")
        self.model = folder / "first" / "model"

    def day(self, day: str, numbers: range = range(40), **changes: object) -> None:
        world.write_file(self.log, day, "a.parquet", rows(day, numbers, self.policy, **changes))
        world.finish_day(self.log, day)

    def respond(self, day: str, name: str, *numbers: int, item: int = 2, response: float = 1.0) -> None:
        told = [(f"{day}-{number}", item, response, 0) for number in numbers]
        write_responses(self.log / f"day={day}", name, responses_table(told))

    def run(
        self,
        settings: ServiceSettings = EVERY,
        *,
        now: float = NOW,
        files: Files | None = None,
        root: Path | None = None,
    ) -> list[Result]:
        return world.cycle(self.log, root or self.root, self.model, settings=settings, now=now, files=files).run()

    def updates(self, root: Path | None = None) -> list[dict[str, str]]:
        """Response by request of every update behind the served model."""
        lines = ((root or self.root) / "current" / WEIGHTS).read_text().splitlines()[1:]
        return [dict(word.split("=") for word in line.split()) for line in lines]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(world, "StubUpdater", Recording)
    return Place(tmp_path)


def told(results: list[Result]) -> list[tuple[str, str, list[str]]]:
    return [(one.day, one.decision.value, [each.reason.value for each in one.reasons]) for one in results]


def test_responses_that_are_there_when_the_day_is_read_count(place: Place) -> None:
    place.day(ONE)
    place.respond(ONE, "part-0", 0, 2, 4)
    place.respond(ONE, "part-1", 2, 1000)
    place.respond(ONE, "part-2", 6, item=5)
    (result,) = place.run()
    (update,) = place.updates()
    assert [update[f"{ONE}-{number}"] for number in (0, 1, 2, 3, 4, 6, 8)] == ["1", "1", "1", "1", "1", "0", "0"]
    counts = {name: result.counts[name] for name in ("responses", "response_without_request", "item_not_shown")}
    assert counts == {"responses": 5, "response_without_request": 1, "item_not_shown": 1}
    assert place.run() == []


def test_a_late_response_is_trained_on_once_as_a_positive(place: Place) -> None:
    place.day(ONE, logp0=[-1.5])
    place.run()
    place.respond(ONE, "part-0", 0, 1, 4, 1000)
    (late,) = place.run()
    assert told([late]) == [(ONE, "skipped", ["late_responses"])]
    assert late.counts == {"corrected": 2, "responses": 3, "response_without_request": 1}
    # Again, from a client that tried twice, and a first time.
    place.respond(ONE, "part-1", 0, 6)
    (again,) = place.run()
    assert again.counts == {"corrected": 1, "responses": 5, "response_without_request": 1}
    place.day(TWO)
    assert [one.decision for one in place.run()] == [Decision.PROMOTED]
    first, second = place.updates()
    assert [first[f"{ONE}-{number}"] for number in (0, 4, 6)] == ["0", "0", "0"]
    earlier = {name: response for name, response in second.items() if name.startswith(ONE)}
    held_out = {f"{ONE}-{number}": str(number % 2) for number in range(36, 40)}
    assert earlier == {f"{ONE}-0": "1", f"{ONE}-4": "1", f"{ONE}-6": "1"} | held_out
    assert {round(value, 3) for name, value in Recording.logp0.items() if name.startswith(ONE)} == {-1.5}
    place.day(THREE)
    place.run()
    assert not {f"{ONE}-0", f"{ONE}-4", f"{ONE}-6"} & place.updates()[2].keys()


def test_a_row_that_waits_gives_way_to_its_correction(place: Place) -> None:
    place.day(ONE)
    place.run()
    place.respond(ONE, "part-0", 36, 38)
    (late,) = place.run()
    assert late.counts["corrected"] == 2
    place.day(TWO)
    place.run()
    second = place.updates()[1]
    assert [second[f"{ONE}-{number}"] for number in range(36, 40)] == ["1", "1", "1", "1"]


def test_rewritten_rows_with_a_response_correct_as_well(place: Place) -> None:
    place.day(ONE)
    place.run()
    place.day(ONE, range(60), response=[1.0])
    (result,) = place.run()
    assert told([result]) == [(ONE, "promoted", ["rewritten_file", "late_responses", "guard_passed"])]
    assert result.counts["corrected"] == len(SILENT)
    second = place.updates()[1]
    assert {name for name in second if int(name.rpartition("-")[2]) < 36} == {
        f"{ONE}-{number}" for number in SILENT if number < 36
    }
    assert set(second.values()) == {"1"}


def test_corrections_outlive_a_rejection(place: Place) -> None:
    place.day(ONE)
    place.run()
    place.respond(ONE, "part-0", 0)
    place.run()
    place.day(TWO, response=[0.0])
    assert [one.decision for one in place.run()] == [Decision.REJECTED]
    place.day(THREE)
    place.run(EVERY.model_copy(update={"on_reject": RejectRule.ACCUMULATE}))
    assert place.updates()[1][f"{ONE}-0"] == "1"


def test_late_responses_can_be_recorded_only_and_are_looked_at_from_time_to_time(place: Place) -> None:
    place.day(ONE)
    place.run()
    place.respond(ONE, "part-0", 0)
    assert place.run(SETTINGS, now=NOW + 86_399) == []
    record = SETTINGS.model_copy(update={"late_responses": CorrectionRule.RECORD})
    (late,) = place.run(record, now=NOW + 86_401)
    assert late.counts["corrected"] == 1
    place.day(TWO)
    place.run(record)
    assert f"{ONE}-0" not in place.updates()[1]


def test_rows_that_waited_for_more_are_not_used_again(place: Place) -> None:
    place.day(ONE, range(20))
    place.day(TWO)
    place.run()
    world.write_file(place.log, ONE, "late.parquet", rows(ONE, range(60), place.policy))
    (result,) = place.run()
    assert result.counts["request_of_earlier_pass"] == 20
    assert not {f"{ONE}-{number}" for number in range(20)} & place.updates()[1].keys()


def test_rows_of_earlier_updates_join_by_a_draw(place: Place) -> None:
    replay = EVERY.model_copy(update={"replay": ReplaySettings(share=0.5, days=1)})
    for day in (ONE, TWO, THREE):
        place.day(day)
    results = place.run(replay)
    assert "replayed" not in results[0].counts
    first, second, third = place.updates()
    drawn = [name for name in second if name in first]
    assert len(drawn) == results[1].counts["replayed"] > 4
    assert all(second[name] == first[name] for name in drawn)
    # A day before, no further.
    assert not {name for name in third if name.startswith(ONE)}
    assert results[2].counts["replayed"] == len([name for name in third if name in second and name.startswith(TWO)])
    again = place.root.with_name("again")
    place.run(replay, root=again)
    assert place.updates(again) == place.updates()


def test_corrected_rows_are_not_replayed(place: Place) -> None:
    replay = EVERY.model_copy(update={"replay": ReplaySettings(share=10.0, days=9)})
    place.day(ONE)
    place.run(replay)
    place.respond(ONE, "part-0", 0, 2)
    place.run(replay)
    place.day(TWO)
    place.run(replay)
    place.day(THREE)
    place.run(replay)
    _, second, third = place.updates()
    assert (second[f"{ONE}-0"], second[f"{ONE}-1"], second[f"{ONE}-4"]) == ("1", "1", "0")
    assert f"{ONE}-0" not in third
    assert third[f"{ONE}-4"] == "0"


def test_dying_at_some_changes(place: Place, tmp_path: Path) -> None:
    place.day(ONE)

    def whole(root: Path, files: Files | None = None) -> None:
        place.run(EVERY.model_copy(update={"replay": ReplaySettings(share=0.5)}), root=root, files=files)

    for name in ("expected", "counted", *map(str, range(12))):
        whole(tmp_path / "runs" / name)
    place.respond(ONE, "part-0", 0, 36)
    place.day(TWO)
    whole(tmp_path / "runs" / "expected")
    expected = world.content(tmp_path / "runs" / "expected")
    counting = DyingFiles()
    whole(tmp_path / "runs" / "counted", counting)
    drawn = random.Random(3)
    for number in range(12):
        root = tmp_path / "runs" / str(number)
        with pytest.raises(Killed):
            whole(root, DyingFiles(drawn.randrange(len(counting.calls)), torn=bool(number % 2)))
        whole(root)
        assert world.content(root) == expected
    assert Registry(tmp_path / "runs" / "expected").current() is not None
