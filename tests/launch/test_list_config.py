"""Contract: what is wrong with the section `lists` is told in one line by its full name, overrides reach it, and a
critic that was trained on a policy's users, or does not know its needs, is refused before anything starts.

Not checked: what else a job of lists refuses (tests/trainer/test_list_checks.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from data.errors import RequestError
from launch.config import check_ranker_data, load_job
from reward.critic import Critic, CriticRanker, CriticShape
from tests.small_world import ITEMS, write_dataset
from trainer.jobs import RlJob


@pytest.mark.parametrize(
    ("arguments", "where", "why"),
    [
        (["--lists.length", "31"], "lists", "length is 31"),
        (["--lists.train_needs", "[discover]"], "lists", "different ones of interest, explore, trend, niche"),
        (["--lists.feedback", "0"], "lists.feedback", "above 0"),
        (["--lists.held_out", "nothing"], "lists", "held_out nothing is not one of several needs"),
        (["--lists.needs", "[{name: interest, words: [a]}]", "--lists.held_out", ""], "lists.needs.0.words", "unknown"),
        (["--lists.need", "interest"], "lists.need", "lists.needs"),
        (
            ["--lists.needs", "[]", "--lists.held_out", "", "--lists.train_needs", "[]"],
            "reward.item_match",
            "other than 0",
        ),
    ],
)
def test_what_is_wrong_is_told_by_its_name(arguments: list[str], where: str, why: str) -> None:
    with pytest.raises(RequestError) as error:
        load_job("flexrec", arguments)
    assert error.value.where == where
    assert why in str(error.value)


def test_overrides_reach_the_section() -> None:
    job = load_job("flexrec", ["--lists.feedback", "0.1", "--lists.candidates", "20", "--evaluation.k", "[1, 5]"])
    assert isinstance(job, RlJob)
    assert (job.lists.feedback, job.lists.candidates, job.lists.trained()) == (0.1, 20, ("interest",))


@pytest.mark.parametrize(
    ("needs", "seed", "why"),
    [
        (("interest", "explore", "trend"), 1, "a critic of interest, explore, trend, niche"),
        (("interest", "explore", "trend", "niche"), 2, "the policy trains on none of its users"),
        (("interest", "explore", "trend", "niche"), 1, ""),
    ],
)
def test_a_critic_that_does_not_belong_to_the_policy_is_refused(
    tmp_path: Path, needs: tuple[str, ...], seed: int, why: str
) -> None:
    dataset = write_dataset(tmp_path / "source")
    shape = CriticShape(n_items=ITEMS, needs=needs, width=4, hidden=8, history=6)
    told = {"dataset": dataset.fingerprint, "lists": {"critic_users": 0.25, "seed": seed}}
    CriticRanker(Critic(shape)).save(tmp_path / "critic", told)
    arguments = ["--reward.ranker", str(tmp_path / "critic"), "--data.dataset", str(dataset.path)]
    job = load_job("flexrec-mean", arguments)
    assert isinstance(job, RlJob)
    if not why:
        check_ranker_data(job)
        return
    with pytest.raises(RequestError, match=why):
        check_ranker_data(job)
