"""Evaluation of ranked lists through the fleet: the most probable list of a prompt, found greedily, against all gains.

Every need is measured on the same seeded sample of a split. What selects a checkpoint is the mean over the needs that
are trained; a need that is held out is only reported, at the end.

Suffixes: `_N` prompt, `_K` place in the list, `_C` candidate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data.records import NO_ITEM, Decode, DecodeSpec, Groups, IntArray, LongArray, Prompt
from reward.list_metrics import Floats, list_metrics
from reward.metrics import RankingReport
from reward.names import RankingMetric, at
from trainer.evaluation import Generator
from trainer.list_data import ListData
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
        gains: list[tuple[Floats, Floats]] = []
        invalid = 0
        for first in range(0, len(self._prompts), self._batch):
            prompts = self._prompts[first : first + self._batch]
            groups = generator.generate(prompts, self._spec())
            for prompt, ranked_K in zip(prompts, _ranked(groups), strict=True):
                gain_K, whole = self._gains(prompt, ranked_K)
                invalid += not whole
                gains.append((gain_K, np.asarray(prompt.gain_C, np.float64)))
        rows = list_metrics(_padded([gain for gain, _ in gains]), _padded([gain for _, gain in gains]), self._ks)
        need_N = np.array([prompt.need for prompt in self._prompts])
        return ListEvaluation(
            items=RankingReport(values=self._values(rows, need_N, invalid / len(gains)), rows=rows, n=len(gains)),
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

    def _gains(self, prompt: Prompt, ranked_K: IntArray) -> tuple[Floats, bool]:
        """Gains in list order, and whether the list is whole: as many different candidates as it should have."""
        assert prompt.candidates is not None
        assert prompt.gain_C is not None
        gain_of = dict(zip(prompt.candidates.tolist(), prompt.gain_C.tolist(), strict=True))
        items = ranked_K[ranked_K != NO_ITEM].tolist()
        wanted = self._data.settings.length or len(prompt.candidates)
        whole = len(items) == len(set(items)) == wanted and set(items) <= set(gain_of)
        seen: dict[int, float] = {}
        for item in items:
            seen.setdefault(item, gain_of.get(item, 0.0))
        return np.array(list(seen.values()), np.float64), whole


def _ranked(groups: Groups) -> IntArray:
    """The first list of each group."""
    assert groups.item_PGK is not None
    return np.where(groups.valid_PG[:, :1], groups.item_PGK[:, 0], NO_ITEM)


def _padded(rows: Sequence[Floats]) -> Floats:
    wide: Floats = np.zeros((len(rows), max(map(len, rows))))
    for number, row in enumerate(rows):
        wide[number, : len(row)] = row
    return wide
