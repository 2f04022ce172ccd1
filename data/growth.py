"""A catalogue that grows: the same dataset with further items, whose codes are new, and with items that were retired.

Old items keep their ids, their codes and their tokens; a code that an item ever had, retired or not, goes to no other.
A new item takes a free path near its vector. Where its place is full, the last level gets a new code: only there can a
vocabulary grow without moving a token.

Suffixes: `_ID` item, dimension of the item vectors; `_CD` code of a level, dimension.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.catalogue import Catalogue
from data.code_building import IdSettings, Source, column_values, item_texts
from data.code_vectors import codebooks_path, load_codebooks, save_codebooks
from data.codes import Codes, OnCollision, codes_path, load_codes
from data.dataset import Dataset
from data.embeddings import packaged_model, title_vectors
from data.errors import RequestError
from data.parquet import Digest, fingerprint_of
from data.records import FloatArray, IntArray, LongArray
from data.schema import CARD, ITEMS, write_card
from data.semantic_ids import given_codes, squared_distances


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What came of it."""

    dataset: Dataset
    codes: Codes | None
    """None of a dataset without codes, whose items are titles to a language model."""
    new_items: int
    retired_items: int
    new_codes: int
    """Codes that the last level has more than before."""


def extend_dataset(
    dataset: Dataset, out: Path, *, items: pa.Table | None, retire: Sequence[str], retired_at: int, codes_name: str
) -> Growth:
    """Write a dataset with further and retired items, and its codes, to a new folder; the old one does not change.

    Args:
        dataset: what it is made of.
        out: the new folder.
        items: rows of new items with `item_key`, perhaps `title`, and columns that the old item table has.
        retire: keys of items that are not recommended any more.
        retired_at: seconds since 1970, their `active_to`.
        codes_name: codes that are extended; others are left behind. A dataset that has none needs none.

    Raises:
        RequestError: the folder is there, a key that is there already or unknown, or codes that cannot be extended.
    """
    if out.exists():
        raise RequestError("--out", out, "a folder that is not there yet")
    old = dataset.items()
    table = _retired(_with_rows(old, items), retire, retired_at)
    coded = any(codes_path(dataset.path, codes_name).parent.glob("*.parquet"))
    codes = load_codes(dataset.path, codes_name, dataset.n_items) if coded else None
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(dataset.path, partial, copy_function=_link_or_copy, ignore=shutil.ignore_patterns("codes"))
    # A link to the old file must not be written through.
    for name in (ITEMS, CARD):
        (partial / name).unlink()
    pq.write_table(table, partial / ITEMS, compression="zstd")
    write_card(partial, _card(dataset, table))
    grown = Dataset.open(partial)
    extended = None if codes is None else _extended(dataset, grown, codes, codes_name, table.slice(len(old)))
    partial.rename(out)
    return Growth(
        dataset=Dataset.open(out),
        codes=extended,
        new_items=len(table) - len(old),
        retired_items=len(set(retire)),
        new_codes=0 if extended is None or codes is None else extended.level_sizes[-1] - codes.level_sizes[-1],
    )


def _extended(dataset: Dataset, grown: Dataset, codes: Codes, name: str, new: pa.Table) -> Codes:
    """Write the extended codes of a grown dataset beside it, and return them."""
    path = codebooks_path(dataset.path, name)
    codebooks = load_codebooks(path, codes) if path.is_file() else None
    extended, books = extend_codes(codes, codebooks, new)
    if books is not None:
        save_codebooks(codebooks_path(grown.path, name), extended, books)
    extended.save(codes_path(grown.path, name))
    if not same_tokens(Catalogue.build(dataset, name), Catalogue.build(grown, name)):
        legal = "codes whose paths neither begin nor continue an old one"
        raise RequestError(f"codes {name}", "a new path changes the tokens of an old item", legal)
    return extended


def same_tokens(before: Catalogue, after: Catalogue) -> bool:
    """Whether every item of one catalogue has its id, its key and its tokens in the other, which may have more.

    The end token that closes a title which a later title continues is not looked at: answers end there anyway.
    """
    items = before.n_items
    if after.n_items < items or after.item_keys[:items] != before.item_keys:
        return False
    (values, start), (later_values, later_start) = _own_tokens(before), _own_tokens(after)
    return np.array_equal(later_start[: items + 1], start) and np.array_equal(later_values[: int(start[-1])], values)


def _own_tokens(catalogue: Catalogue) -> tuple[IntArray, LongArray]:
    """Tokens of all paths and where each begins, those of titles without the end token behind some."""
    values, start = catalogue.path_values, catalogue.path_start
    if catalogue.vocabulary.levels:
        return values, start
    ends = values == catalogue.vocabulary.eos
    return values[~ends], start - np.concatenate([[0], np.cumsum(ends)])[start]


def extend_codes(
    codes: Codes, codebooks: Sequence[FloatArray] | None, new: pa.Table
) -> tuple[Codes, tuple[FloatArray, ...] | None]:
    """The codes with paths for new items, and their codebooks.

    Args:
        codes: of the items so far.
        codebooks: of the codes; none for codes that came with the items.
        new: rows of the new items, as in items.parquet.

    Raises:
        RequestError: codes whose settings are not known, or given codes that are new on another level than the last.
    """
    told = codes.provenance.get("settings")
    if not isinstance(told, dict):
        raise RequestError("codes", "without the settings they were made with", "codes made by `windlass data ids`")
    settings = IdSettings.model_validate(told, strict=False)
    if settings.source is Source.COLUMN:
        paths = given_codes(column_values(new, settings.column), f"column {settings.column}")
        added = [paths.values[start:stop].tolist() for start, stop in zip(paths.start, paths.start[1:], strict=False)]
        books: tuple[FloatArray, ...] | None = None
    else:
        if codebooks is None:
            raise RequestError("codes", "without codebooks", "codes whose codebooks lie beside them")
        vectors_ID = new_vectors(new, settings, codebooks[0].shape[1])
        added, books = place_items(codes, codebooks, vectors_ID)
    levels = len(codes.level_sizes)
    for path in added:
        if len(path) > levels or any(code >= codes.level_sizes[level] for level, code in enumerate(path[: levels - 1])):
            legal = f"codes below {list(codes.level_sizes[:-1])} on all levels but the last of {levels}"
            raise RequestError("codes of a new item", path, legal)
    last = max([codes.level_sizes[-1], *(path[-1] + 1 for path in added if len(path) == levels)])
    extended = Codes(
        values=np.concatenate([codes.values, np.asarray([code for path in added for code in path], np.int32)]),
        start=np.concatenate([codes.start, codes.start[-1] + np.cumsum([len(path) for path in added], dtype=np.int64)]),
        level_sizes=(*codes.level_sizes[:-1], last),
        on_collision=codes.on_collision,
        provenance=codes.provenance | {"extended": [*codes.provenance.get("extended", []), len(added)]},
    )
    extended.check("extended codes")
    return extended, books


def place_items(
    codes: Codes, codebooks: Sequence[FloatArray], vectors_ID: FloatArray
) -> tuple[list[list[int]], tuple[FloatArray, ...]]:
    """Paths of new items: the nearest code level by level, on the last one the nearest that nobody has in this place.

    Returns:
        The paths, and the codebooks with the centres of new last codes: what the levels before leave of the item that
        needed one first.
    """
    taken: dict[tuple[int, ...], set[int]] = {}
    for start, stop in zip(codes.start, codes.start[1:], strict=False):
        *place, last = codes.values[start:stop].tolist()
        taken.setdefault(tuple(place), set()).add(last)
    last_CD = [np.asarray(centre_D, np.float32) for centre_D in codebooks[-1]]
    paths = []
    for vector_D in vectors_ID:
        path: list[int] = []
        left_D = vector_D.astype(np.float32)
        for book_CD in codebooks[:-1]:
            path.append(int(squared_distances(left_D[None], book_CD)[0].argmin()))
            left_D = left_D - book_CD[path[-1]]
        there = taken.setdefault(tuple(path), set())
        order = np.argsort(squared_distances(left_D[None], np.stack(last_CD))[0], kind="stable").tolist()
        shared = codes.on_collision is OnCollision.SHARE
        code = order[0] if shared else next((one for one in order if one not in there), len(last_CD))
        if code == len(last_CD):
            last_CD.append(left_D)
        there.add(code)
        paths.append([*path, code])
    return paths, (*codebooks[:-1], np.stack(last_CD))


def new_vectors(new: pa.Table, settings: IdSettings, dims: int) -> FloatArray:
    """Vectors of items that nobody has used yet: their texts where codes are made of texts, else zero."""
    vectors_ID = np.zeros((len(new), dims), np.float32)
    if settings.source in (Source.TITLE, Source.BOTH) and len(new):
        titles_ID = title_vectors(item_texts(new, settings.text_columns), settings.model or packaged_model())
        # The two kinds stand side by side, each scaled to a mean length of one; sentence embeddings have it already.
        weight = settings.title_weight if settings.source is Source.BOTH else 1.0
        vectors_ID[:, dims - titles_ID.shape[1] :] = weight * titles_ID
    return vectors_ID


def _with_rows(old: pa.Table, new: pa.Table | None) -> pa.Table:
    if new is None:
        return old
    if "item_key" not in new.column_names:
        raise RequestError("--items: columns", ", ".join(new.column_names), "item_key, and others of the item table")
    keys = [str(key) if key is not None else "" for key in new["item_key"].to_pylist()]
    known = set(old["item_key"].to_pylist())
    again = [key for place, key in enumerate(keys) if not key or key in known or key in keys[:place]]
    if again:
        raise RequestError("--items: item_key", again[0], "keys that are neither empty, nor there already, nor twice")
    titles = new["title"].to_pylist() if "title" in new.column_names else [None] * len(keys)
    own: dict[str, Any] = {
        "item_id": pa.array(np.arange(len(old), len(old) + len(keys), dtype=np.int32)),
        "item_key": keys,
        "title": [title or key for title, key in zip(titles, keys, strict=True)],
        "has_title": [bool(title) for title in titles],
    }
    columns = []
    for field in old.schema:
        given = own.get(field.name)
        if given is None and field.name in new.column_names:
            columns.append(new[field.name].combine_chunks().cast(field.type))
        else:
            columns.append(pa.nulls(len(keys), field.type) if given is None else pa.array(given, field.type))
    return pa.concat_tables([old, pa.table(columns, schema=old.schema)]).combine_chunks()


def _retired(table: pa.Table, retire: Sequence[str], at: int) -> pa.Table:
    keys = table["item_key"].to_pylist()
    unknown = [key for key in retire if key not in set(keys)]
    if unknown:
        raise RequestError("--retire", unknown[0], "the key of an item")
    gone = set(retire)
    times = [
        at if key in gone and time is None else time
        for key, time in zip(keys, table["active_to"].to_pylist(), strict=True)
    ]
    place = table.column_names.index("active_to")
    return table.set_column(place, table.schema.field("active_to"), pa.array(times, pa.int64()))


def _card(dataset: Dataset, table: pa.Table) -> dict[str, Any]:
    words = zip(table["item_key"].to_pylist(), table["title"].to_pylist(), strict=True)
    text = "\n".join(f"{key}\t{title}" for key, title in words) + "\n"
    digest = Digest(2)
    digest.update(table["item_id"].to_numpy(), np.frombuffer(text.encode(), np.uint8))
    card = dict(dataset.card)
    card["counts"] = dict(card["counts"]) | {"items": len(table)}
    card["digests"] = dict(card["digests"]) | {"items": digest.hexdigest()}
    card["grown_from"] = {"fingerprint": dataset.fingerprint, "items": dataset.n_items}
    card["fingerprint"] = fingerprint_of(card)
    return card


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
