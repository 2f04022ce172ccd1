"""Contract of `data.needs`, `data.item_activity` and `data.item_labels`: gains and counts equal plain loops over the
events, strictly before the prompt; labels are read as MovieLens and Complete Journey write them; bad gains, needs and
attributes are refused by name.

Not checked: which need suits which dataset.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import RequestError
from data.importing import ImportRules, import_source
from data.item_activity import ItemActivity
from data.item_labels import ItemLabels
from data.needs import BUILT_IN, GainRows, ItemFacts, Need, NeedSettings, instruction_words, load_needs
from data.records import NO_ITEM
from data.sources import TimeUnit
from data.tabular import ColumnNames, table
from tests.data.tiny import import_events

ITEMS = 4
GENRES = ["Action Drama", "Drama", "Sci-Fi|Children's", ""]
events_lists = st.lists(st.tuples(st.integers(0, ITEMS - 1), st.integers(0, 12)), max_size=25)


def items_table(name: str, texts: list[str | None]) -> pa.Table:
    return pa.table({"item_id": list(range(len(texts))), name: pa.array(texts, pa.string())})


@settings(deadline=None, max_examples=200)
@given(events=events_lists, times=st.lists(st.integers(-3, 16), min_size=1, max_size=6), window=st.integers(1, 9))
def test_activity_equals_a_loop_over_the_events(events: list[tuple[int, int]], times: list[int], window: int) -> None:
    item_E, time_E = np.array(events, dtype=np.int64).reshape(-1, 2).T
    activity = ItemActivity(item_E.astype(np.int32), time_E, ITEMS)
    item_N = np.tile(np.arange(ITEMS), len(times))
    time_N = np.repeat(np.array(times, dtype=np.int64), ITEMS)
    before = [sum(i == item and t < at for i, t in events) for item, at in zip(item_N, time_N, strict=True)]
    within = [
        sum(i == item and at - window <= t < at for i, t in events) for item, at in zip(item_N, time_N, strict=True)
    ]
    assert activity.before(item_N, time_N).tolist() == before
    assert activity.within(item_N, time_N, window).tolist() == within
    most = np.array(within).reshape(len(times), ITEMS).max(1)
    assert activity.busiest(time_N, window).tolist() == np.repeat(most, ITEMS).tolist()


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> ItemFacts:
    """Item k is `item-k`: its events are at 1000, 1010, …, k + 1 of them, by users who share times."""
    events = [(user, f"item-{k}", 1000 + 10 * user) for k in range(ITEMS) for user in range(k + 1)]
    titles = {"item_id": [f"item-{k}" for k in range(ITEMS)], "title": ["t"] * ITEMS, "genres": GENRES}
    return ItemFacts(import_events(tmp_path_factory.mktemp("needs"), events, pa.table(titles)))


def rows(**changes: Any) -> GainRows:
    """Every item at 1015 and at 1030, under two histories."""
    base = GainRows(
        user_N=np.zeros(8, np.int32),
        item_N=np.tile(np.arange(ITEMS, dtype=np.int32), 2),
        time_N=np.repeat(np.array([1015, 1030]), ITEMS),
        rating_N=np.array([1.0, 2, 3, 4, 5, 4, 3, 2]),
        prompt_N=np.repeat(np.arange(2), ITEMS),
        history_PT=np.array([[1, NO_ITEM], [3, NO_ITEM]], np.int32),
        window_s=10,
    )
    return dataclasses.replace(base, **changes)


def gains(name: str, facts: ItemFacts, **changes: Any) -> list[float]:
    found: list[float] = load_needs([NeedSettings(name=name)])[0].gains(rows(**changes), facts).tolist()
    return found


def test_built_in_gains_of_a_small_world(facts: ItemFacts) -> None:
    assert gains("interest", facts) == [1, 2, 3, 4, 5, 4, 3, 2]
    # Drama was seen in the first history; item 3 has no genre, so the second history has seen none.
    assert gains("explore", facts) == [1, 0, 3, 0, 5, 4, 3, 0]
    # In [1005, 1015) items 1, 2 and 3 have one event each; in [1020, 1030) items 2 and 3, at 1020.
    assert gains("trend", facts) == [0, 2, 3, 4, 0, 0, 3, 2]
    # Where both are above 0.
    assert gains("discover", facts) == [0, 0, 3, 0, 0, 0, 3, 0]
    # Before 1015 items have 1, 2, 2, 2 events, before 1030 they have 1, 2, 3, 3.
    expected = [1 / 2, 2 / 3, 3 / 3, 4 / 3, 5 / 2, 4 / 3, 3 / 4, 2 / 4]
    assert gains("niche", facts) == pytest.approx(expected)


def test_trend_is_relative_to_the_busiest_item(facts: ItemFacts) -> None:
    # In [1005, 1035): 0, 1, 2 and 3 events.
    wide = gains("trend", facts, time_N=np.full(8, 1035), window_s=30)
    assert wide == pytest.approx([0, 2 / 3, 6 / 3, 12 / 3, 0, 4 / 3, 6 / 3, 6 / 3])


def test_nothing_at_or_after_the_prompt_counts(facts: ItemFacts) -> None:
    assert gains("trend", facts, time_N=np.full(8, 1000)) == [0] * 8
    assert gains("niche", facts, time_N=np.full(8, 1000)) == [1, 2, 3, 4, 5, 4, 3, 2]


def test_labels_as_the_sources_write_them() -> None:
    genres = ItemLabels.read(items_table("genres", ["Action Film-Noir", "Comedy|Children's", None, ""]))
    assert genres.names == ("Action", "Children's", "Comedy", "Film-Noir")
    assert genres.label_IX.tolist() == [[1, 0, 0, 1], [0, 1, 1, 0], [0] * 4, [0] * 4]
    departments = ItemLabels.read(items_table("department", ["FROZEN GROCERY", " DELI ", None]))
    assert departments.names == ("DELI", "FROZEN GROCERY")
    assert departments.label_IX.tolist() == [[0, 1], [1, 0], [0, 0]]
    with pytest.raises(RequestError, match=r"item_id, colour; legal: a column genres or department"):
        ItemLabels.read(items_table("colour", ["red"]))


def halved(rows: GainRows, facts: ItemFacts) -> np.ndarray:
    return rows.rating_N / 2


CONSTANT = 3


def test_gains_of_the_user_are_loaded_by_path(facts: ItemFacts) -> None:
    own = NeedSettings(name="quiet", gain="tests.data.test_needs:halved", window_hours=0.5)
    (need,) = load_needs([own])
    assert need.window_s == 1800
    assert need.gains(rows(), facts).tolist() == [0.5, 1, 1.5, 2, 2.5, 2, 1.5, 1]
    with pytest.raises(RequestError, match=r"gain of quiet: none given; legal: interest \| explore"):
        load_needs([NeedSettings(name="quiet")])
    with pytest.raises(RequestError, match="is no function"):
        load_needs([NeedSettings(name="quiet", gain="tests.data.test_needs:CONSTANT")])
    with pytest.raises(RequestError, match=r"gain of quiet: tests\.data\.test_needs:absent"):
        load_needs([NeedSettings(name="quiet", gain="tests.data.test_needs:absent")])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.array([1.0] * 7 + [-0.5]), r"gain -0.5 of user 0, item 3 \(1 of 8 gains\)"),
        (np.array([np.nan, np.inf] + [1.0] * 6), r"gain nan of user 0, item 0 \(2 of 8 gains\)"),
        (np.ones(7), r"gains of shape \[7\]"),
        (np.array(["one"] * 8), r"gains of shape \[8\] and type <U3"),
    ],
)
def test_gains_that_no_list_can_be_scored_with_are_refused(facts: ItemFacts, bad: np.ndarray, message: str) -> None:
    need = Need(name="odd", words=("odd",), function=lambda rows, facts: bad, window_s=1)
    with pytest.raises(RequestError, match=f"need odd: {message}"):
        need.gains(rows(), facts)


def test_needs_have_different_names() -> None:
    for wrong in ([], ["interest", "interest"]):
        with pytest.raises(RequestError, match="needs"):
            load_needs([NeedSettings(name=name) for name in wrong])
    needs = load_needs([NeedSettings(name=name) for name in BUILT_IN])
    assert [need.name for need in needs] == list(BUILT_IN)
    both = load_needs([NeedSettings(name="own", gain="tests.data.test_needs:halved", instruction=("niche", "new"))])
    assert instruction_words([*needs, *both]) == ("interest", "explore", "trend", "niche", "discover", "new")


def test_ratings_stay_beside_their_events(tmp_path: Path) -> None:
    rated = {"user_id": [2, 1, 2, 1, 2, 2], "item_id": list("abcadb"), "timestamp": [4, 3, 2, 1, 5, 6]}
    ratings = [4.5, None, 2.0, 1.0, 3.0, 5.0]
    pq.write_table(pa.table({**rated, "rating": ratings}), tmp_path / "events.parquet")
    source = table(tmp_path / "events.parquet", None, ColumnNames(), TimeUnit.SECONDS)
    dataset = import_source(source, tmp_path / "dataset", ImportRules(unknown_items="add"))
    by_time = dict(zip(dataset.events.time_E.tolist(), dataset.rating_E.tolist(), strict=True))
    assert np.isnan(by_time.pop(3))
    assert by_time == {4: 4.5, 2: 2.0, 1: 1.0, 5: 3.0, 6: 5.0}
