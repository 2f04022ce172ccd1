"""Contract of `windlass sweep`: a run for each value and seed, none twice, means and deviations over the seeds, an
answer of its schema, and the frontier in the report; requests that no run would allow are refused before the first.

A runner that writes summaries stands in for `windlass train`, whose own tests run it. Not checked: the metrics.
"""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from data.errors import RequestError, RunError
from launch.config import load_job, to_yaml
from launch.provenance import ROOT
from launch.report import render
from launch.sweep_command import sweep
from trainer.laac_job import DIVERGED


class FakeTraining:
    """Writes the summary of a run whose metrics follow from alpha and seed."""

    def __init__(self, *, fails_at: int | None = None, diverges_at: str = "") -> None:
        self.calls: list[list[str]] = []
        self.fails_at = fails_at
        self.diverges_at = diverges_at

    def __call__(self, arguments: list[str]) -> int:
        self.calls.append(arguments)
        if len(self.calls) == self.fails_at:
            return 1
        given = dict(zip(arguments[2::2], arguments[3::2], strict=True))
        alpha, seed = float(given.get("--laac.alpha", 1)), int(given["--seed"])
        stage = {"n": 10, "recall@10": 0.1 * alpha + 0.01 * seed, "novelty@10": 0.5 - 0.1 * alpha, "ild@10": 0.5}
        folder = Path(given["--run-dir"])
        folder.mkdir(parents=True)
        if given.get("--laac.alpha") == self.diverges_at:
            (folder / DIVERGED).write_text("the critics diverged in step 7: gap grew\n")
            return 1
        content = {"format": 1, "interrupted": False, "stages": {"laac": {**stage, "ci95": {}}}}
        (folder / "summary.json").write_text(json.dumps(content))
        return 0


def test_each_value_and_seed_is_run_once(tmp_path: Path) -> None:
    training = FakeTraining(fails_at=3)
    asked = {"over": "laac.alpha", "values": ("0", "3"), "seeds": (1, 2), "overrides": ("laac.beta=2",)}
    with pytest.raises(RunError, match="seed-1"):
        sweep("laac", tmp_path, runner=training, **asked)  # type: ignore[arg-type]
    training.fails_at = None
    answer = sweep("laac", tmp_path, runner=training, **asked)  # type: ignore[arg-type]
    # Four runs and the one that failed; the two that were finished are not run again.
    assert len(training.calls) == 5
    assert all("--laac.beta" in call for call in training.calls)
    schema = json.loads((ROOT / "docs" / "schemas" / "sweep.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(answer)
    point = answer["points"]["laac.alpha=3"]
    assert point["runs"] == 2
    assert point["mean"]["recall@10"] == pytest.approx(0.315)
    assert point["std"]["recall@10"] == pytest.approx(0.01 * 0.5**0.5)
    assert answer["mean"] == point["mean"]
    # A further value joins the folder, and the report shows all of them.
    sweep("laac", tmp_path, over="laac.alpha", values=("10",), seeds=(1,), runner=training)
    page = render(tmp_path)
    assert "Frontier: recall@10 against novelty@10" in page
    assert "laac.alpha=10" in page
    assert set(json.loads((tmp_path / "summary.json").read_text())["stages"]) == {
        "laac.alpha=0",
        "laac.alpha=3",
        "laac.alpha=10",
    }


def test_critics_that_diverge_are_counted_and_not_run_again(tmp_path: Path) -> None:
    training = FakeTraining(diverges_at="0")
    asked = {"over": "laac.alpha", "values": ("0", "3"), "seeds": (1, 2)}
    for _ in range(2):
        answer = sweep("laac", tmp_path, runner=training, **asked)  # type: ignore[arg-type]
    assert len(training.calls) == 4
    schema = json.loads((ROOT / "docs" / "schemas" / "sweep.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(answer)
    assert answer["points"]["laac.alpha=0"] == {"runs": 0, "diverged": 2, "mean": {}, "std": {}}
    assert (answer["points"]["laac.alpha=3"]["runs"], answer["points"]["laac.alpha=3"]["diverged"]) == (2, 0)
    page = render(tmp_path)
    assert "laac.alpha=3" in page
    assert ">diverged</th>" in page


def test_points_stand_in_the_order_of_their_values(tmp_path: Path) -> None:
    asked = {"over": "laac.alpha", "values": ("10", "3", "0.5"), "seeds": (1,)}
    sweep("laac", tmp_path, runner=FakeTraining(), **asked)  # type: ignore[arg-type]
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert list(stages) == ["laac.alpha=0.5", "laac.alpha=3", "laac.alpha=10"]


def test_seeds_alone_are_one_point(tmp_path: Path) -> None:
    answer = sweep("laac", tmp_path, seeds=(5,), runner=FakeTraining())
    assert list(answer["points"]) == ["all"]
    assert (answer["runs"], answer["std"]) == (1, {})
    assert "Frontier" not in render(tmp_path)


def test_policy_jobs_are_compared_by_their_test(tmp_path: Path) -> None:
    def training(arguments: list[str]) -> int:
        given = dict(zip(arguments[2::2], arguments[3::2], strict=True))
        folder = Path(given["--run-dir"])
        folder.mkdir(parents=True)
        test = {"n": 5, "ndcg@10": float(given["--learner.lr"]), "exclude_seen": True, "invalid": {"constrained": 0.0}}
        (folder / "summary.json").write_text(json.dumps({"format": 1, "interrupted": False, "test": test}))
        return 0

    rows = ("evaluation.test_rows=5",)
    answer = sweep(
        "ml100k-sft", tmp_path, over="learner.lr", values=("0.1", "0.3"), seeds=(1,), overrides=rows, runner=training
    )
    assert {name: one["mean"] for name, one in answer["points"].items()} == {
        "learner.lr=0.1": {"n": 5.0, "ndcg@10": 0.1},
        "learner.lr=0.3": {"n": 5.0, "ndcg@10": 0.3},
    }


def test_a_finished_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    """Its figures would count as those of the settings that are asked for."""
    training = FakeTraining()
    sweep("laac", tmp_path, seeds=(1,), runner=training)
    # As a version wrote it that knew one key less.
    written = to_yaml(load_job("laac", ["--seed", "1"])).replace("  warmstart_steps: 0\n", "")
    (tmp_path / "all" / "seed-1" / "config.yaml").write_text(written)
    assert "warmstart" not in written
    sweep("laac", tmp_path, seeds=(1,), runner=training)
    with pytest.raises(RequestError, match=r"laac\.beta: 2\.0, but the run in .*seed-1 was started with 1\.0"):
        sweep("laac", tmp_path, seeds=(2, 1), overrides=("laac.beta=2",), runner=training)
    assert len(training.calls) == 1


@pytest.mark.parametrize(
    ("recipe", "overrides", "where"),
    [
        ("ml100k-sft", ("evaluation.test_rows=0",), "evaluation.test_rows"),
        ("ml100k-ranker", (), "job"),
    ],
)
def test_jobs_that_measure_nothing_are_refused(
    tmp_path: Path, recipe: str, overrides: tuple[str, ...], where: str
) -> None:
    training = FakeTraining()
    with pytest.raises(RequestError) as caught:
        sweep(recipe, tmp_path, overrides=overrides, runner=training)
    assert caught.value.where == where
    assert not training.calls


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        ({"over": "laac.alpha"}, "--values"),
        ({"values": ("1",)}, "--values"),
        ({"seeds": (1, 1)}, "--seeds"),
        ({"over": "laac.alpha", "values": ("1", "1")}, "--values"),
        ({"seeds": ()}, "--seeds"),
        ({"overrides": ("laac.beta",)}, "--set"),
        ({"over": "laac.alpha", "values": ("1", "-1")}, "laac.alpha"),
        ({"over": "laac.gamma", "values": ("1",)}, "laac.gamma"),
    ],
)
def test_bad_sweeps_are_refused_before_the_first_run(tmp_path: Path, asked: dict[str, object], where: str) -> None:
    training = FakeTraining()
    with pytest.raises(RequestError) as caught:
        sweep("laac", tmp_path, runner=training, **asked)  # type: ignore[arg-type]
    assert caught.value.where == where
    assert not training.calls
