"""Contract of `trainer.list_settings` and `trainer.list_data`: training needs, the critic's and the policy's users are
apart, training sees its share and evaluation everything, samples are the same for all needs, and what does not fit is
refused by name.

Not checked: the prompts themselves (tests/data/test_ranking_prompts.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from data.catalogue import Catalogue
from data.dataset import Dataset
from data.errors import RequestError
from data.settings_data import PromptSettings
from reward.popularity import PopularityRanker
from tests.small_world import write_dataset
from trainer.list_data import ListData, PreparedPrompts, list_catalogue
from trainer.list_settings import ListSettings
from trainer.prompt_card import PromptCard

NEEDS: list[dict[str, Any]] = [{"name": "interest"}, {"name": "trend"}, {"name": "niche"}]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("list-data") / "source")


def settings(**changes: Any) -> ListSettings:
    return ListSettings.model_validate({"needs": NEEDS, "candidates": 12, "positives": 3, **changes})


def opened(dataset: Dataset, **changes: Any) -> ListData:
    lists = settings(**changes)
    data = PromptSettings(dataset=dataset.path, history=6, max_prompt_tokens=128)
    return ListData.open(dataset, list_catalogue(Catalogue.build(dataset, "default"), lists), lists, data)


def test_the_words_of_all_needs_are_in_the_catalogue(dataset: Dataset) -> None:
    catalogue = Catalogue.build(dataset, "default")
    with_words = list_catalogue(catalogue, settings(held_out="niche", train_needs=["interest"]))
    assert with_words.vocabulary.further_words[-3:] == ("<need:interest>", "<need:trend>", "<need:niche>")
    assert list_catalogue(catalogue, ListSettings()).digest == catalogue.digest


def test_training_takes_every_sample_for_every_need_it_trains(dataset: Dataset) -> None:
    batch = opened(dataset, held_out="niche").training()
    by_need = {need: [p.prompt_id // 3 for p in batch.prompts if p.need == need] for need in ("interest", "trend")}
    assert {prompt.need for prompt in batch.prompts} == {"interest", "trend"}
    assert len(by_need["interest"]) > 100
    assert set(by_need["trend"]) <= set(by_need["interest"])
    one = opened(dataset, train_needs=["trend"]).training()
    assert {prompt.need for prompt in one.prompts} == {"trend"}
    assert all(prompt.observed_C is not None and prompt.observed_C.all() for prompt in batch.prompts)


def test_training_sees_a_share_and_evaluation_everything(dataset: Dataset) -> None:
    data = opened(dataset, feedback=0.25)
    seen = np.concatenate([prompt.observed_C for prompt in data.training().prompts])
    assert seen.mean() == pytest.approx(0.25, abs=0.05)
    whole = opened(dataset).evaluation("valid", "interest", 0, 0).prompts
    again = data.evaluation("valid", "interest", 0, 0).prompts
    assert [p.gain_C.tolist() for p in again if p.gain_C is not None] == [
        p.gain_C.tolist() for p in whole if p.gain_C is not None
    ]


def test_the_critic_and_the_policy_share_no_user(dataset: Dataset) -> None:
    data = opened(dataset, critic_users=0.3)
    policy = {prompt.user_id for prompt in data.training().prompts}
    critic = {prompt.user_id for prompt in data.training(critic=True).prompts}
    everybody = {prompt.user_id for prompt in opened(dataset).training().prompts}
    assert not policy & critic
    assert policy | critic == everybody
    assert len(critic) == pytest.approx(0.3 * len(everybody), abs=1)
    with pytest.raises(RequestError, match=r"lists\.critic_users: 0\.0; legal: a share that leaves users of a critic"):
        opened(dataset).training(critic=True)


def test_the_latest_rows_are_the_last_samples(dataset: Dataset) -> None:
    data = opened(dataset, train_needs=["interest"])
    every = [prompt.prompt_id for prompt in data.training().prompts]
    latest = [prompt.prompt_id for prompt in data.training(latest_rows=20).prompts]
    assert latest == every[-len(latest) :]
    assert 0 < len(latest) <= 20


def test_evaluation_samples_are_seeded_and_the_same_for_all_needs(dataset: Dataset) -> None:
    data = opened(dataset)
    first = [p.prompt_id // 3 for p in data.evaluation("valid", "interest", 10, 4).prompts]
    assert [p.prompt_id // 3 for p in data.evaluation("valid", "interest", 10, 4).prompts] == first
    assert set(p.prompt_id // 3 for p in data.evaluation("valid", "niche", 10, 4).prompts) == set(first)
    assert len(first) == 10


def test_a_ranker_retrieves_the_other_candidates(dataset: Dataset, tmp_path: Path) -> None:
    PopularityRanker(dataset.train_counts()).save(tmp_path / "ranker")
    data = opened(dataset, source="retrieved", retriever=str(tmp_path / "ranker"))
    prompt = data.evaluation("valid", "interest", 0, 0).prompts[0]
    count_I = dataset.train_counts()
    assert prompt.candidates is not None
    assert prompt.observed_C is not None
    others = prompt.candidates[~prompt.observed_C]
    left = np.setdiff1d(np.arange(dataset.n_items), prompt.candidates)
    seen = dataset.events.item_E[dataset.events.user_E == prompt.user_id]
    assert count_I[others].min() >= count_I[np.setdiff1d(left, seen)].max()


def test_prepared_prompts_are_taken_as_they_are(dataset: Dataset) -> None:
    prompts = opened(dataset).training().prompts
    prepared = PreparedPrompts(prompts=prompts)
    assert prepared.build(prepared, np.array([5, 2])).prompts == [prompts[5], prompts[2]]
    assert len(prepared) == len(prompts)


def test_the_card_beside_a_model_says_which_lists_it_ranks(tmp_path: Path) -> None:
    lists = settings(held_out="niche", feedback=0.1)
    data = PromptSettings(dataset=tmp_path, history=6, max_prompt_tokens=64)
    PromptCard.of(data, lists).write(tmp_path)
    assert PromptCard.read(tmp_path).lists == lists
    PromptCard.of(data).write(tmp_path)
    assert not PromptCard.read(tmp_path).lists.on


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_needs": ["niche"], "held_out": "niche"}, "train_needs has niche; legal: different ones of interest"),
        ({"train_needs": ["what"]}, "train_needs has what; legal: different ones of interest, trend, niche"),
        ({"needs": [], "train_needs": ["what"]}, "legal: different ones of none: there are no needs"),
        ({"length": 13}, "length is 13; legal: 0 .all. to candidates, 12"),
        ({"source": "retrieved"}, "retriever is None with source retrieved; legal: a ranker artefact"),
        ({"feedback": 0.0}, "feedback"),
        ({"critic_users": 1.0}, "critic_users"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        settings(**changes)


def test_more_candidates_than_items_are_refused(dataset: Dataset) -> None:
    with pytest.raises(RequestError, match=r"lists\.candidates: 60; legal: at most 48, the different items"):
        opened(dataset, candidates=60)


def test_sets_that_the_catalogue_cannot_fill_leave_no_prompt(dataset: Dataset) -> None:
    # Users have seen some of the 48 items, so no set of 48 others is left.
    data = opened(dataset, candidates=48)
    with pytest.raises(RequestError, match=r"lists: no prompt is left \(\d+ .*few items\); legal: fewer lists"):
        data.evaluation("valid", "interest", 0, 0)


def test_needs_are_asked_for() -> None:
    with pytest.raises(RequestError, match=r"lists\.needs: none; legal: at least one need"):
        ListSettings().loaded_needs()
