"""The independent check passes what an engine returns, and counts each kind of damage done to it; its table of paths
knows what a dictionary knows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.catalogue import Catalogue
from data.records import Decode, DecodeSpec, Groups, Prompt
from rollout.engine import Engine
from rollout.violations import PathTable, Violation, ViolationCounter
from tests.tiny_model import random_prompts


@pytest.fixture(scope="module")
def prompts(catalogue: Catalogue) -> list[Prompt]:
    return random_prompts(catalogue, [6, 7, 8], excluded=4)


@pytest.fixture(scope="module")
def groups(reference_engine: Engine, prompts: list[Prompt]) -> Groups:
    return reference_engine.generate(prompts, DecodeSpec(decode=Decode.BEAM, width=5))


def changed(groups: Groups, name: str, at: tuple[Any, ...], value: float) -> Groups:
    array = getattr(groups, name).copy()
    array[at] = value
    return dataclasses.replace(groups, **{name: array})


def found(catalogue: Catalogue, prompts: list[Prompt], groups: Groups) -> dict[Violation, int]:
    counts = ViolationCounter(catalogue).count(prompts, groups)
    return {reason: count for reason, count in counts.items() if count}


def test_sound_groups_have_none(catalogue: Catalogue, prompts: list[Prompt], groups: Groups) -> None:
    assert ViolationCounter(catalogue).count(prompts, groups) == {reason: 0 for reason in Violation}


def test_each_kind_is_counted(catalogue: Catalogue, prompts: list[Prompt], groups: Groups) -> None:
    item = int(groups.item_PG[1, 2])
    assert found(catalogue, prompts, changed(groups, "token_PGT", (1, 2, 0), 0)) == {Violation.UNKNOWN_PATH: 1}
    assert found(catalogue, prompts, changed(groups, "item_PG", (1, 2), (item + 1) % 60)) == {Violation.WRONG_ITEM: 1}
    assert found(catalogue, prompts, changed(groups, "logp_PGT", (1, 2, 1), np.nan)) == {Violation.LOG_PROBABILITY: 1}
    assert found(catalogue, prompts, changed(groups, "logp_PGT", (1, 2, 1), 0.5)) == {Violation.LOG_PROBABILITY: 1}
    assert found(catalogue, prompts, changed(groups, "valid_PG", (1, 0), False)) == {Violation.ORDER: 1}
    assert found(catalogue, prompts, changed(groups, "prompt_id_P", (1,), 9)) == {Violation.ORDER: 1}
    copied = groups
    for name in ("token_PGT", "item_PG", "logp_PGT"):
        copied = changed(copied, name, (1, 3), getattr(groups, name)[1, 2])
    assert found(catalogue, prompts, copied) == {Violation.DUPLICATE: 1}
    samples = dataclasses.replace(copied, spec=dataclasses.replace(groups.spec, decode=Decode.SAMPLE))
    assert found(catalogue, prompts, samples) == {}
    banned = [*prompts[:1], dataclasses.replace(prompts[1], exclusions=np.array([item], np.int32)), *prompts[2:]]
    assert found(catalogue, banned, groups) == {Violation.EXCLUDED: 1}
    retired = found(catalogue.retire([item]), prompts, groups)
    assert retired == {Violation.RETIRED: int((groups.item_PG == item).sum())}


PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=4)


@settings(deadline=None, max_examples=200)
@given(codes=st.lists(PATHS, min_size=1, max_size=6), asked=st.lists(PATHS, min_size=1, max_size=6))
def test_paths_are_found_as_in_a_dictionary(codes: list[list[int]], asked: list[list[int]]) -> None:
    catalogue = Catalogue.from_codes(codes)
    paths = [tuple(catalogue.tokens(item).tolist()) for item in range(len(codes))]
    of_item: dict[tuple[int, ...], set[int]] = {}
    for item, path in enumerate(paths):
        of_item.setdefault(path, set()).add(item)
    table = PathTable(catalogue)
    used = sorted({token for path in paths for token in path})
    wanted = [*paths, *(tuple(used[choice % len(used)] for choice in path) for path in asked)]
    width = max(map(len, wanted)) + 1
    padded_MT = np.array([[*path, *[-1] * (width - len(path))] for path in wanted], np.int32)
    number_of_item = table.numbers_of(np.arange(len(codes), dtype=np.int32))
    for path, number in zip(wanted, table.numbers(padded_MT).tolist(), strict=True):
        assert set(np.flatnonzero(number_of_item == number).tolist()) == of_item.get(path, set())
        assert (number == -1) == (path not in of_item)
    assert table.numbers_of(np.array([-1, len(codes)], np.int32)).tolist() == [-1, -1]
