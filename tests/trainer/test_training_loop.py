"""The frame around the steps: where a run begins, when it evaluates, what it writes and keeps.

Uses a loop whose steps do nothing, the real log of a run and a clock of the test. Does not check what a step computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.small_world import recipe
from trainer.evaluation import Evaluation
from trainer.jobs import SftJob
from trainer.phases import PhaseTimer
from trainer.run_log import METRICS, RunLog, read_metrics
from trainer.run_settings import TrackingSettings
from trainer.run_state import RunState
from trainer.training_loop import Metrics, TrainingLoop


class Killed(Exception):
    """A fake of SIGKILL."""


@dataclasses.dataclass
class Host:
    """A fake of the processes: it writes the real log, and keeps states instead of checkpoints."""

    log_file: RunLog
    saved: dict[int, RunState] = dataclasses.field(default_factory=dict)
    pushed: list[int] = dataclasses.field(default_factory=list)
    evaluated: list[int] = dataclasses.field(default_factory=list)

    def push(self, version: int) -> Metrics:
        self.pushed.append(version)
        return {}

    def rest_engines(self) -> Metrics:
        return {}

    def evaluate(self, step: int) -> Evaluation | None:
        self.evaluated.append(step)
        values = {"ndcg@10": 0.5 - 0.1 * step}
        fake = SimpleNamespace(items=SimpleNamespace(values=values), metrics=lambda: dict(values))
        return cast(Evaluation, fake)

    def save(self, state: RunState, keep: Callable[[Path], None]) -> None:
        self.saved[state.step] = state

    def log(self, step: int, metrics: Metrics) -> None:
        self.log_file.write(step, metrics)

    def interrupted(self) -> bool:
        return False


@dataclasses.dataclass(kw_only=True)
class Steps(TrainingLoop):
    """Steps that take ten seconds of the test's clock and do nothing."""

    clock: list[float]
    dies_in: int = -1
    pushes_every_step = True

    def step(self) -> Metrics:
        if self.state.step + 1 == self.dies_in:
            raise Killed
        self.clock[0] += 10.0
        self.state = dataclasses.replace(self.state, step=self.state.step + 1)
        return {"loss": 1.0 / self.state.step}

    def epochs(self) -> float:
        return float(self.state.step)

    def keep(self, folder: Path) -> None:
        pass

    def close(self) -> None:
        pass


def steps(host: Host, *, state: RunState | None = None, dies_in: int = -1, **sections: Any) -> Steps:
    content = recipe(Path("no-dataset"), "sft", checkpoints={"interval": 100}, **sections)
    clock = [0.0]
    return Steps(
        settings=SftJob.model_validate(content),
        host=host,
        state=state or RunState(),
        resumed=state is not None,
        timer=PhaseTimer(lambda: clock[0]),
        clock=clock,
        dies_in=dies_in,
    )


def test_a_run_that_died_before_its_second_checkpoint_continues_from_step_0(tmp_path: Path) -> None:
    stopping = {"patience": 2}
    with RunLog(tmp_path, TrackingSettings()) as log:
        first = Host(log)
        with pytest.raises(Killed):
            steps(first, dies_in=3, early_stopping=stopping).run()
    assert sorted(first.saved) == [0]
    with RunLog(tmp_path, TrackingSettings(), resumed_step=0) as log:
        again = Host(log)
        loop = steps(again, state=first.saved[0], early_stopping=stopping)
        assert loop.run() == "max_steps"
    assert [step["step"] for step in read_metrics(tmp_path / METRICS)] == [0, 1, 2, 3]
    assert again.evaluated == [3], "the initial model was evaluated before"
    assert loop.state.evaluations_without_rise == 1
    assert again.pushed == [0]


def test_the_last_step_of_a_run_that_is_limited_by_time_is_evaluated(tmp_path: Path) -> None:
    with RunLog(tmp_path, TrackingSettings()) as log:
        host = Host(log)
        loop = steps(host, limits={"max_steps": None, "max_hours": 25 / 3600})
        assert loop.run() == "max_hours"
    assert loop.state.step == 3
    assert host.evaluated == [0, 3]
    assert [step["time/step"] for step in read_metrics(tmp_path / METRICS)] == [0.0, 10.0, 10.0, 10.0]
