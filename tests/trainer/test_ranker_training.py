"""Contract: windows cover every target once and read nothing behind it; SASRec learns a pattern that popularity cannot;
equal seeds give equal bits, and so does a job that was stopped between two epochs and continued; test events leave no
trace; finished and foreign folders; limits and early stopping; a loss that is not finite stops before the step.

Not checked here: figures on MovieLens-100K (the long test does, on the validation split).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dataset import Dataset
from data.errors import RequestError, RunError
from reward.ranker import load_ranker
from tests.data.tiny import import_events, sequences
from tests.requirements import require
from trainer.jobs import RankerJob
from trainer.ranker_training import STATE, TrainedRanker, resumed_step, train_ranker, validate
from trainer.sasrec_training import NO_TARGET, SASRecTraining, cut_windows

ITEMS = 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Users walk round a ring of items in steps of one, from anywhere: only the last item tells the next."""
    random = np.random.default_rng(0)
    events = []
    for user in range(60):
        position = int(random.integers(ITEMS))
        for time in range(20):
            events.append((user, f"item{(position + time) % ITEMS:02d}", 1000 * time + user))
    return import_events(tmp_path_factory.mktemp("ring"), events)


def job(**changes: Any) -> RankerJob:
    given: dict[str, Any] = {
        "seed": 3,
        "limits": {"max_epochs": 6},
        "data": {"dataset": "ring", "history": 8, "exclude_seen": False},
        "evaluation": {"rows": 50, "k": [1, 5], "metric": "ndcg@5"},
        "ranker": {"kind": "sasrec", "sasrec": {"width": 32, "layers": 1, "lr": 0.01, "window": 6, "threads": 1}},
    }
    given["ranker"]["sasrec"] |= {"batch_rows": 16, "warmup_steps": 5} | changes.pop("sasrec", {})
    return RankerJob.model_validate(given | changes)


def weights(folder: Path) -> bytes:
    return (folder / "weights.safetensors").read_bytes()


def test_learns_what_popularity_cannot(dataset: Dataset, tmp_path: Path) -> None:
    log: list[tuple[int, dict[str, float]]] = []
    trained = train_ranker(job(), dataset, tmp_path / "sasrec", log=lambda step, values: log.append((step, values)))
    popularity = train_ranker(job(ranker={"kind": "popularity"}), dataset, tmp_path / "popularity")
    cooccurrence = train_ranker(job(ranker={"kind": "cooccurrence"}), dataset, tmp_path / "cooccurrence")
    assert trained.value is not None
    assert popularity.value is not None
    assert cooccurrence.value is not None
    assert trained.value > 0.95
    assert popularity.value < cooccurrence.value
    assert trained.stopped == "max_epochs"
    steps = [step for step, _ in log]
    assert steps == list(range(1, len(steps) + 1))
    assert log[-1][1]["loss"] < log[0][1]["loss"] / 3
    again = load_ranker(tmp_path / "sasrec")
    assert validate(again, job(), dataset)["ndcg@5"] == trained.value  # type: ignore[arg-type]
    assert resumed_step(tmp_path / "sasrec") == steps[-1]


def test_equal_seeds_give_equal_bits_and_so_does_a_continued_job(dataset: Dataset, tmp_path: Path) -> None:
    whole = train_ranker(job(), dataset, tmp_path / "whole")
    train_ranker(job(), dataset, tmp_path / "again")
    train_ranker(job(seed=4), dataset, tmp_path / "other")
    assert weights(tmp_path / "whole") == weights(tmp_path / "again")
    assert weights(tmp_path / "whole") != weights(tmp_path / "other")

    steps: list[int] = []
    folder = tmp_path / "continued"
    half = train_ranker(
        job(), dataset, folder, log=lambda step, _: steps.append(step), interrupted=lambda: len(steps) > 40
    )
    assert half.stopped == "interrupted"
    assert not (folder / "ranker.json").exists()
    begin = resumed_step(folder)
    assert begin is not None
    assert 0 < begin <= len(steps)
    torch.manual_seed(999)
    continued = train_ranker(job(), dataset, folder, log=lambda step, _: steps.append(step))
    assert weights(folder) == weights(tmp_path / "whole")
    assert (continued.value, continued.step) == (whole.value, whole.step)
    assert not (folder / STATE).exists()


def test_training_leaves_the_global_random_state_and_threads_alone(dataset: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train_ranker(job(limits={"max_steps": 3}), dataset, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_finished_folder_is_returned_and_a_foreign_one_refused(dataset: Dataset, tmp_path: Path) -> None:
    first = train_ranker(job(limits={"max_steps": 3}), dataset, tmp_path)
    second = train_ranker(job(limits={"max_steps": 3}), dataset, tmp_path)
    assert dataclasses.replace(second, ranker=first.ranker) == first
    with pytest.raises(RequestError, match="of another job or dataset"):
        train_ranker(job(limits={"max_steps": 4}), dataset, tmp_path)


def test_a_state_of_another_job_or_a_damaged_one_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    steps: list[int] = []
    train_ranker(job(), dataset, tmp_path, log=lambda step, _: steps.append(step), interrupted=lambda: len(steps) > 40)
    with pytest.raises(RequestError, match="of another job or dataset"):
        train_ranker(job(seed=9), dataset, tmp_path)
    (tmp_path / STATE).write_bytes(b"\0" * 100)
    with pytest.raises(RequestError, match="not safetensors"):
        train_ranker(job(), dataset, tmp_path)


def test_limits_and_early_stopping(dataset: Dataset, tmp_path: Path) -> None:
    def ended(name: str, **changes: Any) -> TrainedRanker:
        return train_ranker(job(**changes), dataset, tmp_path / name)

    assert ended("none", limits={"max_steps": 0}).step == 0
    assert ended("steps", limits={"max_steps": 2}).stopped == "max_steps"
    assert ended("hours", limits={"max_hours": 1e-9}).stopped == "max_hours"
    stopping = {"patience": 2, "min_improvement": 0.5}
    stopped = ended("early", limits={"max_epochs": 50}, early_stopping=stopping)
    assert stopped.stopped == "early_stopping"


def test_a_loss_that_is_not_finite_stops_before_the_step(dataset: Dataset) -> None:
    training = SASRecTraining(dataset.sequences("train"), ITEMS, job().ranker.sasrec, history=8, seed=0)
    with torch.no_grad():
        training.network.bias[0] = torch.nan
    before = training.network.item.weight.clone()
    with pytest.raises(RunError, match="step 1: loss nan"):
        next(training.epoch(planned_epochs=1, planned_steps=np.inf))
    assert torch.equal(training.network.item.weight, before)
    assert training.step == 0


ROWS = st.lists(st.tuples(st.integers(2, 40), st.integers(1, 8)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_windows_cover_every_target_once(rows: list[tuple[int, int]], window: int, history: int, seed: int) -> None:
    events = [list(range(100 * i, 100 * i + length)) for i, (length, _) in enumerate(rows)]
    loss_from = [min(first, length - 1) for length, first in rows]
    given_sequences = sequences(events, loss_from)
    training = SASRecTraining(
        given_sequences, 1000, job(sasrec={"batch_rows": 3}).ranker.sasrec, history=history, seed=0
    )
    windows = cut_windows(given_sequences, min(window, history), history, np.random.default_rng(seed))
    found = []
    for w in range(len(windows)):
        token_BS, target_BS = training._batch(windows, np.array([w]))
        assert token_BS.shape[1] <= history + 1
        assert token_BS[0, 0] == training.network.start_token
        for position in range(token_BS.shape[1]):
            target = int(target_BS[0, position])
            if target == NO_TARGET:
                continue
            found.append(target)
            read = token_BS[0, 1 : position + 1].tolist()
            begins = 100 * (target // 100)
            assert read == list(range(target - len(read), target))
            assert target - len(read) >= begins
    wanted = [item for row, first in zip(events, loss_from, strict=True) for item in row[0 if first <= 1 else first :]]
    assert sorted(found) == wanted


@pytest.mark.long
def test_movielens_figures_on_the_validation_split(tmp_path: Path) -> None:
    require("movielens")
    path = Path("datasets/ml-100k")
    if not path.is_dir():
        pytest.skip("needs datasets/ml-100k (make demo imports it)")
    movielens = Dataset.open(path)
    common = {"data": {"dataset": str(path)}, "evaluation": {"rows": 3000}, "limits": {"max_epochs": 20}}
    values = {}
    for kind in ("popularity", "cooccurrence", "sasrec"):
        given = RankerJob.model_validate(common | {"ranker": {"kind": kind}})
        values[kind] = train_ranker(given, movielens, tmp_path / kind).value or 0.0
    assert values["cooccurrence"] > 2 * values["popularity"]
    # The counter is tuned on this split too and stands above SASRec; .094 is what stack.md measured for SASRec.
    assert values["sasrec"] > 0.094
