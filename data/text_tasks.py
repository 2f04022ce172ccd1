"""Supervised rows of a language model: next items, and the tasks that align codes with titles, mixed by weights.

A row is a prompt and its answer, and the answer's tokens are what is learned, an end token behind them. Which task a
row of an epoch shows is drawn by the seed, the epoch and the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from data.dataset import Samples
from data.feed import generator
from data.records import BoolArray, IntArray
from data.text_prompts import TextPromptBuilder
from data.text_settings import ItemForm

_TASK_STREAM: Final = 31
TO_CODE: Final = "What are the codes of this item?\n- {}\n"
TO_TITLE: Final = "What is the title of this item?\n- {}\n"


class TaskRows(Sequence[tuple[IntArray, BoolArray]]):
    """The rows of an epoch, each written when it is asked for."""

    def __init__(self, builder: TextPromptBuilder, samples: Samples, *, seed: int, epoch: int) -> None:
        """
        Args:
            builder: writes prompts; its settings have the weights of the tasks.
            samples: a row of each is in an epoch, whatever the task.
            seed: of the order and of the tasks.
            epoch: another order, and other tasks.
        """
        self._builder = builder
        self._samples = samples
        rng = generator(seed, _TASK_STREAM, epoch)
        self._order_N = rng.permutation(len(samples))
        weights = builder.settings.tasks.model_dump()
        share = np.array(list(weights.values()), dtype=np.float64)
        self._task_N = rng.choice(np.array(list(weights)), size=len(samples), p=share / share.sum())

    def __len__(self) -> int:
        return len(self._order_N)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """A row, or a list of rows of a slice."""
        if isinstance(index, slice):
            return [self._row(row) for row in range(*index.indices(len(self)))]
        return self._row(range(len(self))[index])

    def __iter__(self) -> Iterator[tuple[IntArray, BoolArray]]:
        return (self._row(row) for row in range(len(self)))

    def _row(self, place: int) -> tuple[IntArray, BoolArray]:
        row = int(self._order_N[place])
        prompt, answer = self._task(str(self._task_N[place]), row)
        tokens = np.concatenate([prompt, answer]).astype(np.int32)
        mask = np.zeros(len(tokens), dtype=np.bool_)
        mask[len(prompt) :] = True
        return tokens, mask

    def _task(self, task: str, row: int) -> tuple[IntArray, IntArray]:
        builder, samples = self._builder, self._samples
        target = int(samples.target_N[row])
        history = samples.values[int(samples.start_N[row]) : int(samples.end_N[row])]
        history = history[max(0, len(history) - builder.history) :]
        match task:
            case "next_title":
                return builder.written_in(history, ItemForm.TITLES)[1], self._title(target)
            case "next_code":
                return builder.written_in(history, ItemForm.CODES)[1], self._path(target)
            case "title_to_code":
                return self._asked(TO_CODE, target, ItemForm.TITLES), self._path(target)
            case "code_to_title":
                return self._asked(TO_TITLE, target, ItemForm.CODES), self._title(target)
        return builder.written(history)[1], self._path(target)

    def _asked(self, question: str, item: int, form: ItemForm) -> IntArray:
        (text,) = self._builder.texts.of(np.array([item], dtype=np.int32), form)
        tokens = self._builder.encode(self._builder.template.around(question.format(text)))
        return np.asarray(tokens, dtype=np.int32)

    def _path(self, item: int) -> IntArray:
        return self._ended(self._builder.catalogue.tokens(item))

    def _title(self, item: int) -> IntArray:
        ids = self._builder.tokenizer.encode(self._builder.catalogue.titles[item])
        return self._ended(np.asarray(ids, dtype=np.int32))

    def _ended(self, tokens: IntArray) -> IntArray:
        end = self._builder.catalogue.vocabulary.eos
        if len(tokens) and tokens[-1] == end:
            return tokens
        return np.append(tokens, np.int32(end))
