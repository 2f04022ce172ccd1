"""Contract of `critic` jobs: the critic learns from the observed outcomes of its own users alone, is saved as a ranker
that answers for each need, is not trained twice, leaves nothing when interrupted, and may reward only a policy that
trains on other users and on needs it knows. Bad settings and gains are one line of the command.

Not checked: that training finds means and variances (test_critic_training.py), and what they do to a policy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.dataset import Dataset
from data.errors import RequestError
from launch.cli import run
from launch.report import render
from reward.artefact import RankerArtefact
from reward.batch_scoring import score_batch
from reward.critic import CriticRanker
from reward.ranker import load_ranker
from tests.small_world import write_dataset, write_recipe
from trainer.critic_job import check_critic, observed_gains, run_critic
from trainer.jobs import CriticJob
from trainer.list_settings import ListSettings

NEEDS = [{"name": "interest"}, {"name": "trend"}, {"name": "niche"}]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("critic") / "source")


def content(dataset: Dataset, **lists: Any) -> dict[str, Any]:
    return {
        "job": "critic",
        "data": {"dataset": str(dataset.path), "history": 6, "max_prompt_tokens": 64},
        "lists": {
            "needs": NEEDS,
            "held_out": "niche",
            "candidates": 12,
            "positives": 3,
            "critic_users": 0.5,
            **lists,
        },
        "critic": {"width": 4, "hidden": 8, "networks": 2, "epochs": 3, "threads": 1},
    }


def job(dataset: Dataset, **lists: Any) -> CriticJob:
    return CriticJob.model_validate(content(dataset, **lists))


def test_the_command_trains_it_and_its_report_shows_the_calibration(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "critic.yaml", content(dataset))
    folder = tmp_path / "run"
    assert run(["train", str(recipe), "--run-dir", str(folder)]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["job"], summary["interrupted"], summary["epochs"]) == ("critic", False, 3)
    assert set(summary["calibration"]["needs"]) == {"interest", "trend"}
    assert 0 < summary["calibration"]["expected_calibration_error"] < 0.5
    gains = summary["gains"]
    assert 0 < gains["above_zero"] < gains["observed"] == 12 * gains["prompts"]
    assert gains["users"] <= 30
    page = render(folder)
    for words in ("Calibration: share of gains below", "Reliability: predicted deviation", "validation/loss"):
        assert words in page
    assert "calibration/expected calibration error" in page
    assert "share below" not in page.partition("<h2>Summary")[2]
    loaded = load_ranker(folder / "ranker")
    assert isinstance(loaded, CriticRanker)
    assert loaded.needs == ("interest", "trend")
    histories = [np.array([1, 2], np.int32)] * 2
    found = score_batch(loaded, histories, [np.arange(5, dtype=np.int32)] * 2, chunk=2, needs=["interest", "trend"])
    assert found.variances is not None
    assert min(row.min() for row in found.variances) > 0
    assert not np.allclose(found.scores[0], found.scores[1])
    # A second start finds it done: the same summary, and no step twice.
    before = (folder / "metrics.jsonl").read_text()
    assert run(["train", str(recipe), "--run-dir", str(folder)]) == 0
    again = json.loads((folder / "summary.json").read_text())
    assert {name: again[name] for name in ("digest", "calibration", "gains")} == {
        name: summary[name] for name in ("digest", "calibration", "gains")
    }
    assert (folder / "metrics.jsonl").read_text() == before
    capsys.readouterr()
    assert run(["train", str(recipe), "--run-dir", str(folder), "--critic.networks", "1"]) == 2
    assert "critic.networks" in capsys.readouterr().err


def test_it_learns_from_observed_outcomes_of_its_own_users(dataset: Dataset) -> None:
    from data.catalogue import Catalogue
    from trainer.list_data import ListData, list_catalogue

    lists = job(dataset, feedback=0.5).lists
    catalogue = list_catalogue(Catalogue.build(dataset, "default"), lists)
    data = ListData.open(dataset, catalogue, lists, job(dataset).data)
    prompts = data.training(critic=True).prompts
    gains = observed_gains(prompts, lists.trained())
    wanted = [
        (prompt.user_id, int(item), lists.trained().index(prompt.need), float(gain))
        for prompt in prompts
        for item, gain, seen in zip(prompt.candidates, prompt.gain_C, prompt.observed_C, strict=True)  # type: ignore
        if seen
    ]
    found = zip(gains.user_N, gains.item_N, gains.need_N, gains.gain_N, strict=True)
    assert [(int(u), int(i), int(n), float(g)) for u, i, n, g in found] == wanted
    assert (gains.gain_N == 0).any()
    own = set(gains.user_N.tolist())
    assert own
    assert not own & {prompt.user_id for prompt in data.training().prompts}
    first = prompts[0]
    assert gains.histories[0].tolist() == first.history.tolist()


def test_an_interrupted_job_leaves_no_artefact_and_starts_again(dataset: Dataset, tmp_path: Path) -> None:
    epochs: list[int] = []
    stopped = run_critic(
        job(dataset),
        tmp_path / "a",
        log=lambda epoch, metrics: epochs.append(epoch),
        interrupted=lambda: len(epochs) == 2,
    )
    assert (stopped.digest, dict(stopped.facts), epochs) == ("", {}, [1, 2])
    assert not (tmp_path / "a").exists()
    done = run_critic(job(dataset), tmp_path / "a")
    assert done.digest == run_critic(job(dataset), tmp_path / "b").digest != ""
    with pytest.raises(RequestError, match="of another job or dataset"):
        run_critic(job(dataset, seed=4), tmp_path / "a")


def test_a_policy_may_not_train_on_its_users_nor_on_needs_it_does_not_know(dataset: Dataset, tmp_path: Path) -> None:
    run_critic(job(dataset), tmp_path)
    artefact = RankerArtefact.open(tmp_path)
    same = job(dataset).lists
    check_critic(artefact, same)
    check_critic(artefact, same.model_copy(update={"feedback": 0.1}))
    for name, value in (("critic_users", 0.25), ("seed", 7)):
        with pytest.raises(RequestError, match=f"lists.{name}.*the policy trains on none of its users"):
            check_critic(artefact, same.model_copy(update={name: value}))
    with pytest.raises(RequestError, match=r"reward\.ranker.*a critic of interest, trend, niche"):
        check_critic(artefact, same.model_copy(update={"held_out": ""}))


def test_a_critic_needs_users_of_its_own(dataset: Dataset) -> None:
    with pytest.raises(RequestError, match=r"lists\.critic_users.*a share above 0"):
        job(dataset, critic_users=0.0)
    with pytest.raises(RequestError, match=r"lists\.needs"):
        CriticJob.model_validate(content(dataset) | {"lists": ListSettings(critic_users=0.5).model_dump()})


def unmeasurable(rows: Any, facts: Any) -> np.ndarray:
    """Gains of a user's need that are no numbers."""
    return np.full(len(rows.item_N), np.nan)


def absent(rows: Any, facts: Any) -> np.ndarray:
    """A need that nobody's next events have a gain for."""
    return np.zeros(len(rows.item_N))


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        ({"needs": [{"name": "odd", "gain": f"{__name__}:unmeasurable"}], "held_out": ""}, "need odd: gain nan"),
        ({"needs": [{"name": "none", "gain": f"{__name__}:absent"}], "held_out": ""}, "need none"),
        ({"candidates": 3}, "leave no room"),
        ({"candidates": 600}, "lists.candidates"),
        ({"critic_users": 0.0}, "lists.critic_users"),
        ({"critic_users": 0.01}, "users"),
        ({"feedback": 0.0}, "lists.feedback"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(
    dataset: Dataset, lists: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "critic.yaml", content(dataset, **lists))
    assert run(["train", str(recipe), "--run-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("windlass: ")
    assert words in said
