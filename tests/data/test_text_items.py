"""Contract: items of a language model are paths of code tokens behind its own, or of title tokens; titles of unequal
length, of one another's beginning and twice the same make a trie in which every item is reached.

Not checked here: decoding over the trie (tests/trainer/test_language_model.py, tests/launch/test_language_job.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data.catalogue import Catalogue
from data.dataset import Dataset
from data.errors import RequestError
from data.records import NO_ITEM
from data.text_items import code_catalogue, title_catalogue
from data.text_tokenizer import TextTokenizer
from data.trie_constraint import TrieConstraint
from data.vocabulary import TextBase, Vocabulary
from tests.data.tiny import import_events
from tests.tiny_language import write_tokenizer

TITLES = ["Toy Story", "Toy Story 2", "Heat", "Heat", "Toy", "Up"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return TextTokenizer.open(folder)


def dataset(folder: Path, titles: list[str]) -> Dataset:
    """Items whose keys are in the order of the titles."""
    events = [(user, f"k{item}", 10 * user + item) for user in range(6) for item in range(len(titles))]
    made = import_events(folder, events)
    import pyarrow.parquet as pq

    path = made.path / "items.parquet"
    table = pq.read_table(path)
    order = [titles[int(key[1:])] for key in table["item_key"].to_pylist()]
    place = table.column_names.index("title")
    pq.write_table(table.set_column(place, table.schema.field("title"), [order]), path)
    return Dataset.open(made.path)


def test_every_title_is_reached(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    base = tokenizer.base(400)
    catalogue = title_catalogue(dataset(tmp_path, TITLES), tokenizer, base, 20)
    assert catalogue.vocabulary.size == 400
    assert sorted(catalogue.titles) == sorted(TITLES)
    constraint = TrieConstraint(catalogue.trie(), exclude=True)
    reached: list[tuple[str, int]] = []

    def walk(state: object, text: list[int]) -> None:
        item = int(constraint.items(state)[0])  # type: ignore[arg-type]
        if item != NO_ITEM:
            reached.append((tokenizer.decode([token for token in text if token != base.eos]), item))
            return
        tokens, legal = constraint.legal(state)  # type: ignore[arg-type]
        for token in tokens[legal].tolist():
            walk(constraint.advance(state, torch.tensor([0]), torch.tensor([token])), [*text, token])  # type: ignore[arg-type]

    walk(constraint.start([np.zeros(0, np.int32)]), [])
    assert sorted(title for title, _ in reached) == sorted(set(TITLES))
    for title, item in reached:
        assert catalogue.titles[item] == title
    twice = [item for item, title in enumerate(catalogue.titles) if title == "Heat"]
    assert catalogue.leaf_items(twice[1]).tolist() == twice
    # A title that begins another is closed by the end token, and no other one is.
    ended = {catalogue.titles[i] for i in range(6) if catalogue.tokens(i)[-1] == base.eos}
    assert ended == {"Toy", "Toy Story"}


def test_it_comes_back_from_its_folder(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    catalogue = title_catalogue(dataset(tmp_path / "d", TITLES), tokenizer, tokenizer.base(400), 20)
    catalogue.save(tmp_path / "catalogue")
    loaded = Catalogue.load(tmp_path / "catalogue")
    assert loaded.digest == catalogue.digest
    assert loaded.vocabulary == catalogue.vocabulary
    other = title_catalogue(dataset(tmp_path / "e", TITLES), tokenizer, tokenizer.base(448), 20)
    assert other.digest != catalogue.digest


@pytest.mark.parametrize(
    ("titles", "limit", "message"),
    [
        (["Heat", ""], 20, r"title of item k1: ''; legal: a title of at least one token"),
        (["Heat", "Heat<|end|>"], 20, r"title of item k1: 'Heat<\|end\|>' has the model's end token"),
        (
            ["Heat", "Toy Story"],
            4,
            r"title of item k1: 'Toy Story' has \d+ tokens; legal: at most text\.title_tokens, 4",
        ),
    ],
)
def test_titles_that_cannot_be_written(
    tmp_path: Path, tokenizer: TextTokenizer, titles: list[str], limit: int, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        title_catalogue(dataset(tmp_path, titles), tokenizer, tokenizer.base(400), limit)


def test_codes_come_behind_the_tokenizers_tokens() -> None:
    text = TextBase(tokens=330, rows=330, pad=0, bos=1, eos=2)
    plain = Catalogue.from_codes([[0, 1], [0], [1, 2]])
    catalogue = code_catalogue(plain, text)
    assert [catalogue.tokens(item).tolist() for item in range(3)] == [[330, 333], [330, 2], [331, 334]]
    assert [plain.tokens(item).tolist() for item in range(3)] == [[4, 7], [4, 2], [5, 8]]
    vocabulary = catalogue.vocabulary
    assert (vocabulary.first_code, vocabulary.tokens, vocabulary.size) == (330, 335, 384)
    assert vocabulary.words() == ["<a_0>", "<a_1>", "<b_0>", "<b_1>", "<b_2>"]


@pytest.mark.parametrize(
    ("tokens", "rows", "size"), [(330, 400, 400), (330, 335, 335), (330, 334, 384), (379, 379, 384)]
)
def test_rows_of_the_model(tokens: int, rows: int, size: int) -> None:
    """Free rows of the base are used before any is added."""
    assert Vocabulary([2, 3], text=TextBase(tokens=tokens, rows=rows, pad=0, bos=1, eos=2)).size == size
