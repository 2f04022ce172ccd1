"""Contract of `laac` jobs: the policy learns what is rewarded; every method, form and switch trains; a run that is
continued is bit for bit the run that was not; its rankers serve policy and critics; a cache is read only where it was
asked alike and has answers; critics that diverge end the run with the last good checkpoint and the term that grew.

Not checked: the mathematics (test_laac_losses.py), the model of a reference (test_reference_policy.py), and that LAAC
beats its baselines on real data, which docs/results tells as it came.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.dataset import Dataset
from data.errors import RequestError
from data.transitions import Sessions
from launch.cli import run
from launch.config import check_paths
from launch.report import render
from launch.submission.plan import job_needs
from reward.batch_scoring import score_batch
from reward.laac import ItemNetwork, LaacRanker, LaacShape
from reward.ranker import CatalogueRanker, load_ranker
from tests.data.tiny import import_events
from tests.requirements import require
from tests.small_world import read_steps, write_recipe
from trainer.jobs import LaacJob
from trainer.laac_batches import TransitionTable
from trainer.laac_job import DIVERGED, LaacRun, needs_cluster
from trainer.laac_learner import LaacLearner
from trainer.laac_settings import LaacSettings, Weighting
from trainer.reference_answers import ReferenceAnswers, weighted
from trainer.reference_policy import description, random_answers

ITEMS, USERS, EVENTS = 24, 40, 12


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors on shared cores: a second thread costs more than it brings."""
    require("deepspeed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Users who see items at random and rate the first half of them 5, the others 1."""
    random = np.random.default_rng(0)
    events, ratings = [], []
    for user in range(USERS):
        for step, item in enumerate(random.permutation(ITEMS)[:EVENTS].tolist()):
            events.append((user, f"i{item:02d}", 1000 * user + 10 * step))
            ratings.append(5.0 if item < ITEMS // 2 else 1.0)
    return import_events(tmp_path_factory.mktemp("laac"), events, ratings=ratings)


def content(dataset: Dataset, **laac: Any) -> dict[str, Any]:
    """A job of a few steps with a random reference."""
    reference = {"kind": "random", "candidates": 12, "answers": 3, **laac.pop("reference", {})}
    return {
        "job": "laac",
        "data": {"dataset": str(dataset.path), "history": 4, "users": 30, "min_ratings": 6},
        "laac": {"batch": 32, "width": 8, "threads": 1, "reference": reference, **laac},
        "limits": {"max_steps": 40},
        "evaluation": {"every": 20, "rows": 20, "k": [1, 5, 10], "metric": "ndcg@10"},
        "checkpoints": {"interval": 20, "last": 3},
    }


def learner(dataset: Dataset, **laac: Any) -> LaacLearner:
    """A learner alone, in this process."""
    job = LaacJob.model_validate(content(dataset, **laac))
    sessions = Sessions(dataset, job.data)
    given, _ = random_answers(sessions, job.laac.reference).of(sessions.transitions.event_N)
    items, weights, _ = weighted(given, ITEMS, job.laac.reference.weighting)
    weights[0] = 0
    table = TransitionTable.of(sessions, sessions.transitions, items, weights, history=4)
    shape = LaacShape(n_items=ITEMS, width=8, history=4, encoder=job.laac.encoder)
    novel = np.arange(ITEMS) % 2 == 0
    return LaacLearner(job.laac, shape, table, seed=0, novel_I=novel, unit_ID=np.eye(ITEMS, dtype=np.float32))


SWITCHES: list[dict[str, Any]] = [
    {"encoder": "gru", "grounding": "hinge"},
    {"shared_encoder": True, "grounding": "per_action", "entropy": 0.1},
    {"backup": "residual_0.5_0.5", "normalized_sum": True, "alpha": 3.0, "warmstart_steps": 2},
    {"chunk": 7, "norm_limit": None},
    {"method": "bc"},
    {"method": "sqn", "discount": 0.5},
    {"method": "smorl", "discount": 0.5, "chunk": 5},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda one: "-".join(map(str, one)))
def test_every_method_and_switch_trains(dataset: Dataset, switches: dict[str, Any]) -> None:
    one = learner(dataset, **switches)
    first = one.run(3)
    later = one.run(22)
    assert one.step == 25
    assert np.isfinite([*first.values(), *later.values()]).all()
    assert 0.8 < later["referenced"] < 1.0
    falls = "nll" if switches.get("method") else "td"
    assert later[falls] < first[falls]
    for player in one._players.values():
        assert player.finite()
    one.close()


def test_the_chunk_of_items_does_not_change_a_step(dataset: Dataset) -> None:
    weights = []
    for chunk in (5, 1000):
        one = learner(dataset, chunk=chunk)
        one.run(5)
        weights.append(one.weights("actor"))
        one.close()
    for name, value in weights[0].items():
        np.testing.assert_allclose(value, weights[1][name], rtol=1e-3, atol=1e-5)


def test_the_policy_learns_what_is_rewarded(dataset: Dataset) -> None:
    """Half of the items are rated 5: the policy prefers them, and cloning, which sees no reward, does not."""
    good_I = np.array([int(key[1:]) < ITEMS // 2 for key in dataset.items()["item_key"].to_pylist()])
    preferred = {}
    for method, player in (("laac", "actor"), ("bc", "supervised")):
        one = learner(dataset, method=method, lr_actor=0.002, beta=10.0, discount=0.5, target_rate=0.1)
        one.run(150)
        network = ItemNetwork(one_shape())
        own = {n.removeprefix("network."): v for n, v in one.weights(player).items() if n.startswith("network.")}
        network.load_state_dict({name: torch.from_numpy(value) for name, value in own.items()})
        with torch.no_grad():
            policy_NI = (network.state(torch.from_numpy(one._table.history_NH).long()) @ network.item_ND.T).softmax(1)
        preferred[method] = float(policy_NI[:, torch.from_numpy(good_I)].sum(1).mean())
        one.close()
    assert preferred["laac"] > 0.9
    assert preferred["bc"] < 0.8


def one_shape() -> LaacShape:
    """Of `learner`."""
    return LaacShape(n_items=ITEMS, width=8, history=4)


def test_a_continued_run_is_the_run_that_was_not(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "laac.yaml", content(dataset))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(["train", str(recipe), "--run-dir", str(whole)]) == 0
    for steps in ("20", "40"):
        assert run(["train", str(recipe), "--run-dir", str(parts), "--limits.max_steps", steps]) == 0

    def reproducible(folder: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in read_steps(folder)]

    assert reproducible(parts) == reproducible(whole)
    assert [line["step"] for line in read_steps(whole)] == [20, 40]
    for name in ("ranker", "critic"):
        digests = [json.loads((folder / name / "ranker.json").read_text())["digest"] for folder in (whole, parts)]
        assert digests[0] == digests[1]
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["steps"], summary["ended_by"], summary["interrupted"]) == (40, "max_steps", False)
    assert summary["selection"]["best_step"] in (20, 40)
    assert summary["reference"]["states"] == summary["sessions"]["transitions"]
    stage = summary["stages"]["laac"]
    assert {"recall@5", "ndcg@5", "reward@5", "repetition@5", "coverage@5", "ild@5"} <= set(stage)
    assert stage["invalid"]["constrained"] == 0
    page = render(whole)
    for words in ("NDCG while training", "Terms of the critics", "Values of the first critic", "repetition@5"):
        assert words in page
    # What the run measured on the test rows is what `windlass eval` measures.
    answer = tmp_path / "answer.json"
    capsys.readouterr()
    asked = ["--data", str(dataset.path), "--k", "1", "5", "10", "--json", str(answer)]
    assert run(["eval", str(whole), *asked]) == 0
    found = json.loads(answer.read_text())
    assert found["metrics"] == {k: v for k, v in stage.items() if k in found["metrics"]}
    assert {k: v for k, v in found["metrics"].items() if "recall" in k}
    assert (found["n"], found["ci95"]) == (stage["n"], stage["ci95"])
    assert run(["eval", str(whole / "checkpoints" / "step-000020"), *asked]) == 0
    assert run(["eval", str(whole), *asked, "--split", "train"]) == 2
    assert "did not learn" in capsys.readouterr().err
    assert run(["train", str(recipe), "--run-dir", str(whole), "--laac.alpha", "3"]) == 2
    check_rankers(whole)


def check_rankers(folder: Path) -> None:
    """Policy and critics score through the reward service's calls, and all at once as item by item."""
    histories = [np.array([3, 1], np.int32), np.array([], np.int32), np.arange(9, dtype=np.int32)]
    candidates = [np.array([0, 5, 23], np.int32)] * 3
    for name in ("ranker", "critic"):
        ranker = load_ranker(folder / name)
        assert isinstance(ranker, CatalogueRanker)
        assert isinstance(ranker, LaacRanker)
        assert len(ranker.scoring) == (1 if name == "ranker" else 2)
        found = score_batch(ranker, histories, candidates, chunk=2)
        assert not any(found.failure_N)
        every = ranker.score_catalogue(histories)
        for row, items in enumerate(candidates):
            np.testing.assert_allclose(found.scores[row], every[row, items], rtol=1e-5, atol=1e-5)


def test_critics_that_diverge_end_the_run(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = {"norm_limit": None, "alpha": 0.0, "beta": 0.0, "lr_critic": 0.02, "discount": 0.5, "divergence": 20.0}
    often = {"limits": {"max_steps": 400}, "checkpoints": {"interval": 40, "last": 2}, "evaluation": {"rows": 10}}
    recipe = write_recipe(tmp_path / "laac.yaml", {**content(dataset, **free), **often})
    folder = tmp_path / "run"
    assert run(["train", str(recipe), "--run-dir", str(folder)]) == 1
    told = capsys.readouterr().err
    steps = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert "the critics diverged in step" in told
    assert "gap grew from" in told or "td grew from" in told or "grounding grew from" in told
    assert f"the last good checkpoint is {folder / 'checkpoints' / steps[-1]}" in told
    assert not (folder / "summary.json").exists()
    assert (folder / DIVERGED).read_text().strip() in told


def test_a_cache_is_read_only_where_it_was_asked_alike(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "reference.parquet"
    job = LaacJob.model_validate(content(dataset, reference={"cache": str(path)}))
    sessions = Sessions(dataset, job.data)
    answers = random_answers(sessions, job.laac.reference)
    answers.write(path)
    asked = description(sessions, job.laac.reference, None)
    found = ReferenceAnswers.read(path, asked)
    assert found.item_MR.tolist() == answers.item_MR.tolist()
    seen = set(sessions.item_E[: sessions.transitions.event_N[0]].tolist())
    assert not seen & set(found.of(sessions.transitions.event_N[:1])[0].ravel().tolist())
    for changes, where in (({"answers": 2}, "answers"), ({"candidates": 5}, "candidates")):
        other = job.laac.reference.model_copy(update=changes)
        with pytest.raises(RequestError, match=f"{where}: "):
            ReferenceAnswers.read(path, description(sessions, other, None))
    alone = LaacJob.model_validate(
        content(dataset, method="reference", reference={"cache": str(tmp_path / "train.parquet"), "test_rows": False})
    )
    with pytest.raises(RequestError, match=r"test rows were not asked; legal: .*test_rows true"):
        LaacRun(alone, tmp_path / "alone", lambda step, metrics: None).run(lambda: False)
    empty = ReferenceAnswers(
        event_M=answers.event_M, user_M=answers.user_M, item_MR=np.full_like(answers.item_MR, -1), asked=asked
    )
    empty.write(path)
    with pytest.raises(RequestError, match="no answer of"):
        LaacRun(job, tmp_path / "run", lambda step, metrics: None).run(lambda: False)
    path.write_bytes(b"no parquet")
    with pytest.raises(RequestError, match="cannot be read"):
        ReferenceAnswers.read(path, asked)


def test_weights_are_of_valid_distinct_answers() -> None:
    given = np.array([[3, 3, 5], [9, -1, -1], [-1, -1, -1], [2, 9, 4]], np.int32)
    items, weights, counts = weighted(given, 6, Weighting.UNIFORM)
    assert weights.tolist() == [[0.5, 0, 0.5], [0, 0, 0], [0, 0, 0], [0.5, 0, 0.5]]
    assert items[0].tolist() == [3, 0, 5]
    assert counts == {"states": 2, "unknown": 2, "repeated": 1}
    _, ranked, _ = weighted(given, 6, Weighting.RANK)
    assert ranked[3].tolist() == pytest.approx([2 / 3, 0, 1 / 3])


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        (["--laac.batch", "33", "--laac.ranks", "2"], "laac"),
        (["--laac.method", "bc", "--laac.shared_encoder", "true"], "laac"),
        (["--limits.max_epochs", "3"], "limits.max_epochs"),
        (["--laac.reference.kind", "llm"], "laac.reference.model"),
        (["--data.skew_attribute", "gender", "--data.skew_value", "M"], "data.user_attributes"),
        (["--data.rating_scale", "[1, 4]"], "rating: 5 of user"),
        (["--data.users", "1000"], "data.users"),
        (["--data.split", "[9, 0, 1]"], "data.split"),
    ],
)
def test_bad_requests_are_one_line(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], where: str
) -> None:
    recipe = write_recipe(tmp_path / "laac.yaml", content(dataset))
    assert run(["train", str(recipe), "--run-dir", str(tmp_path / "run"), *changes]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith(f"windlass: {where}")


def test_settings_make_a_learner_like_the_others() -> None:
    own = LaacSettings(ranks=2, batch=64).learner()
    assert (own.ranks, own.zero_stage, own.grad_clip) == (2, 0, 0.0)


def test_a_submission_knows_what_a_job_needs(dataset: Dataset) -> None:
    one = LaacJob.model_validate(content(dataset))
    many = LaacJob.model_validate(content(dataset, ranks=4))
    asking = LaacJob.model_validate(content(dataset, ranks=2, reference={"kind": "llm", "model": "runs/sft"}))
    assert job_needs(one, on_gpus=True) == {"gpus": 0.0, "cpus": 0.0}
    assert job_needs(many, on_gpus=True) == {"gpus": 4.0, "cpus": 4.0}
    assert job_needs(asking, on_gpus=False) == {"gpus": 0.0, "cpus": 2.0}


def test_a_baseline_asks_no_reference(dataset: Dataset, tmp_path: Path) -> None:
    job = LaacJob.model_validate(content(dataset, method="sqn", reference={"kind": "llm"}))
    check_paths(job)
    assert not needs_cluster(job, tmp_path)
    _, weights, counts, answers = LaacRun(job, tmp_path, lambda step, metrics: None).reference()
    assert (float(weights.max()), counts, answers) == (0.0, {}, None)
    asking = LaacJob.model_validate(content(dataset, reference={"kind": "llm", "model": "runs/sft"}))
    assert needs_cluster(asking, tmp_path)


def test_the_state_of_others_is_not_continued(dataset: Dataset, tmp_path: Path) -> None:
    made = LaacRun(LaacJob.model_validate(content(dataset)), tmp_path, lambda step, metrics: None)
    with made.store.writing(20, made.facts, metric=None, score=None) as folder:
        (folder / "state").mkdir()
        (folder / "state" / "rank-0.safetensors").write_text("weights")
    (made.store.path(20) / "state" / "rank-0.safetensors").chmod(0o666)
    group: Any = None
    with pytest.raises(RequestError, match=r"rank-0\.safetensors: may be written by everyone"):
        made._train(group, lambda: True)
