"""`windlass ope`: the answers against their schemas; on Open Bandit every interval of IPS holds what the policy earned
itself; a model's value from its own log is the log's mean response with every weight 1, and another model's is not.

The estimators themselves are in tests/reward/test_off_policy.py, a ranker as the direct model behind a fleet in
tests/launch/continual/test_measuring.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from data.catalogue import Catalogue
from data.feedback import write_feedback
from launch import cli
from launch.provenance import ROOT
from launch.simulation import ServingSettings, simulate
from rollout.reference_engine import ReferenceEngine
from rollout.settings import RolloutSettings
from tests.requirements import SHARED_DATA, require
from tests.small_world import write_dataset
from tests.tiny_model import write_tiny_model
from trainer.prompt_card import PromptCard


def run(capsys: pytest.CaptureFixture[str], schema: str, *arguments: str) -> dict[str, Any]:
    assert cli.run([*arguments, "--json", "-"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    content = json.loads((ROOT / "docs" / "schemas" / f"{schema}.schema.json").read_text())
    jsonschema.Draft202012Validator(content).validate(answer)
    return answer


def test_each_policy_from_the_log_of_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    require("shared-data")
    sample = str(SHARED_DATA / "open_bandit_sample")
    answer = run(capsys, "ope-bandit", "ope", "bandit", "--path", sample, "--resamples", "500")
    assert len(answer["values"]) == 6
    for one in answer["values"]:
        assert one["policy"] != one["log"]
        for found in one["estimates"]["values"].values():
            assert found["width"] == pytest.approx(found["high"] - found["low"])
            assert found["low"] <= one["earned"]["high"]
            assert found["high"] >= one["earned"]["low"]
        assert one["estimates"]["effective_sample_size"] < one["rows"]
        assert set(one["estimates"]["values"]) == {"ips", "snips", "dr"}


def test_a_model_from_its_own_log_and_from_that_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_dataset(tmp_path / "world")
    catalogue = Catalogue.build(dataset, "default")
    models = [write_tiny_model(tmp_path / str(seed), catalogue, seed, hidden=32, layers=1) for seed in (0, 1)]
    for model in models:
        PromptCard(history=6, exclude_seen=True, max_prompt_tokens=16).write(model)
    samples = dataset.samples("test")
    engine = ReferenceEngine(RolloutSettings.model_validate({"dtype": "float32"}), models[0])
    log = simulate(
        engine,
        samples,
        np.arange(len(samples)),
        PromptCard.read(models[0]).builder(catalogue, models[0]),
        ServingSettings(horizon=10, temperature=0.8),
        name="test",
        policy_version="first",
        batch=64,
    ).log
    write_feedback(tmp_path / "log", log.table)
    capsys.readouterr()
    own, other = (
        run(capsys, "ope-model", "ope", "model", str(model), "--log", str(tmp_path / "log"))["estimates"]
        for model in models
    )
    assert own["effective_sample_size"] == pytest.approx(len(log), rel=1e-3)
    assert own["weight_max"] == pytest.approx(1, abs=1e-3)
    for name in ("ips", "snips"):
        assert own["values"][name]["mean"] == pytest.approx(float(log.anchors().response_N.mean()), rel=1e-3)
    assert other["effective_sample_size"] < len(log) / 2
    assert "dr" not in own["values"]


def test_a_log_without_propensities_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["ope", "model", str(tmp_path), "--log", str(tmp_path)]) == 2
    assert cli.run(["ope", "bandit", "--path", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 2
