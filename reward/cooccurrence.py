"""Item-to-item co-occurrence: items that stood close together in the training sequences recommend one another.

A pair of events of one user at distance d <= window counts 1/d in both directions; the pair weight is divided by both
items' event counts to the power `normalisation` (0.5 is the cosine). A history scores an item by the sum of its
weights, newer items counting more; items without any common neighbour follow in the order of popularity.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse

from data.dataset import Sequences
from data.records import FloatArray, IntArray, LongArray
from reward.artefact import RankerArtefact

POPULARITY_SHARE = 1e-6
"""Weight of the popularity that orders the items without a common neighbour; below any pair that matters."""


class CooccurrenceRanker:
    """Sparse item-to-item weights and event counts."""

    def __init__(self, weight_II: scipy.sparse.csr_array, count_I: LongArray, *, recency: float, history: int) -> None:
        self.weight_II = weight_II
        self.count_I = np.asarray(count_I, np.int64)
        self.recency = recency
        self.history = history
        self.n_items = len(self.count_I)
        self._popularity_I = (POPULARITY_SHARE * self.count_I / max(1, self.count_I.max(initial=0))).astype(np.float32)

    @classmethod
    def fit(
        cls, sequences: Sequences, n_items: int, *, window: int, normalisation: float, recency: float, history: int
    ) -> CooccurrenceRanker:
        """Count the events of the sequences, each of which may hold training events only."""
        lengths = sequences.end_S - sequences.start_S
        owner_E = np.repeat(np.arange(len(lengths)), lengths)
        item_E = np.concatenate(
            [
                np.zeros(0, np.int32),
                *(sequences.values[a:b] for a, b in zip(sequences.start_S, sequences.end_S, strict=True)),
            ]
        )
        count_I = np.bincount(item_E, minlength=n_items).astype(np.int64)
        total = scipy.sparse.csr_array((n_items, n_items), dtype=np.float64)
        for distance in range(1, window + 1):
            same_E = owner_E[distance:] == owner_E[:-distance]
            earlier, later = item_E[:-distance][same_E], item_E[distance:][same_E]
            weight = np.full(len(earlier), 1.0 / distance)
            pairs = scipy.sparse.coo_array((weight, (earlier, later)), shape=(n_items, n_items)).tocsr()
            total = total + pairs + pairs.T
        scale = scipy.sparse.diags_array(np.maximum(count_I, 1).astype(np.float64) ** -normalisation)
        weight_II = scipy.sparse.csr_array(scale @ total @ scale).astype(np.float32)
        weight_II.sort_indices()
        return cls(weight_II, count_I, recency=recency, history=history)

    def score(self, histories: Sequence[IntArray], candidates: Sequence[IntArray]) -> list[FloatArray]:
        """See `reward.ranker.Ranker`."""
        return [self._row(history)[wanted] for history, wanted in zip(histories, candidates, strict=True)]

    def score_catalogue(self, histories: Sequence[IntArray]) -> FloatArray:
        """See `reward.ranker.CatalogueRanker`."""
        return np.stack([self._row(history) for history in histories])

    def _row(self, history: IntArray) -> FloatArray:
        newest_first = np.asarray(history)[::-1][: self.history]
        recency = self.recency ** np.arange(len(newest_first))
        score_I = self._popularity_I.astype(np.float64)
        indptr, indices, data = self.weight_II.indptr, self.weight_II.indices, self.weight_II.data
        for item, weight in zip(newest_first.tolist(), recency.tolist(), strict=True):
            row = slice(indptr[item], indptr[item + 1])
            score_I[indices[row]] += weight * data[row]
        score: FloatArray = score_I.astype(np.float32)
        return score

    def save(self, folder: Path, provenance: dict[str, object] | None = None) -> str:
        """Write the ranker artefact and return its digest."""
        return RankerArtefact.write(
            folder,
            kind="cooccurrence",
            options={"recency": self.recency, "history": self.history},
            tensors={
                "indptr": self.weight_II.indptr.astype(np.int64),
                "indices": self.weight_II.indices.astype(np.int32),
                "data": self.weight_II.data,
                "count": self.count_I,
            },
            provenance=provenance,
        )

    @classmethod
    def from_artefact(cls, artefact: RankerArtefact) -> CooccurrenceRanker:
        """The ranker of an opened artefact of kind `cooccurrence`."""
        tensors = artefact.tensors
        count_I = tensors["count"]
        parts = (tensors["data"], tensors["indices"], tensors["indptr"])
        weight_II = scipy.sparse.csr_array(parts, shape=(len(count_I), len(count_I)))
        weight_II.check_format()
        options = artefact.options
        return cls(weight_II, count_I, recency=float(options["recency"]), history=int(options["history"]))
