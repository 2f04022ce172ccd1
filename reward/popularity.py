"""Popularity: every item scores its number of training events, whatever the history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.records import FloatArray, IntArray, LongArray
from reward.artefact import RankerArtefact


class PopularityRanker:
    """Counts of events before the validation boundary (`Dataset.train_counts`)."""

    def __init__(self, count_I: LongArray) -> None:
        self.count_I = np.asarray(count_I, np.int64)
        self.n_items = len(self.count_I)

    def score(self, histories: Sequence[IntArray], candidates: Sequence[IntArray]) -> list[FloatArray]:
        """See `reward.ranker.Ranker`."""
        return [self.count_I[row].astype(np.float32) for row in candidates]

    def score_catalogue(self, histories: Sequence[IntArray]) -> FloatArray:
        """See `reward.ranker.CatalogueRanker`."""
        return np.broadcast_to(self.count_I.astype(np.float32), (len(histories), self.n_items)).copy()

    def save(self, folder: Path, provenance: dict[str, object] | None = None) -> str:
        """Write the ranker artefact and return its digest."""
        return RankerArtefact.write(
            folder, kind="popularity", options={}, tensors={"count": self.count_I}, provenance=provenance
        )

    @classmethod
    def from_artefact(cls, artefact: RankerArtefact) -> PopularityRanker:
        """The ranker of an opened artefact of kind `popularity`."""
        return cls(artefact.tensors["count"])
