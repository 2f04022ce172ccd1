"""The vocabulary: four special tokens, then one token per (level, code), level by level, then further words.

In a pretrained language model the tokens of its tokenizer (`TextBase`) take the place of the four; where items are
written as titles there are no codes at all.

A recommender of single items that is trained from scratch needs no further words, so its vocabulary is exactly what a
semantic ID can say; every token id means the same in the engine, the learner and the item trie. Ranked lists need
words for needs and for the parts of a prompt (`list_words`). They come last, so they change no other token's id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from data.errors import RequestError
from data.records import LongArray

SPECIAL_TOKENS: Final = ("<pad>", "<bos>", "<eos>", "<unk>")
LEVEL_NAMES: Final = "abcdefghijklmnopqrstuvwxyz"
CANDIDATES_WORD: Final = "<candidates>"
"""Separates the need from the candidates in a prompt."""
LIST_WORD: Final = "<list>"
"""Begins a list: the last token of the prompt, or of the free text before the list."""


def need_word(word: str) -> str:
    """The token of a word of a need's instruction."""
    return f"<need:{word}>"


def list_words(instruction_words: Sequence[str]) -> tuple[str, ...]:
    """The further words of a vocabulary for lists, given the words of all instructions."""
    return (CANDIDATES_WORD, LIST_WORD, *(need_word(word) for word in instruction_words))


ROW_MULTIPLE: Final = 64
"""The embedding of an extended language model has a multiple of this many rows, as engines lay it out."""


@dataclass(frozen=True, kw_only=True)
class TextBase:
    """The vocabulary of a pretrained language model, before anything is added."""

    tokens: int
    """Tokens of its tokenizer; the next id is free."""
    rows: int
    """Rows of its embedding, the same or more."""
    pad: int
    bos: int
    """Token that begins a text; the end token where the tokenizer has no such token."""
    eos: int
    """Token that ends a text, and an answer."""

    def record(self) -> dict[str, int]:
        """For a file."""
        return asdict(self)

    @classmethod
    def of_record(cls, where: str, record: Any) -> Self:
        """From a file.

        Raises:
            RequestError: another content than `record` gives.
        """
        names = set(cls.__dataclass_fields__)
        whole = isinstance(record, dict) and set(record) == names
        if not whole or not all(isinstance(value, int) and value >= 0 for value in record.values()):
            raise RequestError(where, repr(record), f"numbers for {', '.join(sorted(names))}")
        return cls(**record)


class Vocabulary:
    """Token ids of codes. `level_sizes[l]` codes exist at level l; code c of level l is written `<a_c>`, `<b_c>`, …"""

    unk: Final = 3
    """Only beside the three other special tokens, not in a language model."""

    def __init__(
        self, level_sizes: Sequence[int], further_words: Sequence[str] = (), *, text: TextBase | None = None
    ) -> None:
        """
        Args:
            level_sizes: number of codes of each level; none only in a language model, whose items are titles then.
            further_words: words after the codes, such as `list_words`; each written `<...>`.
            text: the language model's own tokens, which come first; by default the four special ones.

        Raises:
            RequestError: no level, a level without codes, or a word that is malformed or there already.
        """
        if not (0 if text else 1) <= len(level_sizes) <= len(LEVEL_NAMES):
            raise RequestError("codes: levels", len(level_sizes), f"1 to {len(LEVEL_NAMES)}")
        if min(level_sizes, default=1) < 1:
            raise RequestError("codes: codes per level", level_sizes, "at least 1 at every level")
        self.text = text
        self.pad, self.bos, self.eos = (0, 1, 2) if text is None else (text.pad, text.bos, text.eos)
        self.first_code = len(SPECIAL_TOKENS) if text is None else text.tokens
        """Token id of the first code; `eos` also ends the path of an item that begins another item's path."""
        self.level_sizes = tuple(int(size) for size in level_sizes)
        self.level_offsets: LongArray = self.first_code + np.cumsum([0, *self.level_sizes], dtype=np.int64)
        self.further_words = tuple(further_words)
        odd = [word for word in self.further_words if not re.fullmatch(r"<[^<>\s]+>", word)]
        if odd or len({*SPECIAL_TOKENS, *self.further_words}) < len(SPECIAL_TOKENS) + len(self.further_words):
            found = ", ".join(odd or self.further_words)
            raise RequestError("vocabulary: further words", found, "different words of the form <name>")
        if any(re.fullmatch(r"<[a-z]_\d+>", word) for word in self.further_words):
            raise RequestError("vocabulary: further words", ", ".join(self.further_words), "words that are no codes")

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.level_offsets[-1]) + len(self.further_words)

    @property
    def size(self) -> int:
        """Rows of the model's embedding: the tokens, and in a language model rows that pad them (no token's)."""
        if self.text is None:
            return self.tokens
        if self.tokens <= self.text.rows:
            return self.text.rows
        return -(-self.tokens // ROW_MULTIPLE) * ROW_MULTIPLE

    def with_words(self, words: Sequence[str]) -> Vocabulary:
        """The vocabulary with those of the words that it does not have, after all others."""
        new = [word for word in words if word not in self.further_words]
        return Vocabulary(self.level_sizes, [*self.further_words, *new], text=self.text)

    def word_token(self, word: str) -> int:
        """Token id of one of the further words.

        Raises:
            RequestError: the vocabulary does not have it.
        """
        if word not in self.further_words:
            legal = ", ".join(self.further_words) or "none: the model was not made for lists"
            raise RequestError("vocabulary: word", word, legal)
        return int(self.level_offsets[-1]) + self.further_words.index(word)

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.level_sizes)

    def code_token(self, level: int, code: int) -> int:
        """Token id of a code.

        Raises:
            RequestError: there is no such level or code.
        """
        if not 0 <= level < self.levels:
            raise RequestError("codes: level", level, f"0 to {self.levels - 1}")
        if not 0 <= code < self.level_sizes[level]:
            raise RequestError(f"codes: code at level {level}", code, f"0 to {self.level_sizes[level] - 1}")
        return int(self.level_offsets[level]) + code

    def code_tokens(self, level_N: npt.NDArray[np.integer], code_N: npt.NDArray[np.integer]) -> LongArray:
        """Token ids of many codes at once; the same errors as `code_token`."""
        outside = (level_N < 0) | (level_N >= self.levels)
        if not outside.any():
            outside = (code_N < 0) | (code_N >= np.asarray(self.level_sizes)[level_N])
        if outside.any():
            first = int(np.flatnonzero(outside)[0])
            self.code_token(int(level_N[first]), int(code_N[first]))
        tokens: LongArray = self.level_offsets[level_N] + code_N.astype(np.int64)
        return tokens

    def words(self) -> list[str]:
        """The written form of every token in the order of the ids; of a language model's own tokens not."""
        codes = [
            f"<{LEVEL_NAMES[level]}_{code}>" for level, size in enumerate(self.level_sizes) for code in range(size)
        ]
        return [*(SPECIAL_TOKENS if self.text is None else ()), *codes, *self.further_words]

    def save_tokenizer(self, folder: Path) -> None:
        """Write a tokenizer that `AutoTokenizer.from_pretrained(folder)` loads, with the same token ids.

        It adds no token by itself: what it encodes is what the text says. The tokenizer of a language model is
        extended and saved by `data.text_tokenizer`.
        """
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = {word: token for token, word in enumerate(self.words())}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"<[^<>]*>"), "isolated")]
        )
        tokenizer.decoder = decoders.Fuse()
        pad, bos, eos, unk = SPECIAL_TOKENS
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk
        ).save_pretrained(str(folder))
        # Transformers picks the class of the model's family when the file leaves room for it, so the file must not.
        config_path = Path(folder) / "tokenizer_config.json"
        config = json.loads(config_path.read_text())
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config_path.write_text(json.dumps(config, indent=2) + "\n")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[tuple[int, ...], tuple[str, ...], TextBase | None]:
        return self.level_sizes, self.further_words, self.text

    def __repr__(self) -> str:
        return f"Vocabulary(level_sizes={list(self.level_sizes)}, size={self.size})"
