"""Prompts on their way to another process: a handful of arrays in place of several small ones for every prompt.

Pickling 64 prompts one by one takes 2 ms of the sender's interpreter, which a driver of hundreds of engines has not.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from data import ragged
from data.records import IntArray, LongArray, Prompt

NUMBERS = ("prompt_id", "user_id", "target", "timestamp")
ITEMS = ("token_ids", "history", "exclusions")
FURTHER = tuple(field.name for field in dataclasses.fields(Prompt) if field.name not in (*NUMBERS, *ITEMS))
"""Fields that most prompts leave as they are by default."""
_DEFAULTS = tuple(field.default for field in dataclasses.fields(Prompt) if field.name in FURTHER)
_numbers_of, _items_of = operator.attrgetter(*NUMBERS), operator.attrgetter(*ITEMS)
_further_of = operator.attrgetter(*FURTHER)


class Columns(NamedTuple):
    """The fields of prompts."""

    numbers: LongArray
    """[P, 4], a column for each of `NUMBERS`."""
    length: LongArray
    """[3 P], lengths of each of a prompt's `ITEMS`, one prompt after the other."""
    values: IntArray
    """`ITEMS` of all prompts, in that order."""
    further: dict[int, dict[str, Any]]
    """By row: `FURTHER`, where a prompt does not leave them as they are."""


class PromptShard(Sequence[Prompt]):
    """A list of prompts that travels as columns; they are prompts again where somebody reads them."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts: list[Prompt] | None = list(prompts)
        self._columns: Columns | None = None

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts."""
        if self._prompts is None:
            assert self._columns is not None
            self._prompts = _prompts(self._columns)
        return self._prompts

    @property
    def columns(self) -> Columns:
        """What travels."""
        if self._columns is None:
            assert self._prompts is not None
            return _columns(self._prompts)
        return self._columns

    @property
    def prompt_id_P(self) -> LongArray:
        """[P] `Prompt.prompt_id`."""
        prompt_id_P: LongArray = np.ascontiguousarray(self.columns.numbers[:, NUMBERS.index("prompt_id")])
        return prompt_id_P

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        return self.prompts[index]

    def __len__(self) -> int:
        return len(self.prompts) if self._columns is None else len(self._columns.numbers)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, tuple(self.columns)


def _arrived(*columns: Any) -> PromptShard:
    shard = PromptShard(())
    shard._prompts, shard._columns = None, Columns(*columns)
    return shard


def _columns(prompts: Sequence[Prompt]) -> Columns:
    rows = [row for prompt in prompts for row in _items_of(prompt)]
    return Columns(
        numbers=np.array([_numbers_of(prompt) for prompt in prompts], np.int64).reshape(len(prompts), len(NUMBERS)),
        length=np.array([len(row) for row in rows], np.int64),
        values=np.concatenate([np.zeros(0, np.int32), *rows]),
        further={
            row: dict(zip(FURTHER, given, strict=True))
            for row, prompt in enumerate(prompts)
            if any(map(operator.is_not, given := _further_of(prompt), _DEFAULTS))
        },
    )


def _prompts(columns: Columns) -> list[Prompt]:
    rows = iter(ragged.split(columns.values, columns.length))
    found = []
    for row, numbers in enumerate(columns.numbers.tolist()):
        fields: dict[str, Any] = dict(zip(NUMBERS, numbers, strict=True))
        fields |= {name: next(rows) for name in ITEMS}
        found.append(Prompt(**fields, **columns.further.get(row, {})))
    return found
