"""An import keeps every sound row, gives every other a reason, and lets nothing learned see validation or test.

Oracle: the same import written as plain Python over a list of rows. Not checked here: single columns (test_columns),
boundaries (test_split), files of known datasets (test_importers), damaged files (test_damaged_files).
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dataset import Dataset
from data.errors import RequestError
from data.importing import ImportRules, import_source
from data.quarantine import Reason
from data.sources import TimeUnit
from data.tabular import ColumnNames, table

Row = tuple[Any, Any, Any, Any]


def _import(folder: Path, rows: list[Row], items: list[tuple[Any, Any]] | None = None, **rules: Any) -> Dataset:
    columns = [pa.array(column) for column in zip(*rows, strict=True)]
    pq.write_table(pa.table(columns, ["user_id", "item_id", "timestamp", "rating"]), folder / "events.parquet")
    item_path = None
    if items is not None:
        item_path = folder / "items.parquet"
        pq.write_table(
            pa.table([pa.array(column) for column in zip(*items, strict=True)], ["item_id", "title"]), item_path
        )
    source = table(folder / "events.parquet", item_path, ColumnNames(), TimeUnit.SECONDS)
    return import_source(source, folder / "out", ImportRules(**rules))


def _stored(dataset: Dataset) -> list[tuple[str, str, int]]:
    """Events by original keys, in stored order."""
    users = dataset.users()["user_key"].to_pylist()
    items = dataset.items()["item_key"].to_pylist()
    events = dataset.events
    return [(users[u], items[i], int(t)) for u, i, t in zip(events.user_E, events.item_E, events.time_E, strict=True)]


def _quarantined(dataset: Dataset) -> list[dict[str, Any]]:
    path = dataset.path / "quarantine" / "rows.parquet"
    return pq.read_table(path).to_pylist() if path.exists() else []


_rows = st.lists(
    st.tuples(
        st.none() | st.integers(-1, 5),
        st.none() | st.integers(-1, 6),
        st.none() | st.integers(-2, 12),
        st.none() | st.sampled_from([1.0, 5.0, float("nan")]),
    ),
    min_size=1,
    max_size=60,
)


@given(_rows, st.booleans(), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_random_tables(rows: list[Row], keep_duplicates: bool, core: int) -> None:
    sound: list[tuple[str, str, int, int]] = []
    reasons: Counter[str] = Counter()
    taken: set[tuple[Any, ...]] = set()
    for order, (user, item, time, rating) in enumerate(rows):
        if user is None or item is None or user < 0 or item < 0 or time is None or time < 0 or rating != rating:
            reasons["bad"] += 1
        elif (user, item, time) in taken and not keep_duplicates:
            reasons["duplicate"] += 1
        else:
            taken.add((user, item, time))
            sound.append((str(user), str(item), time, order))
    while core:
        users, items = Counter(r[0] for r in sound), Counter(r[1] for r in sound)
        kept = [r for r in sound if users[r[0]] >= core and items[r[1]] >= core]
        if kept == sound:
            break
        sound = kept
    expected = [(u, i, t) for u, i, t, _ in sorted(sound, key=lambda r: (r[0], r[2], r[3]))]
    with tempfile.TemporaryDirectory() as folder:
        try:
            dataset = _import(
                Path(folder),
                rows,
                split="leave_one_out",
                duplicates="keep" if keep_duplicates else "drop",
                user_core=core,
                item_core=core,
                max_bad_share=1,
            )
        except RequestError:
            # Three targets need a user of four events, or one of three (validation, test) and one of two (training).
            lengths = set(Counter(u for u, _, _ in expected).values())
            assert max(lengths, default=0) < 4
            assert not {2, 3} <= lengths
            assert not (Path(folder) / "out").exists()
            return
        stored = _stored(dataset)
        assert sorted(stored, key=lambda r: r[0]) == expected
        assert [u for u, _ in _runs(stored)] == dataset.users()["user_key"].to_pylist()
        dropped = dataset.card["dropped"]
        assert dropped.get(Reason.DUPLICATE_EVENT, 0) == reasons["duplicate"]
        counted_only = {Reason.K_CORE, Reason.ITEM_WITHOUT_EVENTS}
        quarantined = sum(count for reason, count in dropped.items() if reason not in counted_only)
        assert quarantined == len(_quarantined(dataset)) == reasons["bad"] + reasons["duplicate"]
        assert len(stored) + quarantined + dropped.get(Reason.K_CORE, 0) == len(rows)


def _runs(stored: list[tuple[str, str, int]]) -> list[tuple[str, int]]:
    """Users in stored order, each with the number of its events."""
    return list(Counter(user for user, _, _ in stored).items())


def _history(dataset: Dataset) -> list[tuple[str, list[str], str]]:
    items = dataset.items()["item_key"].to_pylist()
    users = dataset.users()["user_key"].to_pylist()
    rows = []
    for split in ("train", "valid", "test"):
        samples = dataset.samples(split)
        for i in range(len(samples)):
            history = [items[item] for item in samples.history(i, 10**6)]
            rows.append((users[samples.user_id_N[i]], history, items[samples.target_N[i]]))
    return rows


@pytest.mark.parametrize("split", ["chronological", "leave_one_out"])
def test_samples_and_sequences_agree_with_the_events(tmp_path: Path, split: str) -> None:
    random = np.random.default_rng(1)
    rows = [(int(u), int(i), int(t), 1.0) for u, i, t in random.integers(0, [30, 40, 500], (600, 3))]
    dataset = _import(tmp_path, rows, split=split)
    per_user: dict[str, list[str]] = {}
    for user, item, _ in _stored(dataset):
        per_user.setdefault(user, []).append(item)
    expected = [(u, keys[:n], keys[n]) for u, keys in per_user.items() for n in range(1, len(keys))]
    assert sorted(_history(dataset)) == sorted(expected)
    for name in ("train", "valid", "test"):
        samples, sequences = dataset.samples(name), dataset.sequences(name)
        assert (np.diff(samples.timestamp_N) >= 0).all()
        assert samples.sample_id_N.tolist() == list(range(len(samples)))
        rows_of = sorted(
            (int(samples.user_id_N[i]), samples.history(i, 10**6).tolist(), int(samples.target_N[i]))
            for i in range(len(samples))
        )
        from_sequences = sorted(
            (int(sequences.user_id_S[s]), whole[:at].tolist(), int(whole[at]))
            for s in range(len(sequences))
            for whole in [sequences.values[sequences.start_S[s] : sequences.end_S[s]]]
            for at in range(int(sequences.loss_from_S[s]), len(whole))
        )
        assert rows_of == from_sequences
    taken = dataset.samples("train").take(np.asarray([4, 2]))
    assert taken.sample_id_N.tolist() == [4, 2]
    assert taken.history(0, 2).tolist() == dataset.samples("train").history(4, 10**6)[-2:].tolist()
    seen = dataset.seen(taken, 0)
    assert seen.tolist() == sorted(set(taken.history(0, 10**6).tolist()))


@pytest.mark.parametrize("split", ["chronological", "leave_one_out"])
def test_a_pair_planted_behind_the_boundary_leaves_no_trace(tmp_path: Path, split: str) -> None:
    """Item 77 follows item 76 for every user, but only in validation and test events."""
    rows: list[Row] = [(u, 10 + (u * 7 + t) % 20, 1000 * t + u, 1.0) for u in range(40) for t in range(16)]
    rows += [(u, 76 + n, 16_000 + 100 * n + u, 1.0) for u in range(40) for n in range(2)]
    dataset = _import(tmp_path, rows, split=split, ratios=(15, 1, 1))
    keys = dataset.items()["item_key"].to_pylist()
    planted = [keys.index("76"), keys.index("77")]
    assert np.isin(dataset.samples("valid").target_N, planted).any() or split == "chronological"
    assert np.isin(dataset.samples("test").target_N, planted).any()
    sequences = dataset.sequences("train")
    assert len(sequences) == 40
    # `values` itself, not only the slices: whoever reads the array cannot meet a later event either.
    assert not np.isin(sequences.values, planted).any()
    assert not np.isin(dataset.samples("train").target_N, planted).any()
    train = dataset.samples("train")
    assert not any(np.isin(train.history(i, 10**6), planted).any() for i in range(len(train)))
    counts = dataset.train_counts()
    assert counts[planted].tolist() == [0, 0]
    assert counts.sum() == 40 * 16
    if split == "chronological":
        boundary = dataset.card["split"]["valid_from"]
        assert counts.sum() == sum(time < boundary for _, _, time in _stored(dataset))


def test_item_table_rules(tmp_path: Path) -> None:
    rows: list[Row] = [(1, item, time, None) for time, item in enumerate([1, 2, 3, 4, 9, 1, 2, 3])]
    items = [(1, "one"), (2, None), (3, "three"), (3, "again"), (-4, "negative"), (4, "four"), (None, "x"), (5, "idle")]
    cases: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({}, {"1": "one", "2": "2", "3": "three", "4": "four"}),
        ({"unknown_items": "add"}, {"1": "one", "2": "2", "3": "three", "4": "four", "9": "9"}),
        ({"missing_titles": "drop"}, {"1": "one", "3": "three", "4": "four"}),
        ({"idle_items": "keep"}, {"1": "one", "2": "2", "3": "three", "4": "four", "5": "idle"}),
    ]
    for number, (rules, kept) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        dataset = _import(folder, rows, items, split="leave_one_out", **rules)
        found = dataset.items()
        assert dict(zip(found["item_key"].to_pylist(), found["title"].to_pylist(), strict=True)) == kept
        assert found["item_id"].to_pylist() == list(range(len(kept)))
        titled = [title != key for key, title in kept.items()]
        assert found["has_title"].to_pylist() == titled
        assert dataset.card["counts"]["items_without_title"] == titled.count(False)
        reasons = Counter(row["reason"] for row in _quarantined(dataset))
        assert reasons[Reason.DUPLICATE_ITEM] == 1
        assert reasons[Reason.NEGATIVE_ID] == 1
        assert reasons[Reason.MISSING_ITEM] == 1
        unknown = {"unknown_items": 0, "missing_titles": 3}.get(next(iter(rules), ""), 1)
        assert reasons[Reason.UNKNOWN_ITEM] == unknown
        assert reasons[Reason.NO_TITLE] == ("missing_titles" in rules)


def test_order_of_the_source_decides_ties_and_disorder_is_counted(tmp_path: Path) -> None:
    rows: list[Row] = [(1, 5, 30, 1.0), (1, 7, 10, 1.0), (2, 9, 10, 1.0), (1, 6, 10, 1.0), (1, 8, 20, 1.0)]
    dataset = _import(tmp_path, rows, split="leave_one_out")
    assert [(i, t) for u, i, t in _stored(dataset) if u == "1"] == [("7", 10), ("6", 10), ("8", 20), ("5", 30)]
    assert dataset.card["counts"]["rows_out_of_order"] == 1


def test_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    rows: list[Row] = [(u, (u + t) % 7, t, 1.0) for u in range(5) for t in range(8)]
    prints = {}
    cases: list[tuple[str, list[Row], dict[str, Any]]] = [
        ("a", rows, {}),
        ("again", rows, {}),
        ("shuffled", rows[::-1], {}),
        ("event", [*rows[:-1], (4, 6, 7, 1.0)], {}),
        ("split", rows, {"split": "leave_one_out"}),
    ]
    for name, changed, rules in cases:
        (tmp_path / name).mkdir()
        prints[name] = _import(tmp_path / name, changed, **rules).fingerprint
    assert prints["a"] == prints["again"]
    assert len({prints["a"], prints["event"], prints["split"]}) == 3


@pytest.mark.parametrize(
    ("rows", "rules", "message"),
    [
        ([(1, 1, 5, 1.0)] * 3, {}, "split"),
        ([(None, 1, 5, 1.0), (1, 1, 5, 1.0)] * 3, {"max_bad_share": 0.2}, "missing_user"),
        ([(-1, 1, 5, 1.0)], {"max_bad_share": 1}, "no usable row left"),
        ([(1, 1, t, 1.0) for t in range(9)], {"user_core": 10}, "no usable row left"),
        ([(1, 1, t, 1.0) for t in range(9)], {"ratios": (8, 0, 1)}, "ratios"),
    ],
)
def test_impossible_requests(tmp_path: Path, rows: list[Row], rules: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _import(tmp_path, rows, **rules)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.parquet"]


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    rows: list[Row] = [(u, t, t, 1.0) for u in range(2) for t in range(9)]
    dataset = _import(tmp_path, rows)
    with pytest.raises(RequestError, match="exists already"):
        _import(tmp_path, rows)
    assert Dataset.open(tmp_path / "out").fingerprint == dataset.fingerprint
