"""Contract: metrics.jsonl has one JSON object per step, is cut back on resume, and equals the log of an undisturbed
run; TensorBoard gets the same numbers; trackers continue under their id; progress is plain off a terminal.

Not checked here: the real wandb and MLflow, which are extras; a stand-in records their calls.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from data.errors import RequestError
from trainer.run_log import RunLog, read_metrics, reproducible
from trainer.run_settings import TrackingSettings

QUIET = TrackingSettings()


def log_steps(run: Path, steps: range, resumed: int | None = None, seconds: float = 1.0) -> str:
    """Write some steps; returns what progress said."""
    said = io.StringIO()
    with RunLog(run, QUIET, resumed_step=resumed, total_steps=9, stream=said) as log:
        for step in steps:
            log.write(step, {"loss": 1 / (step + 3), "time/step": seconds, "valid": step % 2 == 0})
    return said.getvalue()


def test_one_object_per_step_with_plain_progress(tmp_path: Path) -> None:
    said = log_steps(tmp_path, range(1, 3))
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.25, "time/step": 1.0, "valid": False},
        {"step": 2, "loss": 0.2, "time/step": 1.0, "valid": True},
    ]
    assert said == "step 1/9 loss 0.25\nstep 2/9 loss 0.2\n"


def test_a_resumed_log_equals_an_undisturbed_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    log_steps(whole, range(1, 8))
    log_steps(broken, range(1, 6), seconds=9.0)
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    log_steps(broken, range(4, 8), resumed=3, seconds=9.0)
    a, b = (read_metrics(run / "metrics.jsonl") for run in (whole, broken))
    assert [reproducible(step) for step in a] == [reproducible(step) for step in b]
    assert [step["step"] for step in b] == list(range(1, 8))
    assert a != b


def test_a_start_without_a_checkpoint_starts_the_log_again(tmp_path: Path) -> None:
    log_steps(tmp_path, range(1, 4))
    log_steps(tmp_path, range(1, 2))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_values_that_are_not_finite_are_null_and_named(tmp_path: Path) -> None:
    with RunLog(tmp_path, QUIET, stream=io.StringIO()) as log:
        log.write(1, {"loss": float("nan"), "norm": float("inf"), "lr": 0.1})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "loss": None, "norm": None, "lr": 0.1, "nonfinite": ["loss", "norm"]}


def test_a_step_is_written_once(tmp_path: Path) -> None:
    with RunLog(tmp_path, QUIET, stream=io.StringIO()) as log:
        log.write(2, {})
        with pytest.raises(ValueError, match="written once"):
            log.write(2, {})


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(RequestError, match=r"metrics\.jsonl:2: is not JSON"):
        read_metrics(path)


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_steps(tmp_path, range(1, 6))
    log_steps(tmp_path, range(4, 6), resumed=3, seconds=2.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("time/step")] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    screen = _Terminal()
    with RunLog(tmp_path, QUIET, total_steps=4, stream=screen) as log:
        log.write(1, {"loss": 0.5})
        log.say("pushed version 1")
    assert "1/4" in screen.getvalue()
    assert "loss=0.5" in screen.getvalue()
    assert "pushed version 1" in screen.getvalue()


def _stand_in(calls: list[Any]) -> ModuleType:
    module: Any = ModuleType("tracker")
    run = SimpleNamespace(
        log=lambda metrics, step: calls.append((step, metrics)),
        finish=lambda: calls.append("finish"),
        info=SimpleNamespace(run_id="r1"),
    )
    module.init = lambda **arguments: calls.append(arguments["id"]) or run
    module.set_experiment = lambda name: calls.append(name)
    module.start_run = lambda run_id, run_name: calls.append((run_id, run_name)) or run
    module.log_metrics = lambda metrics, step: calls.append((step, metrics))
    module.log_dict = lambda content, name: calls.append(name)
    module.end_run = lambda: calls.append("end")
    return module  # type: ignore[no-any-return]


def test_trackers_get_finite_numbers_and_keep_their_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb: list[Any] = []
    mlflow: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", _stand_in(wandb))
    monkeypatch.setitem(sys.modules, "mlflow", _stand_in(mlflow))
    both = TrackingSettings(wandb=True, mlflow=True, project="p")
    for resumed in (None, 1):
        with RunLog(tmp_path, both, resumed_step=resumed, stream=io.StringIO()) as log:
            log.write((resumed or 0) + 1, {"ndcg@10": 0.5, "loss": float("nan")})
    assert wandb[0] == wandb[3]
    assert wandb[1] == (1, {"ndcg@10": 0.5})
    assert wandb[2] == "finish"
    assert mlflow == [
        "p",
        (None, tmp_path.name),
        "config.json",
        (1, {"ndcg_at_10": 0.5}),
        "end",
        "p",
        ("r1", None),
        (2, {"ndcg_at_10": 0.5}),
        "end",
    ]


def test_a_missing_tracker_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RequestError, match=r"tracking.wandb: true, but wandb is not installed; legal: false, or pip"):
        RunLog(tmp_path, TrackingSettings(wandb=True))
