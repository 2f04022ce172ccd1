"""Contract of `data.catalogue` and `data.codes`: paths become tokens, a saved folder or file comes back equal, damage
is refused with the place named, retired items leave the trie and stay readable, and the digest tells catalogues apart.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.catalogue import Catalogue
from data.codes import Codes, OnCollision, codes_path, load_codes
from data.errors import RequestError
from tests.data.tiny import import_events

PATHS = [[0, 1], [0, 1, 2], [1, 1], [1, 1], [2, 0, 1]]


def test_paths_become_tokens_and_prefixes_get_an_end_token() -> None:
    catalogue = Catalogue.from_codes(PATHS, ["a", "b", "c", "d", "e"])
    assert catalogue.vocabulary.level_sizes == (3, 2, 3)
    assert [catalogue.tokens(i).tolist() for i in range(5)] == [[4, 8, 2], [4, 8, 11], [5, 8], [5, 8], [6, 7, 10]]
    values, lengths = catalogue.tokens_of(np.array([4, 2, 4]))
    assert values.tolist() == [6, 7, 10, 5, 8, 6, 7, 10]
    assert lengths.tolist() == [3, 2, 3]
    assert catalogue.tokens_of(np.zeros(0, dtype=np.int32))[0].tolist() == []


def test_shared_leaves_and_retired_items() -> None:
    catalogue = Catalogue.from_codes(PATHS)
    assert catalogue.path_id.tolist() == [0, 1, 2, 2, 4]
    assert catalogue.leaf_items(3).tolist() == [2, 3]
    later = catalogue.retire([2, 4])
    assert later.leaf_items(3).tolist() == [3]
    assert later.leaf_items(4).tolist() == []
    assert later.tokens(4).tolist() == [6, 7, 10]
    assert later.trie().item_leaf_I.tolist()[4] == -1
    assert later.digest != catalogue.digest
    assert catalogue.active.all()


def test_a_saved_catalogue_comes_back_equal(tmp_path: Path) -> None:
    catalogue = Catalogue.from_codes(PATHS, ["Ä", "", "c", "d", "e"], item_keys="vwxyz", active=[1, 1, 0, 1, 1])
    catalogue.save(tmp_path / "catalogue")
    again = Catalogue.load(tmp_path / "catalogue")
    assert again.digest == catalogue.digest
    assert again.titles == ("Ä", "", "c", "d", "e")
    assert again.item_keys == tuple("vwxyz")
    assert again.active.tolist() == [True, True, False, True, True]
    assert again.vocabulary == catalogue.vocabulary
    assert again.on_collision is OnCollision.SHARE
    assert again.trie().digest == catalogue.trie().digest


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 2, "format 2"),
        ("digest", "0" * 64, "digest"),
        ("digest", None, "digest"),
        ("level_sizes", [3, 2], "digest"),
        ("level_sizes", "x", "level_sizes"),
        ("on_collision", "maybe", "on_collision"),
        ("provenance", 3, "provenance"),
    ],
)
def test_a_damaged_card_is_refused(tmp_path: Path, key: str, value: object, message: str) -> None:
    Catalogue.from_codes(PATHS).save(tmp_path)
    card = json.loads((tmp_path / "catalogue.json").read_text())
    (tmp_path / "catalogue.json").write_text(json.dumps({**card, key: value}))
    with pytest.raises(RequestError, match=message):
        Catalogue.load(tmp_path)


def test_further_words_travel_with_the_catalogue(tmp_path: Path) -> None:
    """And a catalogue without them keeps the digest that existing checkpoints have."""
    plain = Catalogue.from_codes(PATHS)
    assert plain.digest == "d88b3e64a58d8135805b620db1ea868a3615eeb0fc63f69ae7ae7691831b7676"
    wide = plain.with_words(["<list>"])
    assert wide.digest != plain.digest
    assert wide.tokens(1).tolist() == plain.tokens(1).tolist()
    wide.save(tmp_path)
    assert Catalogue.load(tmp_path).vocabulary.word_token("<list>") == plain.vocabulary.size
    card = json.loads((tmp_path / "catalogue.json").read_text())
    (tmp_path / "catalogue.json").write_text(json.dumps({**card, "further_words": "<list>"}))
    with pytest.raises(RequestError, match="further_words"):
        Catalogue.load(tmp_path)
    plain.save(tmp_path)
    card = json.loads((tmp_path / "catalogue.json").read_text())
    del card["further_words"]
    (tmp_path / "catalogue.json").write_text(json.dumps(card))
    assert Catalogue.load(tmp_path).digest == plain.digest


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such folder"):
        Catalogue.load(tmp_path / "none")
    with pytest.raises(RequestError, match=r"no catalogue\.json"):
        Catalogue.load(tmp_path)
    Catalogue.from_codes(PATHS).save(tmp_path)
    whole = (tmp_path / "items.parquet").read_bytes()
    (tmp_path / "items.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match=r"items\.parquet"):
        Catalogue.load(tmp_path)


@settings(deadline=None, max_examples=50)
@given(noise=st.binary(max_size=300), name=st.sampled_from(["catalogue.json", "items.parquet"]))
def test_random_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, noise: bytes, name: str) -> None:
    folder = tmp_path_factory.mktemp("catalogue")
    Catalogue.from_codes(PATHS).save(folder)
    (folder / name).write_bytes(noise)
    with pytest.raises(RequestError):
        Catalogue.load(folder)
    codes_file = folder / "codes.parquet"
    codes_file.write_bytes(noise)
    with pytest.raises(RequestError):
        Codes.load(codes_file)


@settings(deadline=None, max_examples=80)
@given(
    ids=st.lists(st.none() | st.integers(-2, 4), max_size=4),
    paths=st.lists(st.none() | st.lists(st.none() | st.integers(-1, 3), max_size=3), min_size=4, max_size=4),
    in_order=st.booleans(),
)
def test_random_tables_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    ids: list[int | None],
    paths: list[list[int | None] | None],
    in_order: bool,
) -> None:
    folder = tmp_path_factory.mktemp("codes")
    Codes.from_lists([[0]], [3, 3]).save(folder / "good.parquet")
    metadata = pq.read_schema(folder / "good.parquet").metadata
    shown = paths[: len(ids)]
    columns = {
        "item_id": pa.array(list(range(len(ids))) if in_order else ids, pa.int32()),
        "path": pa.array(shown, pa.list_(pa.int32())),
    }
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), folder / "bad.parquet")
    sound = (in_order or ids == list(range(len(ids)))) and bool(ids)
    sound = sound and all(path and len(path) <= 2 and all(c is not None and 0 <= c < 3 for c in path) for path in shown)
    if sound:
        assert Codes.load(folder / "bad.parquet").n_items == len(ids)
    else:
        with pytest.raises(RequestError):
            Codes.load(folder / "bad.parquet")


def test_codes_come_back_equal_with_their_provenance(tmp_path: Path) -> None:
    codes = Codes.from_lists(PATHS, [4, 4, 4], provenance={"seed": 3})
    codes.save(tmp_path / "codes" / "a.parquet")
    again = load_codes(tmp_path, "a", 5)
    assert again.values.tolist() == codes.values.tolist()
    assert again.start.tolist() == codes.start.tolist()
    assert again.level_sizes == (4, 4, 4)
    assert again.provenance == {"seed": 3}
    assert [path.name for path in (tmp_path / "codes").iterdir()] == ["a.parquet"]
    with pytest.raises(RequestError, match=r"b; legal: a$"):
        load_codes(tmp_path, "b", 5)
    with pytest.raises(RequestError, match="codes of 5 items"):
        load_codes(tmp_path, "a", 6)


@pytest.mark.parametrize(
    ("paths", "sizes", "mode", "message"),
    [
        ([[0], [3]], [3], OnCollision.SHARE, "item 1, level 0: 3; legal: 0 to 2"),
        ([[0], [-1]], [3], OnCollision.SHARE, "item 1, level 0: -1"),
        ([[0], []], [3], OnCollision.SHARE, "item without codes"),
        ([[0, 0]], [3], OnCollision.SHARE, "path of 2 codes"),
        ([[0], [0]], [3], OnCollision.RESOLVE, "2 items on 1 paths"),
        ([], [3], OnCollision.SHARE, "no item"),
    ],
)
def test_bad_codes_are_refused(
    tmp_path: Path, paths: list[list[int]], sizes: list[int], mode: OnCollision, message: str
) -> None:
    Codes.from_lists(paths, sizes, mode).save(tmp_path / "x.parquet")
    with pytest.raises(RequestError, match=message):
        Codes.load(tmp_path / "x.parquet")


def test_build_from_a_dataset(tmp_path: Path) -> None:
    items = pa.table(
        {
            "item_id": ["p", "q", "r"],
            "title": ["P", None, "R"],
        }
    )
    events = [(user, "pqr"[(user + t) % 3], 10 * t + user) for user in range(6) for t in range(5)]
    dataset = import_events(tmp_path, events, items)
    Codes.from_lists([[0, 0], [0, 1], [1, 0]]).save(codes_path(dataset.path, "c"))
    catalogue = Catalogue.build(dataset, "c")
    assert catalogue.item_keys == ("p", "q", "r")
    assert catalogue.titles == ("P", "q", "R")
    assert catalogue.active.all()
    with pytest.raises(RequestError, match="d; legal: c"):
        Catalogue.build(dataset, "d")


def test_lengths_must_agree() -> None:
    with pytest.raises(RequestError, match="titles: 1; legal: 2"):
        Catalogue.from_codes([[0], [1]], ["only one"])
