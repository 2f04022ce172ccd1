"""Evaluation of ranked lists through the fleet: the most probable list of a prompt, found greedily, against all gains.

Every need is measured on the same seeded sample of a split. What selects a checkpoint is the mean over the needs that
are trained; a need that is held out is only reported, at the end.

Suffix: `_N` prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data.records import Decode, DecodeSpec, IntArray, LongArray, Prompt
from reward.list_metrics import Floats
from reward.metrics import RankingReport
from reward.names import RankingMetric, at
from trainer.evaluation import Generator
from trainer.list_data import ListData
from trainer.list_measures import measure_lists
from trainer.row_metrics import RowMetrics


@dataclass(frozen=True, kw_only=True)
class ListEvaluation:
    """Result of one evaluation."""

    items: RankingReport
    """Metrics by name, the mean over the trained needs, and by `NAME/NEED`; rows of all needs."""
    sample_id_N: LongArray
    """Ids of the prompts: sample times number of needs, plus the need's number."""
    user_id_N: IntArray
    need_N: tuple[str, ...]
    counts: dict[str, int]
    """What was not taken as it is, by `data.ranking_prompts.RankingCount`, over all needs."""

    further: dict[str, float] = field(default_factory=dict)
    """Nothing beside the ranking metrics."""
    unconstrained_invalid: float | None = None
    """Not measured: a list without its constraint is no answer to a candidate set."""

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Every value by name."""
        values = {prefix + name: value for name, value in self.items.values.items()}
        return values | {f"{prefix}evaluation/{reason}": float(count) for reason, count in self.counts.items()}

    def row_metrics(self, name: str, *, split: str, dataset: str) -> RowMetrics:
        """The metrics row by row, for paired comparisons; `dataset` is the fingerprint."""
        order = np.argsort(self.sample_id_N, kind="stable")
        return RowMetrics(
            name=name,
            split=split,
            dataset=dataset,
            sample_id_N=self.sample_id_N[order],
            user_id_N=self.user_id_N[order],
            value_N={metric: values[order].astype(np.float32) for metric, values in self.items.rows.items()},
        )


class ListEvaluator:
    """Evaluates whatever generates lists, on fixed prompts."""

    def __init__(
        self,
        data: ListData,
        *,
        split: str,
        rows: int,
        ks: Sequence[int],
        batch: int,
        seed: int,
        needs: Sequence[str] | None = None,
    ) -> None:
        """
        Args:
            rows: samples of each need; 0 takes all.
            ks: cut-offs.
            batch: prompts per request.
            needs: names of what is measured; by default the needs that training takes.

        Raises:
            RequestError: a split without samples, or a need without gains.
        """
        self._data = data
        self._ks = tuple(ks)
        self._batch = batch
        self._seed = seed
        counts: Counter[str] = Counter()
        self._prompts: list[Prompt] = []
        for need in data.settings.trained() if needs is None else needs:
            made = data.evaluation(split, need, rows, seed)
            counts.update(made.counts)
            self._prompts += made.prompts
        self._counts = dict(counts)

    def run(self, generator: Generator) -> ListEvaluation:
        """Rank the candidates of every prompt and compare with their gains."""
        rows, invalid = measure_lists(generator, self._prompts, self._spec(), batch=self._batch, ks=self._ks)
        need_N = np.array([prompt.need for prompt in self._prompts])
        return ListEvaluation(
            items=RankingReport(values=self._values(rows, need_N, invalid), rows=rows, n=len(need_N)),
            sample_id_N=np.array([prompt.prompt_id for prompt in self._prompts], np.int64),
            user_id_N=np.array([prompt.user_id for prompt in self._prompts], np.int32),
            need_N=tuple(need_N.tolist()),
            counts=self._counts,
        )

    def _values(self, rows: dict[str, Floats], need_N: np.ndarray, invalid: float) -> dict[str, float]:
        present = [need.name for need in self._data.builder.needs if (need_N == need.name).any()]
        by_need = {
            f"{name}/{need}": float(values[need_N == need].mean()) for name, values in rows.items() for need in present
        }
        # A held-out need is no part of what selects; alone it is all there is.
        shown = [need for need in present if need != self._data.settings.held_out] or present
        values = {name: float(np.mean([by_need[f"{name}/{need}"] for need in shown])) for name in rows}
        return values | by_need | {at(RankingMetric.INVALID, max(self._ks)): invalid}

    def _spec(self) -> DecodeSpec:
        """A beam of one: at every place the most probable item."""
        return DecodeSpec(decode=Decode.BEAM, width=1, seed=self._seed, lists=self._data.settings.spec)
