"""Contract: a dataset that grows keeps every old item's id, key, codes and tokens, in a new folder beside the old one,
which does not change; no two items have one path, retired items' paths included; a full place gets a new code on the
last level alone; retired items leave the constraint; wrong keys and codes are refused.

Not checked here: the model that follows (tests/trainer/test_model_growth.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.catalogue import Catalogue
from data.code_vectors import codebooks_path, load_codebooks, save_codebooks
from data.codes import Codes, OnCollision, codes_path
from data.dataset import Dataset
from data.growth import extend_dataset, place_items, same_tokens
from data.trie import complete_paths
from data.vocabulary import TextBase, Vocabulary
from launch import cli
from launch.provenance import ROOT
from tests.data.tiny import import_events

BOOKS = (np.array([[0.0, 0], [10, 0]], np.float32), np.array([[0.0, 0], [0, 1], [0, 2]], np.float32))


def dataset_of(folder: Path, sids: list[str]) -> Dataset:
    """Items i0, i1, ... with codes in a column, called `default`."""
    numbers = range(len(sids))
    items = pa.table({"item_id": [f"i{n}" for n in numbers], "title": [f"Item {n}" for n in numbers], "sid": sids})
    events = [(user, f"i{(user + step) % len(sids)}", 100 * step + user) for user in range(8) for step in range(6)]
    dataset = import_events(folder, events, items)
    arguments = ["data", "ids", "--dataset", str(dataset.path), "--source", "column", "--column", "sid"]
    assert cli.run(arguments) == 0
    return dataset


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_dataset_without_codes_grows_by_titles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [(user, f"i{(user + step) % 4}", 100 * step + user) for user in range(8) for step in range(6)]
    dataset = import_events(tmp_path, events)
    new = tmp_path / "new.csv"
    new.write_text("item_key,title\nn0,New 0\n")
    arguments = ["--dataset", str(dataset.path), "--out", str(tmp_path / "grown"), "--items", str(new)]
    assert cli.run(["data", "extend", *arguments, "--retire", "i1", "--json", str(tmp_path / "answer.json")]) == 0
    assert "5 items, 1 of them new, 1 retired now; no codes" in capsys.readouterr().out
    answer = json.loads((tmp_path / "answer.json").read_text())
    jsonschema.validate(answer, json.loads((ROOT / "docs" / "schemas" / "data-extend.schema.json").read_text()))
    assert (answer["new_codes"], answer["level_sizes"]) == (0, [])
    grown = Dataset.open(tmp_path / "grown").items()
    assert grown["title"].to_pylist()[-1] == "New 0"
    assert grown["active_to"].is_valid().to_pylist() == [False, True, False, False, False]


def test_a_dataset_grows_and_the_old_one_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = dataset_of(tmp_path, ["<a_0><b_0>", "<a_0><b_1>", "<a_1><b_0>"])
    before = content(dataset.path)
    new = tmp_path / "new.csv"
    new.write_text("item_key,title,sid\nn0,New 0,<a_1><b_1>\n77,,<a_0><b_2>\n")
    out = tmp_path / "grown"
    arguments = ["data", "extend", "--dataset", str(dataset.path), "--out", str(out), "--items", str(new)]
    capsys.readouterr()
    assert cli.run([*arguments, "--retire", "i1", "--json", str(tmp_path / "answer.json")]) == 0
    assert "5 items, 2 of them new, 1 retired now; 1 new codes" in capsys.readouterr().out
    schema = json.loads((ROOT / "docs" / "schemas" / "data-extend.schema.json").read_text())
    jsonschema.validate(json.loads((tmp_path / "answer.json").read_text()), schema)
    assert content(dataset.path) == before
    grown = Dataset.open(out)
    assert (grown.n_items, grown.fingerprint == dataset.fingerprint) == (5, False)
    assert grown.samples("test").target_N.tolist() == dataset.samples("test").target_N.tolist()
    old, catalogue = Catalogue.build(dataset, "default"), Catalogue.build(grown, "default")
    assert same_tokens(old, catalogue)
    assert catalogue.item_keys == ("i0", "i1", "i2", "n0", "77")
    assert catalogue.titles[3:] == ("New 0", "77")
    assert catalogue.vocabulary.level_sizes == (2, 3)
    assert [old.tokens(item).tolist() for item in range(3)] == [catalogue.tokens(item).tolist() for item in range(3)]
    assert catalogue.active.tolist() == [True, False, True, True, True]
    assert catalogue.leaf_items(1).tolist() == []
    assert cli.run(arguments) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "retire", "named"),
    [
        ("item_key,sid\ni0,<a_1><b_1>\n", [], "item_key: i0"),
        ("item_key,sid\nn,<a_1><b_1>\nn,<a_1><b_2>\n", [], "item_key: n"),
        ("name,sid\nn,<a_1><b_1>\n", [], "--items: columns"),
        ("item_key,sid\nn,<a_2><b_0>\n", [], "codes of a new item: [2, 0]"),
        ("item_key,sid\nn,<a_0><b_0><c_0>\n", [], "codes of a new item: [0, 0, 0]"),
        (None, ["nobody"], "--retire: nobody"),
        (None, [], "neither --items nor --retire"),
    ],
)
def test_wrong_growth_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str | None, retire: list[str], named: str
) -> None:
    dataset = dataset_of(tmp_path, ["<a_0><b_0>", "<a_0><b_1>", "<a_1><b_0>"])
    arguments = ["data", "extend", "--dataset", str(dataset.path), "--out", str(tmp_path / "grown")]
    if rows is not None:
        (tmp_path / "new.csv").write_text(rows)
        arguments += ["--items", str(tmp_path / "new.csv")]
    assert cli.run([*arguments, *(["--retire", *retire] if retire else [])]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "grown").exists()


def test_a_path_that_continues_an_old_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = dataset_of(tmp_path, ["<a_0>", "<a_1><b_0>", "<a_1><b_1>"])
    (tmp_path / "new.csv").write_text("item_key,sid\nn,<a_0><b_1>\n")
    arguments = ["--dataset", str(dataset.path), "--out", str(tmp_path / "grown"), "--items", str(tmp_path / "new.csv")]
    assert cli.run(["data", "extend", *arguments]) == 2
    assert "changes the tokens of an old item" in capsys.readouterr().err


Vector = st.tuples(st.integers(-2, 12), st.integers(-2, 4))


@settings(max_examples=200, deadline=None)
@given(st.lists(Vector, max_size=12), st.sets(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=1))
def test_new_items_get_paths_that_nobody_had(vectors: list[tuple[int, int]], there: set[tuple[int, int]]) -> None:
    codes = Codes.from_lists([list(path) for path in sorted(there)], [2, 3], OnCollision.RESOLVE)
    paths, books = place_items(codes, BOOKS, np.asarray(vectors, np.float32).reshape(-1, 2))
    every = [*sorted(there), *map(tuple, paths)]
    assert len(set(every)) == len(every)
    np.testing.assert_array_equal(books[-1][:3], BOOKS[-1])
    for (first, _), vector in zip(paths, vectors, strict=True):
        left = np.abs(BOOKS[0][:, 0] - vector[0])
        assert left[first] == left.min()
    # New codes only where the old ones of a place are taken.
    assert len(books[-1]) == max(3, *(sum(place == first for place, _ in every) for first in range(2)))


def test_shared_leaves_need_no_new_code() -> None:
    codes = Codes.from_lists([[0, 0], [0, 0]], [2, 3], OnCollision.SHARE)
    paths, books = place_items(codes, BOOKS, np.zeros((4, 2), np.float32))
    assert paths == [[0, 0]] * 4
    assert len(books[-1]) == 3


def test_codes_of_vectors_grow_with_their_codebooks(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, ["<a_0><b_0>"] * 4)
    provenance: dict[str, Any] = {"settings": {"source": "cooccurrence"}}
    codes = Codes.from_lists([[0, 0], [0, 1], [0, 2], [1, 0]], [2, 3], OnCollision.RESOLVE, provenance)
    save_codebooks(codebooks_path(dataset.path, "cooc"), codes, BOOKS)
    codes.save(codes_path(dataset.path, "cooc"))
    items = pa.table({"item_key": ["x", "y"]})
    growth = extend_dataset(dataset, tmp_path / "grown", items=items, retire=["i0"], retired_at=5, codes_name="cooc")
    # Nobody has used them: both are at the origin, where every code is taken, retired items' too.
    assert (growth.new_codes, growth.codes.level_sizes) == (2, (2, 5))
    assert growth.codes.values.tolist()[8:] == [0, 3, 0, 4]
    assert len(load_codebooks(codebooks_path(tmp_path / "grown", "cooc"), growth.codes)[-1]) == 5


def titles(*paths: list[int]) -> Catalogue:
    """A catalogue of titles in a language model's tokens; 9 is its end token."""
    start = np.concatenate([[0], np.cumsum([len(path) for path in paths])])
    values, start = complete_paths(np.concatenate(paths).astype(np.int32), start, 9)
    return Catalogue(
        vocabulary=Vocabulary([], text=TextBase(tokens=10, rows=10, pad=0, bos=1, eos=9)),
        path_values=values,
        path_start=start,
        active=np.ones(len(paths), dtype=bool),
        titles=tuple(map(str, paths)),
        item_keys=tuple(f"i{number}" for number in range(len(paths))),
        on_collision=OnCollision.SHARE,
        provenance={},
    )


def test_a_title_keeps_its_tokens_when_a_later_one_continues_it() -> None:
    heat, alien, heat_2 = [2, 3], [4], [2, 3, 5]
    before = titles(heat, alien)
    after = titles(heat, alien, heat_2)
    assert [after.tokens(item).tolist() for item in range(3)] == [[2, 3, 9], [4], [2, 3, 5]]
    assert same_tokens(before, after)
    assert not same_tokens(after, before)
    for other in (titles(heat, heat_2, alien), titles([2], [3, 4]), titles(heat, [4, 5], heat_2)):
        assert not same_tokens(before, other)
