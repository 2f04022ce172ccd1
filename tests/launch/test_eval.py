"""Contract: `windlass eval` answers as its schema says, with AUC, its windows, legal mass and exposure bias beside the
ranking metrics, and says what it measured them on; a log of bad rows is refused.

A tiny random model with the reference engine. Not checked here: the values (tests/trainer/test_scored_evaluation.py,
tests/reward), vLLM (tests/rollout).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from data.catalogue import Catalogue
from data.dataset import Dataset
from data.errors import RequestError
from data.feedback import PropensityKind, single_item_log, write_feedback
from launch.provenance import ROOT
from tests.launch.conftest import Here
from tests.small_world import write_dataset
from tests.tiny_model import write_tiny_model
from trainer.checkpoint_evaluation import exposure_log
from trainer.evaluation import sample_rows
from trainer.prompt_card import PromptCard
from trainer.row_metrics import RowMetrics, write_row_metrics

ENGINE = ("--rollout.engine", "reference", "--rollout.dtype", "float32", "--cluster.object-store-mib", "128")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path]:
    """A dataset and a model of its catalogue, in one folder."""
    folder = tmp_path_factory.mktemp("eval")
    dataset = write_dataset(folder / "source")
    catalogue = Catalogue.build(dataset, "default")
    model = write_tiny_model(folder / "hf", catalogue, hidden=32, layers=1)
    PromptCard(history=6, exclude_seen=True, max_prompt_tokens=16).write(model)
    return dataset, model


def write_log(folder: Path, dataset: Dataset, logp0: float = -1.0) -> None:
    """Half of the items, shown to the users of the test rows without a response."""
    rows = dataset.samples("test")
    n = len(rows)
    log = single_item_log(
        request_id=[str(row) for row in range(n)],
        user_id_N=rows.user_id_N,
        timestamp_N=rows.timestamp_N - 1,
        history=[np.zeros(0, np.int32)] * n,
        exposed_N=(np.arange(n) % (dataset.n_items // 2)).astype(np.int32),
        response_N=np.zeros(n, np.float32),
        logp0_N=np.where(np.arange(n) == 0, 1.0, logp0).astype(np.float32),
        propensity_kind=PropensityKind.NONE,
        policy_version="v",
        decode=["beam"] * n,
        temperature=1.0,
        catalogue_digest="d",
    )
    write_feedback(folder, log.table)


def test_eval_answers_with_every_measure(windlass_here: Here, world: tuple[Dataset, Path], tmp_path: Path) -> None:
    dataset, model = world
    write_log(tmp_path / "log", dataset)
    k = ("--k", "1", "5", "10")
    asked = ("--scores.rows", "16", "--scores.negatives", "8", "--feedback", "log", "--rows", "24")
    done = windlass_here(
        *("eval", str(model), "--data", str(dataset.path), *k, *asked, *ENGINE, "--json", "a.json"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads((tmp_path / "a.json").read_text())
    schema = json.loads((ROOT / "docs" / "schemas" / "eval.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(answer)
    metrics = answer["metrics"]
    for name in ("hr", "ndcg", "coverage", "exposure_gap", "exposure_divergence"):
        assert {f"{name}@{k}" for k in (1, 5, 10)} <= set(metrics)
    assert {"auc", "opauc@5", "wpauc@5", "legal_mass", "repeat_exposure"} <= set(metrics)
    assert "wpauc@10" not in metrics
    low, high = answer["ci95"]["auc"]
    assert low <= metrics["auc"] <= high
    scored = answer["scored"]
    assert scored == {"rows": 16 - scored["unreachable"], "negatives": 8, "source": "random"} | {
        "unreachable": scored["unreachable"]
    }
    assert answer["feedback"] == {"path": "log", "left_out": {"positive_log_propensity": 1}}
    assert "8 negatives (permitted items, drawn evenly)" in done.stdout
    assert "1 positive log propensity" in done.stdout


def test_differences_to_another_evaluation_of_the_rows(
    windlass_here: Here, world: tuple[Dataset, Path], tmp_path: Path
) -> None:
    dataset, model = world
    rows = sample_rows(len(dataset.samples("test")), 8, 0)
    users = dataset.samples("test").user_id_N[rows]
    base = RowMetrics(
        name="never",
        split="test",
        dataset=dataset.fingerprint,
        sample_id_N=rows,
        user_id_N=users,
        value_N={"hr@10": np.zeros(8, np.float32)},
    )
    write_row_metrics(tmp_path / "run", base)
    asked = ("--k", "10", "--rows", "8", "--scores.rows", "0", "--unconstrained-rows", "0", "--base", "run:never")
    done = windlass_here(
        "eval", str(model), "--data", str(dataset.path), *asked, *ENGINE, "--json", "a.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads((tmp_path / "a.json").read_text())
    schema = json.loads((ROOT / "docs" / "schemas" / "eval.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(answer)
    assert answer["differences"]["hr@10"]["mean"] == pytest.approx(answer["metrics"]["hr@10"])
    assert answer["base"] == "run:never"
    other = windlass_here("eval", str(model), "--data", str(dataset.path), *asked, "--seed", "1", *ENGINE, cwd=tmp_path)
    assert other.returncode == 2
    assert "the 8 rows of test that --rows and --seed choose" in other.stderr


def test_a_log_that_cannot_be_used_is_refused(world: tuple[Dataset, Path], tmp_path: Path) -> None:
    dataset, _ = world
    write_log(tmp_path / "log", dataset, logp0=2.0)
    with pytest.raises(RequestError, match="positive_log_propensity"):
        exposure_log(tmp_path / "log", dataset.n_items)
