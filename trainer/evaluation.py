"""Evaluation by constrained beams through the fleet, and by unconstrained decoding for the invalid rate.

The rows are a seeded sample of a split, the same for every method and every step; the selection of a checkpoint reads
the validation split. With shared codes a beam names several items, so metrics are reported per item (a leaf's items
in the order of their training frequency) and per path (the target's path is hit). Exposure bias against a feedback log
and what needs scores (`trainer.scored_evaluation`) are measured where they are asked for.

Suffixes: `_N` row, `_K` rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data.catalogue import Catalogue
from data.dataset import Dataset, Samples
from data.prompts import PromptBuilder
from data.records import NO_ITEM, Decode, DecodeSpec, Groups, IntArray, LongArray, Prompt
from reward.exposure import Exposures, evaluate_exposure
from reward.metrics import RankingReport, evaluate, tail_items
from trainer.row_metrics import RowMetrics
from trainer.run_settings import ScoreSettings
from trainer.scored_evaluation import ScoredEvaluation, ScoredRows, ScoringGenerator

_ROW_STREAM = 11
_ABSENT = -2
"""Slot that the catalogue could not fill: no output, so nothing invalid (`NO_ITEM` is an invalid output)."""


class Generator(Protocol):
    """What answers prompts: a fleet, or one engine."""

    def generate(self, prompts: Sequence[Prompt], spec: DecodeSpec) -> Groups:
        """Completions of the prompts, in their order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of one evaluation."""

    items: RankingReport
    """Metrics of item lists."""
    paths: RankingReport
    """Metrics of path lists; equal to those of items when no two items share a path."""
    rows: LongArray
    """[N] rows of the split."""
    user_id_N: IntArray
    unconstrained_invalid: float | None
    """Share of unconstrained outputs (slots up to the smaller of 10 and the width) that are no item; none when it was
    not measured."""
    unconstrained_rows: int
    counts: dict[str, int]
    """What prompts were not taken as they are, by `data.prompts.PromptCount`: shortened, unknown items, ..."""
    exposure: dict[str, float]
    """Exposure bias by name; empty without a feedback log."""
    scored: ScoredRows | None
    """AUC, its windows and the legal mass; none when no row was scored."""

    @property
    def further(self) -> dict[str, float]:
        """Values beside the ranking metrics, by name."""
        return self.exposure | (self.scored.values if self.scored is not None else {})

    def row_metrics(self, name: str, *, split: str, dataset: str) -> RowMetrics:
        """The ranking metrics row by row, for paired comparisons; `dataset` is the fingerprint."""
        return RowMetrics(
            name=name,
            split=split,
            dataset=dataset,
            sample_id_N=self.rows,
            user_id_N=self.user_id_N,
            value_N={metric: values.astype(np.float32) for metric, values in self.items.rows.items()},
        )

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Every value by name."""
        values = {prefix + name: value for name, value in (self.items.values | self.further).items()}
        if self.unconstrained_invalid is not None:
            values[f"{prefix}invalid_unconstrained"] = self.unconstrained_invalid
        values |= {f"{prefix}evaluation/{reason}": float(count) for reason, count in self.counts.items()}
        return values


def sample_rows(n: int, rows: int, seed: int) -> LongArray:
    """`rows` of n row numbers, drawn without replacement by the seed, increasing; all where there are fewer."""
    if rows >= n:
        return np.arange(n, dtype=np.int64)
    drawn = np.random.default_rng([seed, _ROW_STREAM]).choice(n, size=rows, replace=False)
    return np.sort(drawn).astype(np.int64)


class Evaluator:
    """Evaluates whatever generates, on fixed rows of a split."""

    def __init__(
        self,
        dataset: Dataset,
        catalogue: Catalogue,
        builder: PromptBuilder,
        *,
        split: str,
        rows: int,
        ks: Sequence[int],
        batch: int,
        seed: int,
        unconstrained_rows: int = 0,
        scores: ScoreSettings | None = None,
        exposures: Exposures | None = None,
        samples: Samples | None = None,
    ) -> None:
        """
        Args:
            rows: size of the sample.
            batch: prompts per request.
            scores: what is scored; by default nothing.
            exposures: the log that exposure bias is measured against.
            samples: what is evaluated; by default the split of the dataset.
        """
        self._catalogue = catalogue
        self._builder = builder
        self._samples: Samples = dataset.samples(split) if samples is None else samples
        self._rows = sample_rows(len(self._samples), rows, seed)
        self._ks = tuple(ks)
        self._batch = batch
        self._seed = seed
        self._unconstrained_rows = min(unconstrained_rows, len(self._rows))
        # A dataset that has grown since has more items, behind those of the catalogue.
        self._count_I = dataset.train_counts()[: catalogue.n_items]
        self._tail_I = tail_items(self._count_I)
        self._exposures = exposures
        scores = scores or ScoreSettings()
        self._scored: ScoredEvaluation | None = None
        if scores.rows:
            self._scored = ScoredEvaluation(
                catalogue=catalogue,
                builder=builder,
                samples=self._samples,
                rows=self._rows[sample_rows(len(self._rows), scores.rows, seed)],
                settings=scores,
                ks=self._ks,
                batch=batch,
                seed=seed,
            )

    @property
    def rows(self) -> LongArray:
        """Rows of the split."""
        return self._rows

    def run(self, generator: ScoringGenerator) -> Evaluation:
        """Decode every row, score what is to be scored, and compute the metrics."""
        width = max(self._ks)
        items: list[IntArray] = []
        paths: list[IntArray] = []
        counts: Counter[str] = Counter()
        for rows in self._requests(self._rows):
            batch = self._builder.build(self._samples, rows)
            prompts = batch.prompts
            counts.update(batch.counts)
            groups = generator.generate(prompts, self._spec(width, constrained=True))
            ranked_PG = np.where(groups.valid_PG, groups.item_PG, _ABSENT)
            items += [self._expanded(row, prompt, width) for row, prompt in zip(ranked_PG, prompts, strict=True)]
            paths += [self._path_row(row, width) for row in ranked_PG]
        target_N = self._samples.target_N[self._rows]
        item_NK = np.stack(items)
        path_NK = np.stack(paths)
        return Evaluation(
            items=self._report(item_NK, target_N),
            paths=self._report(path_NK, self._catalogue.path_id[target_N]),
            rows=self._rows,
            user_id_N=self._samples.user_id_N[self._rows],
            unconstrained_invalid=self._invalid_rate(generator),
            unconstrained_rows=self._unconstrained_rows,
            counts=dict(counts),
            exposure=self._exposure(item_NK, target_N),
            scored=None if self._scored is None else self._scored.run(generator),
        )

    def _exposure(self, item_NK: IntArray, target_N: IntArray) -> dict[str, float]:
        if self._exposures is None:
            return {}
        return evaluate_exposure(
            item_NK,
            target_N,
            self._samples.user_id_N[self._rows],
            self._samples.timestamp_N[self._rows],
            log=self._exposures,
            train_count_I=self._count_I,
            ks=self._ks,
        )

    def _requests(self, rows: LongArray) -> list[LongArray]:
        return [rows[first : first + self._batch] for first in range(0, len(rows), self._batch)]

    def _spec(self, width: int, *, constrained: bool) -> DecodeSpec:
        return DecodeSpec(decode=Decode.BEAM, width=width, seed=self._seed, constrained=constrained)

    def _report(self, item_NK: IntArray, target_N: IntArray) -> RankingReport:
        return evaluate(
            item_NK,
            target_N,
            self._ks,
            n_items=self._catalogue.n_items,
            tail_I=self._tail_I,
            generated_NK=item_NK != _ABSENT,
        )

    def _expanded(self, ranked_K: IntArray, prompt: Prompt, width: int) -> IntArray:
        """The items of the leaves in rank order, without the excluded ones, at most `width`."""
        listed: list[int] = []
        for item in ranked_K.tolist():
            if item == _ABSENT or len(listed) >= width:
                break
            leaf = np.array([item], dtype=np.int32) if item == NO_ITEM else self._catalogue.leaf_items(item)
            if len(leaf) > 1:
                leaf = leaf[~np.isin(leaf, prompt.exclusions)]
                leaf = leaf[np.argsort(-self._count_I[leaf], kind="stable")]
            listed += leaf.tolist()
        return _padded(listed, width)

    def _path_row(self, ranked_K: IntArray, width: int) -> IntArray:
        listed = ranked_K[ranked_K != _ABSENT]
        return _padded(np.where(listed == NO_ITEM, NO_ITEM, self._catalogue.path_id[listed]).tolist(), width)

    def _invalid_rate(self, generator: Generator) -> float | None:
        """Invalid share among the first outputs of unconstrained beams (methods.md section 7)."""
        if not self._unconstrained_rows:
            return None
        width = min(10, max(self._ks))
        outputs = invalid = 0
        for rows in self._requests(self._rows[: self._unconstrained_rows]):
            prompts = self._builder.build(self._samples, rows).prompts
            groups = generator.generate(prompts, self._spec(width, constrained=False))
            outputs += int(groups.valid_PG.sum())
            invalid += int((groups.valid_PG & (groups.item_PG == NO_ITEM)).sum())
        return invalid / max(1, outputs)


def _padded(items: Sequence[int], width: int) -> IntArray:
    row = np.full(width, _ABSENT, dtype=np.int32)
    kept = items[:width]
    row[: len(kept)] = kept
    return row
