"""Contract: a job whose learners are lost begins again from its checkpoint, as often as the failure policy allows and
never without one, and every step tells how often that was; nodes that joined the cluster late are checked as well.

The parts of the job are stand-ins. Learners that die for real: test_kill.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import train_command
from tests.small_world import recipe
from trainer.checkpoints import CheckpointStore, Facts
from trainer.jobs import RlJob
from trainer.policy_run import PolicyRun
from trainer.rank_group import LearnerLost


def begun(folder: Path, losses: int) -> tuple[list[int], Any]:
    """How many restarts each begin was told, and the summary; the learners are lost so often."""
    job = RlJob.model_validate(recipe(folder, "rl", cluster={"learner_restarts": 2}))
    told: list[int] = []

    def parts(_: object, __: object, ___: object, restarts: int) -> dict[str, Any]:
        told.append(restarts)
        if len(told) <= losses:
            raise LearnerLost("rank 1 died")
        return {"steps": 7}

    run: Any = SimpleNamespace(path=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_command, "_run_parts", parts)
        try:
            return told, train_command.train_policy_job(job, run, None)  # type: ignore[arg-type]
        except LearnerLost as error:
            return told, error


def test_lost_learners_begin_again_and_are_counted(tmp_path: Path) -> None:
    told, ended = begun(tmp_path, losses=1)
    assert (told, str(ended)) == ([0], "rank 1 died"), "there is no checkpoint"
    store = CheckpointStore(tmp_path / "checkpoints", RlJob.model_validate(recipe(tmp_path, "rl")).checkpoints)
    with store.writing(3, Facts(catalogue_digest="a", vocabulary_size=1), metric=None, score=None) as folder:
        (folder / "state").write_text("weights")
    assert begun(tmp_path, losses=2) == ([0, 1, 2], {"steps": 7})
    told, ended = begun(tmp_path, losses=9)
    assert (told, str(ended)) == ([0, 1, 2], "rank 1 died")


@pytest.mark.parametrize(
    ("sections", "with_fleet"), [({}, True), ({"train_only": "dump"}, False), ({"rollout_only": "dump"}, None)]
)
def test_nodes_that_came_late_are_checked(
    sections: dict[str, Any], with_fleet: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First those that the job asks for are waited for; a cluster of one's own has no others."""
    done: list[Any] = []
    monkeypatch.setattr(train_command, "check_cluster", lambda _, *, with_fleet: done.append(with_fleet))
    monkeypatch.setattr(train_command, "check_nodes", lambda folders: done.append(folders))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run: Any = SimpleNamespace(path=tmp_path)
    for address in (None, "auto"):
        content = recipe(tmp_path, "rl", cluster={"address": address}, **sections)
        train_command.check_newcomers(RlJob.model_validate(content), run)
    assert done == [*([] if with_fleet is None else [with_fleet]), [tmp_path]]


def test_every_step_tells_how_often_learners_began_again() -> None:
    lines: list[dict[str, float]] = []
    parts: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(PolicyRun))
    parts |= {
        "run_log": SimpleNamespace(write=lambda _, metrics: lines.append(metrics)),
        "gauges": SimpleNamespace(record=lambda *_: None),
        "status": SimpleNamespace(write=lambda **_: None),
        "versions": [],
        "learner_restarts": 2,
    }
    PolicyRun(**parts).log(4, {"loss": 1.0})
    assert lines == [{"loss": 1.0, "system/learner_restarts": 2.0}]
