"""No file makes an import crash or half succeed: random bytes, truncation, empty and missing files, missing columns.

Every reader either imports, or raises RequestError with the file's name; afterwards there is either a whole dataset or
nothing. A dataset folder that was damaged later is refused when it is opened or read, never read wrongly.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.amazon import amazon_2018, amazon_2023
from data.dataset import Dataset
from data.errors import RequestError
from data.importing import ImportRules, import_source
from data.inspection import inspect_dataset
from data.movielens import movielens_1m, movielens_100k
from data.sources import Source, TimeUnit
from data.tabular import ColumnNames, table

_RULES = ImportRules(split="leave_one_out", max_bad_share=1)
_NAMES = ["user_id", "item_id", "timestamp", "rating"]


def _table(path: Path) -> Source:
    return table(path, None, ColumnNames(), TimeUnit.SECONDS)


def _ml_100k(path: Path) -> Source:
    return movielens_100k(path.parent)


def _ml_1m(path: Path) -> Source:
    return movielens_1m(path.parent)


def _amazon(path: Path) -> Source:
    return amazon_2023(path, None)


_READERS: dict[str, tuple[str, Callable[[Path], Source]]] = {
    "parquet": ("events.parquet", _table),
    "csv": ("events.csv", _table),
    "csv.gz": ("events.csv.gz", _table),
    "ml-100k": ("ml-100k.inter", _ml_100k),
    "ml-1m": ("ratings.dat", _ml_1m),
    "jsonl": ("events.jsonl", _amazon),
    "jsonl.gz": ("events.jsonl.gz", _amazon),
}


def _events() -> pa.Table:
    rows = [(u, (u + t) % 9, 100 * t, 3.0) for u in range(6) for t in range(9)]
    return pa.table([pa.array(column) for column in zip(*rows, strict=True)], _NAMES)


def _sound(kind: str) -> bytes:
    """A file of the kind that imports."""
    rows = _events().to_pylist()
    sink = io.BytesIO()
    if kind == "parquet":
        pq.write_table(_events(), sink)
    elif kind.startswith("csv"):
        pv.write_csv(_events(), sink)
    elif kind == "ml-100k":
        lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
        lines += [f"{r['user_id']}\t{r['item_id']}\t3\t{r['timestamp']}" for r in rows]
        sink.write("\n".join(lines).encode())
    elif kind == "ml-1m":
        sink.write("\n".join(f"{r['user_id']}::{r['item_id']}::3::{r['timestamp']}" for r in rows).encode())
    else:
        renamed = [
            {"user_id": str(r["user_id"]), "parent_asin": str(r["item_id"]), "timestamp": r["timestamp"] * 1000}
            for r in rows
        ]
        sink.write("\n".join(map(json.dumps, renamed)).encode())
    return gzip.compress(sink.getvalue()) if kind.endswith(".gz") else sink.getvalue()


def _import_bytes(kind: str, content: bytes) -> Dataset | None:
    """The dataset in a temporary folder (gone afterwards), or None where it was refused by a clear message."""
    name, reader = _READERS[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        (path.parent / "ml-100k.item").write_text(
            "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
            + "".join(f"{i}\tFilm {i}\t1990\tDrama\n" for i in range(9))
        )
        (path.parent / "movies.dat").write_text("".join(f"{i}::Film {i}::Drama\n" for i in range(9)))
        before = sorted(p.name for p in path.parent.iterdir())
        try:
            dataset = import_source(reader(path), path.parent / "out", _RULES)
        except RequestError:
            assert sorted(p.name for p in path.parent.iterdir()) == before
            return None
        inspect_dataset(dataset.path)
        return dataset


@pytest.mark.parametrize("kind", _READERS)
def test_sound_files_import(kind: str) -> None:
    dataset = _import_bytes(kind, _sound(kind))
    assert dataset is not None
    assert (dataset.n_users, dataset.n_items, dataset.card["counts"]["events"]) == (6, 9, 54)
    assert dataset.card["dropped"] == {}


@pytest.mark.parametrize("kind", _READERS)
@given(content=st.binary(max_size=400))
@settings(max_examples=20, deadline=None)
def test_random_bytes(kind: str, content: bytes) -> None:
    _import_bytes(kind, content)


@pytest.mark.parametrize("kind", _READERS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_sound_files_with_damage(kind: str, data: st.DataObject) -> None:
    """A piece is overwritten with random bytes, or the end is cut off."""
    sound = _sound(kind)
    at = data.draw(st.integers(0, len(sound) - 1))
    if data.draw(st.booleans()):
        content = sound[:at]
    else:
        piece = data.draw(st.binary(min_size=1, max_size=20))
        content = sound[:at] + piece + sound[at + len(piece) :]
    dataset = _import_bytes(kind, content)
    if dataset is not None:
        assert dataset.card["counts"]["events"] <= 54 + len(sound)


@pytest.mark.parametrize("kind", ["parquet", "csv.gz", "jsonl.gz"])
def test_truncated_files_are_refused_whole(kind: str) -> None:
    sound = _sound(kind)
    for keep in (1, len(sound) // 3, len(sound) - 9, len(sound) - 1):
        assert _import_bytes(kind, sound[:keep]) is None, keep


def test_rows_that_cannot_be_parsed_are_kept_in_the_quarantine(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    lines = ["user_id,item_id,timestamp,rating", *(f"1,{i},{i},3" for i in range(6))]
    lines[3:3] = ["1,2", 'no,number,here,x,y,z"']
    path.write_bytes("\n".join([*lines, ""]).encode() + b"1,\xff\n\xd0,9,9,3\n")
    dataset = import_source(_table(path), tmp_path / "out", _RULES)
    rows = pq.read_table(dataset.path / "quarantine" / "rows.parquet").to_pylist()
    assert [row["reason"] for row in rows] == ["unreadable_row"] * 3 + ["bad_id"]
    assert [row["content"] for row in rows[:3]] == ["1,2", 'no,number,here,x,y,z"', "1,\ufffd"]
    reviews = tmp_path / "reviews.json"
    sound = [{"reviewerID": "a", "asin": str(i), "unixReviewTime": i, "overall": 5.0} for i in range(5)]
    broken = ['{"reviewerID": "a", "asin"', "[1, 2]", "null", "NaN", "[" * 5000, '{"reviewerID": "\\ud800"}']
    reviews.write_text("\n".join([*broken, "", *map(json.dumps, sound)]))
    dataset = import_source(amazon_2018(reviews, None), tmp_path / "amazon", _RULES)
    assert dataset.card["dropped"] == {"missing_item": 1, "unreadable_row": 5}
    assert dataset.card["counts"]["events"] == 5


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "empty file"),
        (lambda path: path.mkdir(), "no .parquet, .csv or .tsv file"),
        (lambda path: path.write_bytes(b"PAR1 not really PAR1"), "not readable as Parquet"),
        (lambda path: pq.write_table(_events().drop_columns(["item_id"]), path), "no column item_id"),
        (lambda path: pq.write_table(_events().slice(0, 0), path), "no rows"),
        (
            lambda path: pq.write_table(_events().set_column(2, "timestamp", pa.array([[1]] * 54)), path),
            "column timestamp",
        ),
    ],
)
def test_messages_name_the_file_or_column(tmp_path: Path, write: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "events.parquet"
    write(path)
    with pytest.raises(RequestError, match=message):
        import_source(_table(path), tmp_path / "out", _RULES)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    pq.write_table(_events(), folder / "events.parquet")
    return import_source(_table(folder / "events.parquet"), folder / "out", _RULES).path


@pytest.mark.parametrize("name", ["dataset.json", "items.parquet", "users.parquet", "interactions/part-00000.parquet"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_damaged_dataset_is_refused(dataset_folder: Path, name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(dataset_folder, copy)
        sound = (copy / name).read_bytes()
        how = data.draw(st.sampled_from(["cut", "random", "missing"]))
        if how == "cut":
            (copy / name).write_bytes(sound[: data.draw(st.integers(0, len(sound) - 2))])
        elif how == "random":
            (copy / name).write_bytes(data.draw(st.binary(max_size=100)))
        else:
            (copy / name).unlink()
        with pytest.raises(RequestError):
            inspect_dataset(copy)


def test_exchanged_events_and_unknown_formats_are_refused(dataset_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset_folder, tmp_path / "copy")
    part = tmp_path / "copy" / "interactions" / "part-00000.parquet"
    events = pq.read_table(part)
    pq.write_table(events.take([*range(len(events) - 1), 0]), part)
    with pytest.raises(RequestError, match="content digest"):
        Dataset.open(tmp_path / "copy").samples("train")
    pq.write_table(events, part)
    inspect_dataset(tmp_path / "copy")
    card = json.loads((tmp_path / "copy" / "dataset.json").read_text())
    (tmp_path / "copy" / "dataset.json").write_text(json.dumps({**card, "fingerprint": "0" * 32}))
    with pytest.raises(RequestError, match="fingerprint"):
        inspect_dataset(tmp_path / "copy")
    (tmp_path / "copy" / "dataset.json").write_text(json.dumps({**card, "format": 99}))
    with pytest.raises(RequestError, match="format 99"):
        Dataset.open(tmp_path / "copy")
    with pytest.raises(RequestError, match="dev; legal: train"):
        Dataset.open(dataset_folder).samples("dev")
