"""`windlass replay`: periods cover the test split in order and hold what their times say, the replayed clock keeps the
order of time, every arm differs from ABPO in what it names, a replay goes on where it stopped to the same records,
and wrong requests are one line.

The replay of a small world is real but for the engine, which is the reference one. Not checked here: the cycle
(test_cycle.py), the measures of exposure (tests/reward/test_exposure.py), how the policy serves (test_simulation.py).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.catalogue import Catalogue
from data.errors import RequestError
from data.feedback import DAY_SECONDS, day_start
from launch import cli
from launch.config import load_job, to_mapping
from launch.continual.registry import Registry
from launch.continual.replay_arms import ARMS
from launch.continual.replay_command import arm_job, read_replay
from launch.continual.replay_periods import cut, replayed_time
from launch.provenance import ROOT
from tests.launch.test_recipes import flat
from tests.requirements import require
from tests.small_world import recipe, windlass, write_dataset, write_recipe
from tests.tiny_model import write_tiny_model
from trainer.prompt_card import PromptCard

UNCHECKED = {"WINDLASS_PACKAGE_DIGEST": "unchecked"}
TIMES = st.lists(st.integers(0, 60 * DAY_SECONDS), min_size=1, max_size=60).map(lambda times: np.sort(np.array(times)))


@settings(max_examples=200, deadline=None)
@given(TIMES, st.integers(1, 5), st.integers(1, 9))
def test_periods_are_whole_units_that_follow_each_other(time_N: np.ndarray, periods: int, unit_days: int) -> None:
    try:
        found = cut(time_N, periods, unit_days)
    except RequestError:
        return
    assert [period.number for period in found] == list(range(1, periods + 1))
    for period, after in itertools.pairwise(found):
        assert period.end == after.first
        assert day_start(after.day) - day_start(period.day) == DAY_SECONDS
    length = found[0].end - found[0].first
    assert length % (unit_days * DAY_SECONDS) == 0
    assert found[0].first <= time_N[0] < found[0].first + DAY_SECONDS
    for period in found:
        assert period.rows.tolist() == [row for row, t in enumerate(time_N) if period.first <= t < period.end]
    # One unit more for each would not fit.
    assert found[0].first + periods * (length + unit_days * DAY_SECONDS) > time_N[-1] // DAY_SECONDS * DAY_SECONDS
    moved_N = replayed_time(time_N, found)
    inside = np.concatenate([period.rows for period in found])
    assert (np.diff(moved_N[inside]) >= 0).all()
    for period in found:
        assert (moved_N[period.rows] // DAY_SECONDS * DAY_SECONDS == day_start(period.day)).all()
    assert not np.delete(moved_N, inside).any()


def test_periods_that_cannot_be_cut() -> None:
    with pytest.raises(RequestError, match="at most 2: the test split spans 2 x 7 days"):
        cut(np.array([0, 8 * DAY_SECONDS]), 3, 7)
    with pytest.raises(RequestError, match=r"period 2 .* has no rows"):
        cut(np.array([0, 10 * DAY_SECONDS]), 3, 1)


CHANGES = {
    "none": set(),
    "abpo": set(),
    "abpo-no-anchor": {"objective.anchor.mode"},
    "abpo-no-snips": {"objective.anchor.snips"},
    "abpo-no-tempering": {"objective.tempering.mode"},
    "grpo": {"objective.anchor.mode", "objective.tempering.mode", "reward.feedback", "reward.item_match"},
    "sft": {
        *("objective.anchor.mode", "objective.tempering.mode", "reward.feedback", "reward.item_match"),
        *("objective.nll_weight", "objective.policy_weight", "objective.beta", "rollout.width"),
    },
}


@pytest.mark.parametrize("name", ARMS)
def test_arms_differ_from_abpo_in_what_they_name(name: str, tmp_path: Path) -> None:
    known, _ = read_replay(["abpo", "--dataset", "datasets/ml-100k", "--periods", "2", "--out", str(tmp_path)])
    job, _ = arm_job(known, [], name)
    base, mine = flat(to_mapping(load_job("abpo"))), flat(to_mapping(job))
    changed = {key for key in base | mine if base.get(key) != mine.get(key)}
    assert changed - {"feedback"} == CHANGES[name]
    if name.startswith("abpo-"):
        ablation = flat(to_mapping(load_job(name)))
        assert {key for key in ablation | mine if ablation.get(key) != mine.get(key)} == {"feedback"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--periods", "0"], "--periods: 0; legal: 1 or more"),
        (["--periods", "two"], "replay: argument --periods: invalid int value"),
        (["--periods", "2", "--arms", "dpo"], "--arms: dpo"),
        (["--periods", "2", "--limits.max_stepz", "1"], "limits.max_stepz"),
        (["--periods", "2"], "dataset.json"),
    ],
)
def test_wrong_requests_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert cli.run(["replay", "abpo", "--dataset", str(tmp_path), "--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_split_that_is_none_in_time_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "world")
    card = data.path / "dataset.json"
    content = json.loads(card.read_text())
    card.write_text(json.dumps(content | {"split": {"kind": "leave_one_out"}}))
    asked = ["replay", "abpo", "--dataset", str(data.path), "--periods", "1", "--out", str(tmp_path / "out")]
    assert cli.run(asked) == 2
    assert "leave_one_out; legal: a split by time" in capsys.readouterr().err


class World:
    """A dataset of 80 days, a model, and an ABPO recipe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dataset = write_dataset(
            folder / "dataset", starts_s=40 * DAY_SECONDS, step_s=3 * DAY_SECONDS, ratios=(5.0, 1.0, 4.0)
        )
        model = write_tiny_model(folder / "model", Catalogue.build(self.dataset, "default"))
        PromptCard(history=6, exclude_seen=True, max_prompt_tokens=16).write(model)
        content = recipe(
            self.dataset.path,
            "rl",
            init=str(model),
            rollout={"engine": "reference", "decode": "sample"},
            reward={"item_match": 0.0, "rank_penalty": 0.0, "feedback": 1.0},
            objective={"anchor": {"mode": "append"}},
        )
        guard = {"conditions": [{"metric": "exposed_hr@10", "tolerance": 1.0}]}
        self.recipe = write_recipe(
            folder / "abpo.yaml", content | {"continual": {"guard": guard, "rows": {"held_out": 0.3}}}
        )
        self.out = folder / "out"

    def run(self, *arguments: str, seed: int = 1) -> tuple[int, dict[str, Any], str]:
        """Exit code, answer and what was said."""
        done = windlass(
            *("replay", str(self.recipe), "--dataset", str(self.dataset.path), "--periods", "3", "--unit-days", "2"),
            *("--out", str(self.out), "--rows", "48", "--eval-rows", "64", "--horizon", "10", "--seed", str(seed)),
            *("--json", "-", *arguments),
            cwd=self.folder,
            **UNCHECKED,
        )
        return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.mark.long
def test_a_replay_measures_serves_and_updates_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    require("ray")
    require("deepspeed")
    world = World(tmp_path)
    code, answer, said = world.run("--arms", "none", "abpo")
    assert code == 0, said
    schema = json.loads((ROOT / "docs" / "schemas" / "replay.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(answer)
    none, abpo = (answer["arms"][name]["periods"] for name in ("none", "abpo"))
    assert none["1"] == {name: value for name, value in abpo["1"].items() if name != "differences"}
    assert [none[number]["version"] for number in "123"] == [1, 1, 1]
    assert [none[number]["update"] for number in "123"] == [None, None, None]
    decisions = [abpo[number]["update"]["decision"] for number in "23"]
    assert set(decisions) <= {"promoted", "rejected"}
    assert "promoted" in decisions
    registry = Registry(world.out / "abpo" / "registry")
    assert len(registry.numbers()) == 3
    assert Registry(world.out / "none" / "registry").numbers() == [1]
    assert {f"hr@{k}" for k in (1, 5, 10)} <= abpo["2"]["metrics"].keys()
    assert {"exposure_gap@10", "exposure_divergence@10", "repeat_exposure"} <= abpo["2"]["metrics"].keys()
    assert "repeat_exposure" not in abpo["1"]["metrics"], "nothing was shown before the first period"
    assert "ndcg@10" in abpo["3"]["differences"]
    # A run that died while it measured the last period: its day is there, its record is not.
    (world.out / "abpo" / "periods" / "03.json").unlink()
    code, again, said = world.run("--arms", "none", "abpo")
    assert code == 0, said
    assert again == answer
    code, _, said = world.run("--arms", "none", seed=2)
    assert code == 2
    assert "replays another seed" in said
