"""Dumps of scored groups: what is written is read back, bit for bit; foreign files are refused.

Does not check that a run trained from a dump equals the run that wrote it: tests/trainer/test_loop.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import RequestError
from data.records import Decode, DecodeSpec, Finish, Groups, ListSpec, Prompt, RewardFailure, ScoredGroups
from trainer.group_dump import dumped_steps, read_step, step_path, write_step


def example() -> tuple[list[Prompt], ScoredGroups]:
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(
            prompt_id=7 + p,
            token_ids=np.arange(1, 4 + p, dtype=np.int32),
            user_id=p,
            history=np.arange(p, dtype=np.int32),
            exclusions=np.array([], dtype=np.int32),
            target=p,
            timestamp=10**9 + p,
        )
        for p in range(3)
    ]
    groups = Groups(
        prompt_id_P=np.array([7, 8, 9]),
        valid_PG=rng.random((3, 4)) < 0.7,
        token_PGT=rng.integers(0, 9, (3, 4, 2)).astype(np.int32),
        length_PG=rng.integers(1, 3, (3, 4)).astype(np.int32),
        item_PG=rng.integers(0, 5, (3, 4)).astype(np.int32),
        logp_PGT=rng.normal(size=(3, 4, 2)).astype(np.float32),
        finish_PG=np.full((3, 4), Finish.ITEM.value),
        weight_version_P=np.array([2, 2, 2]),
        engine_id_P=np.array(["a", "b", "a"]),
        spec=DecodeSpec(decode=Decode.SAMPLE, width=4, temperature=0.7, seed=3, step=2),
        constraint="item_trie",
        catalogue_digest="digest",
    )
    failure = np.array([RewardFailure.NONE.value, RewardFailure.TIMEOUT.value, RewardFailure.NONE.value])
    reward = rng.normal(size=(3, 4)).astype(np.float32)
    return prompts, ScoredGroups(
        groups=groups, reward_PG=reward, failure_P=failure, parts_PG={"item_match": reward * 2}
    )


def with_scored_items(prompts: list[Prompt], scored: ScoredGroups) -> tuple[list[Prompt], ScoredGroups]:
    asked = [dataclasses.replace(p, scored_items=items) for p, items in zip(prompts, [(4, 1), (), (2,)], strict=True)]
    logp_PMT = np.random.default_rng(1).normal(size=(3, 2, 3)).astype(np.float32)
    logp_PMT[0, 1, 0] = -np.inf
    groups = dataclasses.replace(scored.groups, scored_logp_PMT=logp_PMT)
    return asked, dataclasses.replace(scored, groups=groups)


def as_lists(prompts: list[Prompt], scored: ScoredGroups) -> tuple[list[Prompt], ScoredGroups]:
    rng = np.random.default_rng(2)
    asked = [
        dataclasses.replace(
            prompt,
            need=need,
            candidates=np.arange(size, dtype=np.int32)[::-1].copy(),
            gain_C=rng.random(size).astype(np.float32),
            observed_C=rng.random(size) < 0.5,
        )
        for prompt, need, size in zip(prompts, ("trend", "niche", "trend"), (5, 2, 4), strict=True)
    ]
    groups = dataclasses.replace(
        scored.groups,
        spec=dataclasses.replace(scored.groups.spec, lists=ListSpec(candidates=5, length=3, text_tokens=1)),
        item_PGK=rng.integers(-1, 5, (3, 4, 3)).astype(np.int32),
        segment_PGT=rng.integers(-2, 3, (3, 4, 2)).astype(np.int32),
    )
    return asked, dataclasses.replace(scored, groups=groups)


def as_they_are(prompts: list[Prompt], scored: ScoredGroups) -> tuple[list[Prompt], ScoredGroups]:
    return prompts, scored


@pytest.mark.parametrize("change", [as_they_are, with_scored_items, as_lists])
def test_round_trip(
    tmp_path: Path, change: Callable[[list[Prompt], ScoredGroups], tuple[list[Prompt], ScoredGroups]]
) -> None:
    prompts, scored = change(*example())
    write_step(tmp_path, 1, prompts, scored)
    assert dumped_steps(tmp_path) == [1]
    again_prompts, again = read_step(tmp_path, 1, "digest")
    for before, after in zip(prompts, again_prompts, strict=True):
        for field in dataclasses.fields(Prompt):
            np.testing.assert_array_equal(getattr(before, field.name), getattr(after, field.name))
    for field in dataclasses.fields(Groups):
        before, after = getattr(scored.groups, field.name), getattr(again.groups, field.name)
        if isinstance(before, np.ndarray):
            np.testing.assert_array_equal(before, after)
            assert before.dtype.kind == after.dtype.kind
        else:
            assert before == after
    np.testing.assert_array_equal(again.reward_PG, scored.reward_PG)
    np.testing.assert_array_equal(again.usable_P, scored.usable_P)
    np.testing.assert_array_equal(again.parts_PG["item_match"], scored.parts_PG["item_match"])


def test_foreign_catalogue_is_refused(tmp_path: Path) -> None:
    write_step(tmp_path, 0, *example())
    with pytest.raises(RequestError, match="catalogue"):
        read_step(tmp_path, 0, "another")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no step"):
        dumped_steps(tmp_path)
    pq.write_table(pa.table({"a": [1]}), step_path(tmp_path, 0))
    with pytest.raises(RequestError, match="format"):
        read_step(tmp_path, 0, "digest")
    step_path(tmp_path, 1).write_bytes(b"PAR1 nothing")
    with pytest.raises(RequestError, match="train_only"):
        read_step(tmp_path, 1, "digest")


def test_a_dump_with_a_hole_is_refused(tmp_path: Path) -> None:
    for step in (1, 3):
        write_step(tmp_path, step, *example())
    (tmp_path / "step-old.parquet").touch()
    with pytest.raises(RequestError, match=r"holds no step-000002\.parquet"):
        dumped_steps(tmp_path)


@pytest.mark.parametrize("column", ["token_PGT", "prompt_history", "reward_PG", "target"])
def test_a_dump_without_a_column_or_with_another_type_is_refused(tmp_path: Path, column: str) -> None:
    write_step(tmp_path, 1, *example())
    path = step_path(tmp_path, 1)
    table = pq.read_table(path)
    place = table.schema.get_field_index(column)
    pq.write_table(table.drop_columns([column]), path)
    with pytest.raises(RequestError, match=f"column {column}: no such column"):
        read_step(tmp_path, 1, "digest")
    pq.write_table(table.set_column(place, column, pa.array(["x"] * 3)), path)
    with pytest.raises(RequestError, match=f"column {column}: string; legal"):
        read_step(tmp_path, 1, "digest")


def test_a_dump_whose_description_lies_is_refused(tmp_path: Path) -> None:
    write_step(tmp_path, 1, *example())
    path = step_path(tmp_path, 1)
    table = pq.read_table(path)
    head = table.schema.metadata[b"windlass.groups"].replace(b"[3, 4, 2]", b"[3, 5, 2]")
    pq.write_table(table.replace_schema_metadata({b"windlass.groups": head}), path)
    with pytest.raises(RequestError, match="is damaged"):
        read_step(tmp_path, 1, "digest")
