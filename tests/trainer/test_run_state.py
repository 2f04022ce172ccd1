"""Run state: what is saved comes back, selection keeps the first best step, limits end a run.

Does not check what the loop does with it: tests/trainer/test_loop.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from data.errors import RequestError
from trainer.run_settings import EarlyStoppingSettings, LimitSettings
from trainer.run_state import FILE, RunState, limit_met


def test_round_trip(tmp_path: Path) -> None:
    state = RunState(step=7, elapsed_s=1.5, best_score=0.25, best_step=5, cursor={"epoch": 1}, failures={"row": 2})
    state.save(tmp_path)
    assert RunState.load(tmp_path) == state


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1, "stp": 3}'])
def test_damaged_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RequestError):
        RunState.load(tmp_path)


def test_step_zero_is_a_candidate_and_ties_keep_the_earlier() -> None:
    state = RunState().evaluated(0.5, 0.0)
    assert (state.best_step, state.evaluations_without_rise) == (0, 0)
    later = RunState(step=3, best_score=0.5, best_step=0).evaluated(0.5, 0.0)
    assert (later.best_step, later.evaluations_without_rise) == (0, 1)
    risen = RunState(step=3, best_score=0.5, best_step=0, evaluations_without_rise=2).evaluated(0.6, 0.05)
    assert (risen.best_step, risen.best_score, risen.evaluations_without_rise) == (3, 0.6, 0)


def test_small_rises_make_a_best_step_and_do_not_renew_patience() -> None:
    state = RunState().evaluated(0.50, 0.05)
    state = replace(state, step=1).evaluated(0.53, 0.05)
    assert (state.best_step, state.best_score, state.evaluations_without_rise) == (1, 0.53, 1)
    state = replace(state, step=2).evaluated(0.56, 0.05)
    assert (state.best_step, state.evaluations_without_rise) == (2, 0)


def test_limits() -> None:
    none = EarlyStoppingSettings()
    assert limit_met(RunState(step=4), epochs=0, limits=LimitSettings(max_steps=5), early_stopping=none) is None
    assert limit_met(RunState(step=5), epochs=0, limits=LimitSettings(max_steps=5), early_stopping=none) == "max_steps"
    assert limit_met(RunState(), epochs=2.0, limits=LimitSettings(max_epochs=2), early_stopping=none) == "max_epochs"
    hours = LimitSettings(max_hours=0.5)
    assert limit_met(RunState(elapsed_s=1799), epochs=0, limits=hours, early_stopping=none) is None
    assert limit_met(RunState(elapsed_s=1800), epochs=0, limits=hours, early_stopping=none) == "max_hours"
    patience = EarlyStoppingSettings(patience=2)
    tired = RunState(evaluations_without_rise=2)
    assert limit_met(tired, epochs=0, limits=LimitSettings(max_steps=5), early_stopping=patience) == "early_stopping"
