"""Contract of `trainer.list_evaluation`: values are those of the lists that come back, by need and over the trained
needs; lists that are not whole are counted and their missing items are misses; greedy lists are asked for; rows are
kept for paired comparisons.

Not checked: the metrics by value (tests/reward/test_list_metrics.py), the prompts (test_list_data.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from data.dataset import Dataset
from data.records import NO_ITEM, Decode, DecodeSpec, Groups, IntArray, Prompt
from reward.list_metrics import list_metrics
from tests.small_world import write_dataset
from tests.trainer.test_list_data import opened
from tests.trainer.test_list_rewards import groups_of
from trainer.list_evaluation import ListEvaluator


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("list-evaluation") / "source")


class Ranking:
    """A fake: ranks candidates by a rule."""

    def __init__(self, rule: Callable[[Prompt], list[int]]) -> None:
        self.rule = rule
        self.specs: list[DecodeSpec] = []
        self.prompts: list[Prompt] = []

    def generate(self, prompts: Sequence[Prompt], spec: DecodeSpec) -> Groups:
        self.specs.append(spec)
        self.prompts += prompts
        return groups_of([[self.rule(prompt)] for prompt in prompts])


def items(prompt: Prompt) -> IntArray:
    assert prompt.candidates is not None
    return prompt.candidates


def gains(prompt: Prompt) -> np.ndarray:
    assert prompt.gain_C is not None
    return prompt.gain_C.astype(np.float64)


def best(prompt: Prompt) -> list[int]:
    return items(prompt)[np.argsort(-gains(prompt), kind="stable")].tolist()


def as_given(prompt: Prompt) -> list[int]:
    return items(prompt).tolist()


def test_the_ideal_lists_have_an_ndcg_of_one_for_every_need(dataset: Dataset) -> None:
    evaluator = ListEvaluator(opened(dataset), split="valid", rows=10, ks=[1, 5, 12], batch=4, seed=3)
    ranking = Ranking(best)
    evaluation = evaluator.run(ranking)
    names = [f"ndcg@{k}{need}" for k in (1, 5, 12) for need in ("", "/interest", "/trend", "/niche")]
    assert [evaluation.items.values[name] for name in names] == pytest.approx([1.0] * 12)
    assert evaluation.items.values["recall@12"] == pytest.approx(1)
    assert evaluation.items.values["invalid@12"] == 0
    assert all(spec.decode is Decode.BEAM and spec.width == 1 and spec.lists is not None for spec in ranking.specs)
    assert [spec.lists.candidates for spec in ranking.specs if spec.lists] == [12] * len(ranking.specs)


def test_values_are_means_over_the_rows_of_a_need_and_over_the_trained_needs(dataset: Dataset) -> None:
    data = opened(dataset, held_out="niche")
    needs = ["interest", "trend", "niche"]
    evaluator = ListEvaluator(data, split="valid", rows=9, ks=[5], batch=64, seed=3, needs=needs)
    ranking = Ranking(as_given)
    evaluation = evaluator.run(ranking)
    by_need = {}
    for need in needs:
        mine = np.stack([gains(prompt) for prompt in ranking.prompts if prompt.need == need])
        by_need[need] = list_metrics(mine, mine, [5])["ndcg@5"].mean()
        assert evaluation.items.values[f"ndcg@5/{need}"] == pytest.approx(by_need[need])
    assert evaluation.items.values["ndcg@5"] == pytest.approx((by_need["interest"] + by_need["trend"]) / 2)
    rows = evaluation.row_metrics("test", split="valid", dataset="d")
    assert rows.sample_id_N.tolist() == sorted(prompt.prompt_id for prompt in ranking.prompts)
    one = ranking.prompts[7]
    place = rows.sample_id_N.tolist().index(one.prompt_id)
    own = gains(one)[None]
    assert rows.value_N["ndcg@5"][place] == pytest.approx(list_metrics(own, own, [5])["ndcg@5"].item())
    assert rows.user_id_N[place] == one.user_id


@pytest.mark.parametrize(
    "rule",
    [
        lambda prompt: best(prompt)[:4],
        lambda prompt: [best(prompt)[0], *best(prompt)[:-1]],
        lambda prompt: [*best(prompt)[:-1], int(np.setdiff1d(np.arange(48), items(prompt))[0])],
        lambda prompt: [*best(prompt)[:-1], NO_ITEM],
    ],
)
def test_lists_that_are_not_whole_are_counted(dataset: Dataset, rule: Callable[[Prompt], list[int]]) -> None:
    evaluator = ListEvaluator(opened(dataset), split="valid", rows=5, ks=[5, 12], batch=64, seed=3)
    evaluation = evaluator.run(Ranking(rule))
    assert evaluation.items.values["invalid@12"] == 1
    assert evaluation.items.values["hr@5"] == 1
    # An item that is there twice counts once.
    assert evaluation.items.values["recall@12"] <= 1
