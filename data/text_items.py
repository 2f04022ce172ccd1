"""Items of a language model: paths of code tokens behind its own tokens, or the tokens of titles."""

from __future__ import annotations

import dataclasses

import numpy as np

from data.catalogue import Catalogue, active_items
from data.codes import OnCollision
from data.dataset import Dataset
from data.errors import RequestError
from data.text_tokenizer import TextTokenizer
from data.trie import complete_paths
from data.vocabulary import TextBase, Vocabulary


def code_catalogue(catalogue: Catalogue, text: TextBase) -> Catalogue:
    """A catalogue of codes whose tokens come after those of a language model."""
    own = catalogue.vocabulary
    vocabulary = Vocabulary(own.level_sizes, own.further_words, text=text)
    shift = vocabulary.first_code - own.first_code
    values = np.where(catalogue.path_values == own.eos, vocabulary.eos, catalogue.path_values + shift)
    return dataclasses.replace(catalogue, vocabulary=vocabulary, path_values=values.astype(np.int32))


def title_catalogue(dataset: Dataset, tokenizer: TextTokenizer, text: TextBase, most_tokens: int) -> Catalogue:
    """A catalogue whose paths are the tokens of titles, of unequal length.

    Items of one title share a leaf, as items of one semantic ID do. The end token closes a title that begins another.

    Args:
        most_tokens: of a title.

    Raises:
        RequestError: a title of no tokens, of more than `most_tokens`, or with the end token; names the item.
    """
    table = dataset.items()
    titles, keys = table["title"].to_pylist(), table["item_key"].to_pylist()
    paths = tokenizer.encode_all(titles)
    for key, title, path in zip(keys, titles, paths, strict=True):
        if not path:
            raise RequestError(f"title of item {key}", repr(title), "a title of at least one token; text.items: codes")
        if text.eos in path:
            raise RequestError(f"title of item {key}", f"{title!r} has the model's end token", "a title of plain words")
        if len(path) > most_tokens:
            raise RequestError(
                f"title of item {key}",
                f"{title!r} has {len(path)} tokens",
                f"at most text.title_tokens, {most_tokens}; the longest title has {max(map(len, paths))}",
            )
    start = np.concatenate([[0], np.cumsum([len(path) for path in paths], dtype=np.int64)]).astype(np.int64)
    values, start = complete_paths(np.concatenate(paths).astype(np.int32), start, text.eos)
    return Catalogue(
        vocabulary=Vocabulary([], text=text),
        path_values=values,
        path_start=start,
        active=active_items(table),
        titles=tuple(titles),
        item_keys=tuple(keys),
        on_collision=OnCollision.SHARE,
        provenance={"items": "titles"},
    )
