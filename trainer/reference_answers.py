"""The reference's answers for every state, kept as Parquet: asked once, read by every run that shares the file.

A state is named by the row of its action among the dataset's events. The file's metadata say which model answered (the
digest of its weights), to which dataset, and how it was asked; a file that was asked otherwise is refused. What is kept
is what was answered, in order; the weights of a state are made when the answers are read.

Source: methods.md section 5, "Reference". Suffixes: `_M` state, `_N` transition, `_R` answer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import RequestError
from data.records import NO_ITEM, FloatArray, IntArray, LongArray
from trainer.durable import sync_file
from trainer.laac_settings import Weighting

FORMAT = 1
_ASKED = b"windlass.reference"
SCHEMA = pa.schema(
    [
        pa.field("event_id", pa.int64(), nullable=False),
        pa.field("user_id", pa.int32(), nullable=False),
        pa.field("answers", pa.list_(pa.int32()), nullable=False),
    ]
)


class AnswerCount(StrEnum):
    """What became of the states and their answers; metrics of the reference."""

    STATES = "states"
    """States that have a valid answer."""
    MASKED = "masked"
    """States that were asked and have none; left out of gap and grounding."""
    NOT_ASKED = "not_asked"
    """States beyond `reference.states`; left out of gap and grounding."""
    UNKNOWN = "unknown"
    """Answers that are no item of the dataset; dropped."""
    REPEATED = "repeated"
    """Answers that an earlier one of the state gives; dropped."""


@dataclass(frozen=True, kw_only=True)
class ReferenceAnswers:
    """Answers of states, best first."""

    event_M: LongArray
    """Ascending."""
    user_M: IntArray
    item_MR: IntArray
    """Negative behind the last answer."""
    asked: dict[str, Any]
    """Model, dataset and settings that the answers come from."""

    def write(self, path: Path) -> None:
        """Write the file; it appears whole, by rename."""
        rows = [[int(item) for item in row if item >= 0] for row in self.item_MR]
        table = pa.table(
            [pa.array(self.event_M), pa.array(self.user_M), pa.array(rows, SCHEMA.field("answers").type)],
            schema=SCHEMA.with_metadata({_ASKED: json.dumps({"format": FORMAT, **self.asked}).encode()}),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        pq.write_table(table, temporary)
        sync_file(temporary)
        temporary.replace(path)

    @staticmethod
    def read(path: Path, asked: dict[str, Any]) -> ReferenceAnswers:
        """Read a file that was asked as told; a key of `asked` that is None may be anything.

        Raises:
            RequestError: it cannot be read, is of another format, was asked otherwise, or holds no answer.
        """
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise RequestError(str(path), f"cannot be read ({error})", "a reference cache of windlass") from error
        found = json.loads((table.schema.metadata or {}).get(_ASKED, b"{}"))
        if found.get("format") != FORMAT or not table.schema.equals(SCHEMA):
            raise RequestError(str(path), f"format {found.get('format')!r}", f"a reference cache of format {FORMAT}")
        for name, value in asked.items():
            if value is not None and found.get(name) != value:
                legal = f"{value!r}, or another laac.reference.cache"
                raise RequestError(f"{path}: {name}", repr(found.get(name)), legal)
        lists = table["answers"].combine_chunks()
        length_M = lists.value_lengths().to_numpy(zero_copy_only=False)
        if not len(table) or not length_M.any():
            raise RequestError(str(path), f"no answer of {len(table)} states", "a cache with answers; remove this one")
        item_MR = np.full((len(table), int(length_M.max())), NO_ITEM, np.int32)
        item_MR[np.arange(item_MR.shape[1]) < length_M[:, None]] = lists.flatten().to_numpy(zero_copy_only=False)
        found.pop("format")
        return ReferenceAnswers(
            event_M=table["event_id"].to_numpy(),
            user_M=table["user_id"].to_numpy(),
            item_MR=item_MR,
            asked=found,
        )

    def of(self, event_N: LongArray) -> tuple[IntArray, int]:
        """Answers `[N, R]` of states, none where a state was not asked, and how many were not."""
        at_N = np.minimum(np.searchsorted(self.event_M, event_N), max(len(self.event_M) - 1, 0))
        asked_N = self.event_M[at_N] == event_N
        return np.where(asked_N[:, None], self.item_MR[at_N], NO_ITEM).astype(np.int32), int((~asked_N).sum())


def weighted(item_NR: IntArray, n_items: int, weighting: Weighting) -> tuple[IntArray, FloatArray, dict[str, int]]:
    """The valid distinct answers of each state with their probabilities, and counts of what was dropped.

    Returns:
        items `[N, R]` (0 where there is none), weights `[N, R]` (0 there; a row without an answer has zeros only), and
        `AnswerCount`s. 1/rank counts the valid answers.
    """
    unknown_NR = (item_NR >= n_items) | (item_NR < NO_ITEM)
    kept_NR = (item_NR >= 0) & ~unknown_NR
    repeated_NR = np.zeros_like(kept_NR)
    for place in range(1, item_NR.shape[1]):
        earlier = kept_NR[:, :place] & (item_NR[:, :place] == item_NR[:, place : place + 1])
        repeated_NR[:, place] = kept_NR[:, place] & earlier.any(1)
    valid_NR = kept_NR & ~repeated_NR
    rank_NR = np.cumsum(valid_NR, 1)
    raw_NR = np.where(valid_NR, 1.0 if weighting is Weighting.UNIFORM else 1.0 / np.maximum(rank_NR, 1), 0.0)
    weight_NR = (raw_NR / np.maximum(raw_NR.sum(1, keepdims=True), 1e-12)).astype(np.float32)
    counts = {
        AnswerCount.STATES.value: int(valid_NR.any(1).sum()),
        AnswerCount.UNKNOWN.value: int(unknown_NR.sum()),
        AnswerCount.REPEATED.value: int(repeated_NR.sum()),
    }
    return np.where(valid_NR, item_NR, 0).astype(np.int32), weight_NR, counts
