"""Contract: `windlass bench stages` takes steps with every stage on and with none, tells the objective's share of a
learner's step by the loop's own phase timer, and says in `checked` whether the stages were on.

Not checked here: the figures; what the stages compute (tests/trainer).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from launch.bench import stages
from launch.bench.stages import LEARNER, StagesBench, Steps, stages_command
from tests.launch.test_bench_rollout import check_answer
from tests.requirements import require

SMALL = StagesBench(model="tiny", prompts=2, prompt_len=22, group=4, repeats=1, threads=1)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.long
def test_the_objective_is_timed_with_every_stage_and_with_none(monkeypatch: pytest.MonkeyPatch) -> None:
    require("deepspeed")
    made: list[Steps] = []

    class Kept(Steps):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(stages, "Steps", Kept)
    answer = stages_command(SMALL)
    check_answer("stages", json.loads(json.dumps(answer, allow_nan=False)))
    assert answer["checked"] is True
    for name in ("ours", "plain"):
        phases = answer["phases"][name]
        share = phases["objective"] / sum(phases[phase] for phase in LEARNER)
        assert answer["objective_share"][name] == pytest.approx(share)
        assert 0 < share < 1
    objective = answer["ways"]["ours"]["settings"]["objective"]
    on = [objective["gate"]["kind"], objective["window"]["kind"], objective["anchor"]["mode"]]
    assert on == ["adagrpo", "soft", "append"]
    assert answer["ways"]["plain"]["settings"]["objective"]["gate"]["kind"] == "none"

    every, plain = made
    assert every.sound()
    assert plain.sound()
    every.metrics[-1].pop("tempering/mean")
    plain.metrics[-1]["groups/members"] -= 1
    assert not every.sound()
    assert not plain.sound()
