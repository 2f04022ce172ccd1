"""Prompts on their way to another process: a handful of arrays in place of several small ones for every prompt.

Pickling 64 prompts one by one takes 2 ms of the sender's interpreter, which a driver of hundreds of engines has not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from data import ragged
from data.records import IntArray, LongArray, Prompt

NUMBERS = ("prompt_id", "user_id", "target", "timestamp")
ITEMS = ("token_ids", "history", "exclusions")
FURTHER = tuple(field.name for field in dataclasses.fields(Prompt) if field.name not in (*NUMBERS, *ITEMS))
"""Fields that most prompts leave as they are by default."""
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Prompt) if field.name in FURTHER}


class PromptShard(Sequence[Prompt]):
    """A list of prompts that is pickled as columns."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts = list(prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        return self._prompts[index]

    def __len__(self) -> int:
        return len(self._prompts)

    def __reduce__(self) -> tuple[Any, ...]:
        prompts = self._prompts
        numbers = np.array([[getattr(prompt, name) for prompt in prompts] for name in NUMBERS], np.int64)
        rows = [[getattr(prompt, name) for prompt in prompts] for name in ITEMS]
        length = np.array([[len(row) for row in column] for column in rows], np.int64)
        values = np.concatenate([row for column in rows for row in column] or [np.zeros(0, np.int32)])
        further = {
            row: given
            for row, prompt in enumerate(prompts)
            if (given := {name: getattr(prompt, name) for name in FURTHER if _given(getattr(prompt, name), name)})
        }
        return _unpacked, (numbers, length, values, further)


def _given(value: object, name: str) -> bool:
    """Whether a field is not as it is by default; arrays are by default None."""
    return value is not None if DEFAULTS[name] is None else value != DEFAULTS[name]


def _unpacked(
    numbers: LongArray, length: LongArray, values: IntArray, further: dict[int, dict[str, Any]]
) -> PromptShard:
    rows = ragged.split(values, length.reshape(-1))
    columns = [rows[start : start + length.shape[1]] for start in range(0, len(rows), max(length.shape[1], 1))]
    return PromptShard(
        [
            Prompt(
                **dict(zip(NUMBERS, number, strict=True)),
                **dict(zip(ITEMS, items, strict=True)),
                **further.get(row, {}),
            )
            for row, (number, items) in enumerate(zip(numbers.T.tolist(), zip(*columns, strict=True), strict=True))
        ]
    )
