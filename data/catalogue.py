"""The catalogue: every item's token path, title and whether it may be generated. It travels inside a checkpoint.

The digest is stored with every group and every log line; a checkpoint with another digest is a foreign catalogue.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data import ragged
from data.codes import Codes, OnCollision, load_codes, parse_card
from data.errors import RequestError
from data.parquet import read_table
from data.records import NO_ITEM, BoolArray, IntArray, LongArray
from data.trie import ItemTrie, complete_paths
from data.vocabulary import TextBase, Vocabulary

if TYPE_CHECKING:
    from data.dataset import Dataset

FORMAT: Final = 1
"""Version of the layout of a catalogue folder."""
CARD: Final = "catalogue.json"
ITEMS: Final = "items.parquet"
_SCHEMA: Final = pa.schema(
    [
        pa.field("item_id", pa.int32(), nullable=False),
        pa.field("item_key", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("active", pa.bool_(), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Catalogue:
    """Items 0..n_items-1."""

    vocabulary: Vocabulary
    path_values: IntArray
    """Token ids of all paths, one after the other; an end token closes a path that others continue."""
    path_start: LongArray
    """[n_items+1]; path of item i is `path_values[path_start[i]:path_start[i+1]]`."""
    active: BoolArray
    """[n_items], false for retired items: they stay in histories and can be scored, but are never generated."""
    titles: tuple[str, ...]
    item_keys: tuple[str, ...]
    """Keys of the items in their source."""
    on_collision: OnCollision
    provenance: dict[str, Any]
    """Where the codes come from."""

    @staticmethod
    def from_codes(
        codes: list[list[int]] | Codes,
        titles: Sequence[str] | None = None,
        *,
        item_keys: Sequence[str] | None = None,
        active: npt.ArrayLike | None = None,
    ) -> Catalogue:
        """A catalogue from one path of codes per item; titles default to `item 0`, keys to `0`, all items are active.

        Raises:
            RequestError: codes that `Codes.check` refuses, or arguments of different lengths.
        """
        if not isinstance(codes, Codes):
            codes = Codes.from_lists(codes)
        codes.check("codes")
        n_items = codes.n_items
        names = tuple(titles) if titles is not None else tuple(f"item {item}" for item in range(n_items))
        keys = tuple(item_keys) if item_keys is not None else tuple(str(item) for item in range(n_items))
        is_active = np.ones(n_items, dtype=bool) if active is None else np.array(active, dtype=bool)
        for what, found in (("titles", len(names)), ("item keys", len(keys)), ("active", len(is_active))):
            if found != n_items:
                raise RequestError(f"catalogue: {what}", found, f"{n_items}, one per item")
        vocabulary = Vocabulary(list(codes.level_sizes))
        level = np.arange(len(codes.values)) - np.repeat(codes.start[:-1], np.diff(codes.start))
        tokens = vocabulary.code_tokens(level, codes.values).astype(np.int32)
        values, start = complete_paths(tokens, codes.start, vocabulary.eos)
        return Catalogue(
            vocabulary=vocabulary,
            path_values=values,
            path_start=start,
            active=is_active,
            titles=names,
            item_keys=keys,
            on_collision=codes.on_collision,
            provenance=codes.provenance,
        )

    @staticmethod
    def build(dataset: Dataset, codes_name: str, at: int | None = None) -> Catalogue:
        """The catalogue of a dataset with the codes of that name.

        Args:
            at: time in seconds that decides which items are active (`active_from <= at < active_to`); by default the
                end of time, so that an item with an `active_to` is retired.

        Raises:
            RequestError: no such codes, or codes that do not fit the dataset.
        """
        codes = load_codes(dataset.path, codes_name, dataset.n_items)
        table = dataset.items()
        return Catalogue.from_codes(
            codes,
            table["title"].to_pylist(),
            item_keys=table["item_key"].to_pylist(),
            active=active_items(table, at),
        )

    @property
    def n_items(self) -> int:
        """Number of items, retired ones included."""
        return len(self.path_start) - 1

    def tokens(self, item: int) -> IntArray:
        """Token path of an item."""
        return self.path_values[self.path_start[item] : self.path_start[item + 1]]

    def tokens_of(self, items: npt.NDArray[np.integer]) -> tuple[IntArray, IntArray]:
        """Token paths of many items, one after the other, and the length of each."""
        length = (self.path_start[items + 1] - self.path_start[items]).astype(np.int64)
        return self.path_values[ragged.positions(self.path_start[items], length)], length.astype(np.int32)

    def padded_tokens(self, items: npt.NDArray[np.integer]) -> tuple[IntArray, IntArray]:
        """Token paths of items of any shape, padded with -1 to the longest on a last axis, and the length of each.

        `NO_ITEM` has length 0.
        """
        known = items != NO_ITEM
        tokens, length = self.tokens_of(items[known])
        length_of = np.zeros(items.shape, dtype=np.int32)
        length_of[known] = length
        padded = np.full((*items.shape, int(length.max(initial=0))), -1, dtype=np.int32)
        padded[np.arange(padded.shape[-1]) < length_of[..., None]] = tokens
        return padded, length_of

    def trie(self) -> ItemTrie:
        """The trie of the active items, on the CPU; built once."""
        return self._trie

    @cached_property
    def _trie(self) -> ItemTrie:
        return ItemTrie.build(self.path_values, self.path_start, self.active)

    @cached_property
    def path_id(self) -> IntArray:
        """[n_items], the smallest item with the same path, retired ones included: equal for items of one leaf."""
        first: dict[bytes, int] = {}
        paths = (self.tokens(item).tobytes() for item in range(self.n_items))
        return np.asarray([first.setdefault(path, item) for item, path in enumerate(paths)], dtype=np.int32)

    @cached_property
    def active_path_id(self) -> IntArray:
        """[n_items], `path_id` of the active items and `NO_ITEM` of the retired ones.

        A completion is a path, so two items are the same answer when these numbers are equal; a retired item is
        nobody's answer, also where an active one has its path.
        """
        return np.where(self.active, self.path_id, NO_ITEM).astype(np.int32)

    def leaf_items(self, item: int) -> IntArray:
        """The active items of the leaf of an item, increasing; empty for a retired item."""
        trie = self.trie()
        leaf = int(trie.item_leaf_I[item])
        if leaf < 0:
            return np.zeros(0, dtype=np.int32)
        start, stop = trie.item_start_V[leaf : leaf + 2].tolist()
        return trie.item_values_I[start:stop].numpy().astype(np.int32)

    def retire(self, items: npt.ArrayLike) -> Catalogue:
        """The same catalogue in which the given items are not generated any more."""
        active = self.active.copy()
        active[np.asarray(items)] = False
        return dataclasses.replace(self, active=active)

    def with_words(self, words: Sequence[str]) -> Catalogue:
        """The same items in a vocabulary that also has the given words."""
        return dataclasses.replace(self, vocabulary=self.vocabulary.with_words(words))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over vocabulary, paths, active items, keys and titles."""
        state = hashlib.sha256(repr((FORMAT, self.vocabulary.level_sizes, self.n_items)).encode())
        if self.vocabulary.further_words:
            state.update(json.dumps(self.vocabulary.further_words).encode())
        if self.vocabulary.text is not None:
            state.update(json.dumps(self.vocabulary.text.record(), sort_keys=True).encode())
        for array in (self.path_values.astype("<i4"), self.path_start.astype("<i8"), self.active):
            state.update(np.ascontiguousarray(array).tobytes())
        state.update(json.dumps([self.item_keys, self.titles]).encode())
        return state.hexdigest()

    def save(self, folder: Path | str) -> None:
        """Write the folder (made when missing): items.parquet, then catalogue.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tokens = pa.ListArray.from_arrays(pa.array(self.path_start.astype(np.int32)), pa.array(self.path_values))
        columns = [
            pa.array(np.arange(self.n_items, dtype=np.int32)),
            pa.array(self.item_keys, pa.string()),
            pa.array(self.titles, pa.string()),
            pa.array(self.active),
            tokens,
        ]
        pq.write_table(pa.table(columns, schema=_SCHEMA), folder / ITEMS)
        card = {
            "format": FORMAT,
            "digest": self.digest,
            "n_items": self.n_items,
            "n_active": int(self.active.sum()),
            "level_sizes": list(self.vocabulary.level_sizes),
            "further_words": list(self.vocabulary.further_words),
            "on_collision": self.on_collision.value,
            "provenance": self.provenance,
        }
        if self.vocabulary.text is not None:
            card["text"] = self.vocabulary.text.record()
        (folder / CARD).write_text(json.dumps(card, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path | str) -> Catalogue:
        """Read a folder written by `save`.

        Raises:
            RequestError: no catalogue there, another format version, or content that differs from its digest.
        """
        folder = Path(folder)
        card = _read_card(folder)
        table = read_table(folder / ITEMS, _SCHEMA)
        paths = table["tokens"].combine_chunks()
        lengths = paths.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        catalogue = Catalogue(
            vocabulary=Vocabulary(
                [int(size) for size in card["level_sizes"]], _further_words(folder, card), text=_text_base(folder, card)
            ),
            path_values=paths.flatten().fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32),
            path_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            active=table["active"].combine_chunks().fill_null(False).to_numpy(zero_copy_only=False),
            titles=tuple(table["title"].to_pylist()),
            item_keys=tuple(table["item_key"].to_pylist()),
            on_collision=OnCollision(card["on_collision"]),
            provenance=dict(card["provenance"]),
        )
        if catalogue.digest != card["digest"]:
            raise RequestError(str(folder), f"digest {catalogue.digest}", f"{card['digest']}, as catalogue.json says")
        return catalogue


def active_items(table: pa.Table, at: int | None = None) -> BoolArray:
    """[n_items], the items of a dataset's table that are active at a time (`Catalogue.build`)."""
    active = np.ones(len(table), dtype=bool)
    latest = np.iinfo(np.int64).max
    now = latest - 1 if at is None else at
    active &= _times(table["active_from"], np.iinfo(np.int64).min) <= now
    active &= _times(table["active_to"], latest) > now
    return active


def _text_base(folder: Path, card: dict[str, Any]) -> TextBase | None:
    """The language model's own tokens; none where the codes are the whole vocabulary."""
    return TextBase.of_record(f"{folder / CARD}: text", card["text"]) if "text" in card else None


def _times(column: pa.ChunkedArray, missing: int) -> LongArray:
    times: LongArray = column.combine_chunks().fill_null(missing).to_numpy(zero_copy_only=False)
    return times


def _further_words(folder: Path, card: dict[str, Any]) -> list[str]:
    """Words after the codes; folders from before lists have none."""
    words = card.get("further_words", [])
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise RequestError(f"{folder / CARD}: further_words", repr(words), "a list of words")
    return words


def _read_card(folder: Path) -> dict[str, Any]:
    path = folder / CARD
    legal = "a catalogue folder of a windlass checkpoint"
    if not path.is_file():
        raise RequestError(str(folder), f"no {CARD} in it" if folder.is_dir() else "no such folder", legal)
    card = parse_card(str(path), path.read_bytes(), FORMAT, legal)
    if not isinstance(card.get("digest"), str):
        raise RequestError(f"{path}: digest", repr(card.get("digest")), legal)
    return card
