"""Evaluation: lists from groups, per item and per path, and the invalid rates.

The generator is a fake that answers with lists chosen by the test, because no real policy can be told to make an
invalid item. Metrics themselves: tests/reward/test_metrics.py. Real engines: tests/trainer/test_loop.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from data.catalogue import Catalogue
from data.codes import Codes, OnCollision
from data.dataset import Samples
from data.prompts import PromptBuilder
from data.records import NO_ITEM, DecodeSpec, Finish, Groups, Prompt
from trainer.evaluation import Evaluator, sample_rows


@dataclass
class FakeDataset:
    """Four rows of one user each over five items."""

    targets: Sequence[int]
    counts: Sequence[int]

    def samples(self, split: str) -> Samples:
        assert split == "test"
        n = len(self.targets)
        return Samples(
            user_id_N=np.arange(n, dtype=np.int32),
            target_N=np.asarray(self.targets, dtype=np.int32),
            timestamp_N=np.arange(n, dtype=np.int64),
            sample_id_N=np.arange(n, dtype=np.int64),
            values=np.array([4], dtype=np.int32),
            start_N=np.zeros(n, dtype=np.int64),
            end_N=np.ones(n, dtype=np.int64),
        )

    def train_counts(self) -> np.ndarray:
        return np.asarray(self.counts)


@dataclass
class FakeGenerator:
    """Answers prompt i with `lists[i]`; `NO_ITEM` is an invalid output, missing entries are absent slots."""

    lists: Sequence[Sequence[int]]
    unconstrained: Sequence[Sequence[int]] = ()
    asked: list[DecodeSpec] = field(default_factory=list)

    def generate(self, prompts: Sequence[Prompt], spec: DecodeSpec) -> Groups:
        self.asked.append(spec)
        lists = self.lists if spec.constrained else self.unconstrained
        size = (len(prompts), spec.width)
        item, valid = np.full(size, NO_ITEM, dtype=np.int32), np.zeros(size, dtype=bool)
        for row, prompt in enumerate(prompts):
            chosen = lists[prompt.prompt_id][: spec.width]
            item[row, : len(chosen)] = chosen
            valid[row, : len(chosen)] = True
        return Groups(
            prompt_id_P=np.array([prompt.prompt_id for prompt in prompts]),
            valid_PG=valid,
            token_PGT=np.zeros((*size, 1), dtype=np.int32),
            length_PG=np.ones(size, dtype=np.int32),
            item_PG=item,
            logp_PGT=np.zeros((*size, 1), dtype=np.float32),
            finish_PG=np.full(size, Finish.ITEM.value),
            weight_version_P=np.zeros(len(prompts), dtype=np.int64),
            engine_id_P=np.full(len(prompts), "fake"),
            spec=spec,
            constraint="item_trie",
            catalogue_digest="",
        )


def evaluator(catalogue: Catalogue, dataset: FakeDataset, **more: Any) -> Evaluator:
    builder = PromptBuilder(catalogue, history=5, exclude_seen=False, max_prompt_tokens=32)
    settings: dict[str, Any] = {"split": "test", "rows": 10, "ks": (1, 2), "batch": 3, "seed": 0} | more
    return Evaluator(dataset, catalogue, builder, **settings)  # type: ignore[arg-type]


def test_hits_and_requests() -> None:
    catalogue = Catalogue.from_codes([[0], [1], [2], [3], [4]])
    generator = FakeGenerator([[0, 1], [0, 1], [2, 3], [3, 0]])
    result = evaluator(catalogue, FakeDataset([0, 1, 0, 3], [1] * 5)).run(generator)
    assert result.items.values["hr@1"] == 0.5
    assert result.items.values["hr@2"] == 0.75
    assert result.items.values["invalid@2"] == 0
    assert result.paths.values == result.items.values
    assert len(generator.asked) == 2
    assert result.unconstrained_invalid is None


def test_a_dataset_that_has_grown_since_changes_nothing() -> None:
    catalogue = Catalogue.from_codes([[0], [1], [2], [3], [4]])
    lists = [[0, 1], [0, 1], [2, 3], [3, 0]]
    before = evaluator(catalogue, FakeDataset([0, 1, 0, 3], [5, 4, 3, 2, 1])).run(FakeGenerator(lists))
    after = evaluator(catalogue, FakeDataset([0, 1, 0, 3], [5, 4, 3, 2, 1, 0, 7])).run(FakeGenerator(lists))
    assert after.items.values == before.items.values


def test_an_invalid_output_is_counted_and_an_absent_slot_is_not() -> None:
    catalogue = Catalogue.from_codes([[0], [1], [2], [3], [4]])
    result = evaluator(catalogue, FakeDataset([0, 1], [1] * 5)).run(FakeGenerator([[NO_ITEM, 0], [1]]))
    assert result.items.values["invalid@2"] == pytest.approx(1 / 3)
    assert result.items.values["hr@1"] == 0.5
    assert result.items.values["hr@2"] == 1.0


def test_shared_leaves_list_the_frequent_item_first_and_paths_count_once() -> None:
    codes = Codes.from_lists([[0, 0], [0, 0], [1, 0], [1, 1], [0, 1]], on_collision=OnCollision.SHARE)
    catalogue = Catalogue.from_codes(codes)
    result = evaluator(catalogue, FakeDataset([0, 1], [1, 9, 1, 1, 1])).run(FakeGenerator([[0, 2], [0, 2]]))
    assert result.items.values["hr@1"] == 0.5
    assert result.items.values["hr@2"] == 1.0
    assert result.paths.values["hr@1"] == 1.0


def test_the_unconstrained_invalid_rate_is_measured_apart() -> None:
    catalogue = Catalogue.from_codes([[0], [1], [2], [3], [4]])
    generator = FakeGenerator([[0, 1]] * 2, unconstrained=[[NO_ITEM, 1], [0, 1]])
    result = evaluator(catalogue, FakeDataset([0, 1], [1] * 5), unconstrained_rows=5).run(generator)
    assert result.unconstrained_invalid == 0.25
    assert result.metrics()["invalid_unconstrained"] == 0.25
    assert [spec.constrained for spec in generator.asked] == [True, False]


def test_row_samples_are_seeded_sorted_and_without_repeats() -> None:
    rows = sample_rows(1000, 100, seed=3)
    assert len(set(rows.tolist())) == 100
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, sample_rows(1000, 100, seed=3))
    assert not np.array_equal(rows, sample_rows(1000, 100, seed=4))
    np.testing.assert_array_equal(sample_rows(5, 100, seed=0), np.arange(5))
