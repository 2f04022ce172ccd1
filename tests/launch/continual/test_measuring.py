"""What the guard is told of two models: every metric that its documentation names, against values that are known; what
cannot be measured is left out; without organic interactions exposures stand in and the evidence says so.

The log is a model's own, by real sampling, and engines are the reference one. The estimators, the lists' metrics and
the measures of exposure have tests of their own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data.catalogue import Catalogue
from data.dataset import Dataset
from data.feedback import FeedbackLog, write_feedback
from data.feedback_reading import FeedbackChecks
from launch.continual.guard import Evidence
from launch.continual.measuring import HeldOut, Measurer, MeasureSettings
from launch.simulation import ServingSettings, simulate
from reward.popularity import PopularityRanker
from rollout.reference_engine import ReferenceEngine
from rollout.settings import RolloutSettings
from tests.small_world import write_dataset
from tests.tiny_model import write_tiny_model
from trainer.logged_policy import logged_scores
from trainer.prompt_card import PromptCard

ROWS = 80
LISTS = ("hr@5", "ndcg@5", "exposed_hr@5", "coverage@5", "invalid@5", "exposure_divergence@5", "repeat_exposure")


def engine(model: Path, catalogue: Catalogue) -> ReferenceEngine:
    return ReferenceEngine(RolloutSettings.model_validate({"dtype": "float32"}), model)


class World:
    """Two models, and a log of the first one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dataset: Dataset = write_dataset(folder / "world")
        self.catalogue = Catalogue.build(self.dataset, "default")
        self.first, self.second = (
            write_tiny_model(folder / str(seed), self.catalogue, seed, hidden=32, layers=1) for seed in (0, 1)
        )
        for model in (self.first, self.second):
            PromptCard(history=6, exclude_seen=True, max_prompt_tokens=16).write(model)
        samples = self.dataset.samples("train")
        self.log = simulate(
            engine(self.first, self.catalogue),
            samples,
            np.arange(len(samples) - ROWS, len(samples)),
            PromptCard.read(self.first).builder(self.catalogue, self.first),
            ServingSettings(horizon=10),
            name="log",
            policy_version="first",
            batch=64,
        ).log
        write_feedback(folder / "log", self.log.table)

    def measure(
        self, candidate: Path, *metrics: str, log: FeedbackLog | None = None, ranker: Path | None = None
    ) -> dict[str, Evidence]:
        checks = FeedbackChecks(n_items=self.catalogue.n_items)
        settings = MeasureSettings(k=(1, 5), resamples=200, ranker=ranker, draws=4)
        held_out = HeldOut(log=log or self.log, trained=self.folder / "log", checks=checks, settings=settings)
        measurer = Measurer(engine, self.dataset, held_out)
        found = measurer.measure(candidate, self.first, [(metric, 0.9) for metric in metrics])
        assert all(evidence.confidence == 0.9 for evidence in found.values())
        return {metric: evidence for (metric, _), evidence in found.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("measuring"))


def with_column(log: FeedbackLog, name: str, values: list[object]) -> FeedbackLog:
    at = log.table.schema.get_field_index(name)
    field = log.table.schema.field(at)
    return FeedbackLog(table=log.table.set_column(at, field, pa.array(values, field.type)), counts={})


def test_metrics_of_lists(world: World) -> None:
    found = world.measure(world.second, *LISTS, "recall@1", "wpauc@5")
    assert set(found) == {*LISTS, "recall@1"}
    for evidence in found.values():
        assert evidence.measured == ""
        assert evidence.difference.value == pytest.approx(evidence.candidate.value - evidence.parent.value)
    responses = int(world.log.anchors().response_N.sum())
    assert found["exposed_hr@5"].n == responses
    assert responses != found["hr@5"].n == found["coverage@5"].n > 0
    assert found["hr@5"].candidate.low < found["hr@5"].candidate.high
    assert found["coverage@5"].candidate.low == found["coverage@5"].candidate.high
    assert found["invalid@5"].candidate.value == 0


def test_exposures_stand_in_where_nothing_is_organic(world: World) -> None:
    alone = with_column(world.log, "user_id", list(range(ROWS)))
    found = world.measure(world.second, "hr@5", "exposed_hr@5", log=alone)
    assert found["hr@5"].measured == "exposed_hr@5"
    assert found["exposed_hr@5"].measured == ""
    assert found["hr@5"].candidate == found["exposed_hr@5"].candidate
    silent = with_column(alone, "response", [[0.0]] * ROWS)
    assert world.measure(world.second, "hr@5", "exposed_hr@5", log=silent) == {}


def test_off_policy_values(world: World) -> None:
    found = world.measure(world.second, "ips", "snips", "effective_sample_size", "policy_gap", "dr")
    assert "dr" not in found, "there is no ranker"
    mean = float(world.log.anchors().response_N.mean())
    for name in ("ips", "snips"):
        # The parent made the log: its weights are 1.
        assert found[name].parent.value == pytest.approx(mean, rel=1e-4)
        assert found[name].candidate.value != pytest.approx(mean, rel=1e-2)
        assert found[name].difference.low <= found[name].difference.value <= found[name].difference.high
    assert found["effective_sample_size"].parent.value == pytest.approx(ROWS, rel=1e-4)
    assert found["effective_sample_size"].candidate.value < 0.9 * ROWS
    assert 0 <= found["policy_gap"].candidate.value < 1e-4
    same = world.measure(world.first, "snips")["snips"].difference
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_rows_of_retired_items_weigh_nothing_off_policy(world: World) -> None:
    """IPS is a mean over all rows that were logged; leaving those out would raise it by their share."""
    response_N, item_N = world.log.anchors().response_N, world.log.anchors().item_N
    retired = np.unique(np.concatenate([item_N[response_N > 0][:1], item_N[response_N == 0][:4]]))
    catalogue = world.catalogue.retire(retired)
    candidate = world.folder / "retired"
    shutil.copytree(world.second, candidate, ignore=shutil.ignore_patterns("catalogue"))
    catalogue.save(candidate / "catalogue")
    checks = FeedbackChecks(n_items=catalogue.n_items, active_I=catalogue.active)
    settings = MeasureSettings(k=(1, 5), resamples=200)
    log = world.folder / "log"
    held_out = HeldOut.read(log, trained=log, checks=checks, settings=settings)
    wanted = [(name, 0.9) for name in ("ips", "snips", "exposed_hr@5", "hr@5", "policy_gap")]
    found = {
        metric: evidence
        for (metric, _), evidence in Measurer(engine, world.dataset, held_out)
        .measure(candidate, world.first, wanted)
        .items()
    }
    gone_N = np.isin(item_N, retired)
    assert ROWS > gone_N.sum() > 0
    prompts = PromptCard.read(candidate).builder(catalogue, candidate).build(world.log.samples()).prompts
    scores = logged_scores(candidate, catalogue, prompts, item_N, np.ones(ROWS), batch=64)
    assert np.isneginf(scores.logp_N[gone_N]).all()
    weight_N = np.exp(scores.logp_N - world.log.anchors().logp0_N).clip(max=settings.weight_clip)
    assert found["ips"].n == ROWS
    assert found["ips"].candidate.value == pytest.approx((weight_N * response_N).sum() / ROWS, rel=1e-4)
    assert found["snips"].candidate.value == pytest.approx((weight_N * response_N).sum() / weight_N.sum(), rel=1e-4)
    assert found["ips"].parent.value == pytest.approx(response_N.mean(), rel=1e-4)
    assert found["exposed_hr@5"].n == (response_N[~gone_N] > 0).sum() < (response_N > 0).sum()
    assert catalogue.active[held_out.organic.target_N].all()
    assert 0 <= found["policy_gap"].candidate.value < 1e-4


def test_doubly_robust_values_take_a_ranker(world: World) -> None:
    folder = world.folder / "ranker"
    if not folder.is_dir():
        PopularityRanker(world.dataset.train_counts()).save(folder)
    found = world.measure(world.first, "dr", ranker=folder)["dr"]
    mean = float(world.log.anchors().response_N.mean())
    assert found.parent.value == pytest.approx(mean, abs=0.05)
    assert found.difference.value == 0


def test_rows_without_a_propensity_say_nothing_off_policy(world: World) -> None:
    beams = with_column(world.log, "propensity_kind", ["none"] * ROWS)
    assert set(world.measure(world.second, "snips", "policy_gap", "hr@5", log=beams)) == {"hr@5"}
