"""Scores of the target and of negatives, row by row, kept per checkpoint for AUC and windowed AUC.

`RUN/scores/NAME.parquet` has a row per scored sample: `sample_id:int64`, `user_id:int32`, `score:list<float32>` with
the target's first. Random negatives are drawn by (seed, sample id), so they are the same under every checkpoint; beams
are those of the checkpoint.

Suffixes: `_N` row, `_M` candidate.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.catalogue import Catalogue
from data.errors import RequestError
from data.parquet import open_parquet, read_table
from data.records import NO_ITEM, FloatArray, IntArray, LongArray, Prompt
from reward.checkpoint_correlation import CheckpointScores
from trainer.run_settings import NegativeSource

FORMAT: Final = 1
METADATA: Final = b"windlass.scores"
SCHEMA: Final = pa.schema(
    [pa.field("sample_id", pa.int64()), pa.field("user_id", pa.int32()), pa.field("score", pa.list_(pa.float32()))]
)
_NEGATIVE_STREAM: Final = 17


class Scorer(Protocol):
    """What scores completions: a fleet, or one engine."""

    def score(self, prompts: Sequence[IntArray], completions: Sequence[IntArray]) -> list[FloatArray]:
        """Full-vocabulary log-probabilities of each completion token at temperature 1."""
        ...


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """Scores of one checkpoint."""

    sample_id_N: LongArray
    user_id_N: IntArray
    score_NM: FloatArray
    """Log-probability of each candidate's path over the full vocabulary; the target is candidate 0."""
    unreachable: int
    """Rows left out, because the target is excluded, retired or unknown, or too few items are left as negatives."""


def random_candidates(prompt: Prompt, catalogue: Catalogue, negatives: int, seed: int) -> IntArray | None:
    """The target, then `negatives` permitted items of other paths, drawn evenly without replacement; None where it
    cannot be."""
    permitted_I = catalogue.active.copy()
    permitted_I[prompt.exclusions] = False
    if not 0 <= prompt.target < catalogue.n_items or not permitted_I[prompt.target]:
        return None
    permitted_I[catalogue.path_id == catalogue.path_id[prompt.target]] = False
    others = np.flatnonzero(permitted_I)
    if len(others) < negatives:
        return None
    random = np.random.default_rng([seed, _NEGATIVE_STREAM, prompt.prompt_id])
    drawn = random.choice(others, size=negatives, replace=False)
    return np.concatenate([[prompt.target], drawn]).astype(np.int32)


def beam_candidates(prompt: Prompt, beam_G: IntArray, catalogue: Catalogue, negatives: int) -> IntArray | None:
    """The target, then the best `negatives` beams that do not have its path; None where it cannot be.

    Args:
        beam_G: items of the valid beams, best first.
    """
    if not 0 <= prompt.target < catalogue.n_items or not catalogue.active[prompt.target]:
        return None
    if prompt.target in prompt.exclusions:
        return None
    others = beam_G[(beam_G != NO_ITEM) & (catalogue.path_id[beam_G] != catalogue.path_id[prompt.target])]
    if len(others) < negatives:
        return None
    chosen: IntArray = np.concatenate([[prompt.target], others[:negatives]]).astype(np.int32)
    return chosen


def score_rows(
    scorer: Scorer,
    prompts: Sequence[Prompt],
    drawn: Sequence[IntArray | None],
    catalogue: Catalogue,
    *,
    batch: int = 64,
) -> RowScores:
    """Score the candidates of every prompt.

    Args:
        drawn: `[M]` candidates of each prompt, the target first, as many for each; None for rows without.
        batch: prompts per request.

    Raises:
        RequestError: no prompt has candidates.
    """
    chosen = [(prompt, items) for prompt, items in zip(prompts, drawn, strict=True) if items is not None]
    if not chosen:
        raise RequestError(
            "scores.negatives",
            f"none of {len(prompts)} rows has a target that may be recommended and that many negatives",
            "fewer negatives, or more rows",
        )
    width = len(chosen[0][1])
    rows: list[FloatArray] = []
    for first in range(0, len(chosen), batch):
        part = chosen[first : first + batch]
        asked = [prompt.token_ids for prompt, items in part for _ in items]
        paths = [catalogue.tokens(int(item)) for _, items in part for item in items]
        total = np.array([logp.sum(dtype=np.float64) for logp in scorer.score(asked, paths)], np.float32)
        rows.append(total.reshape(len(part), width))
    return RowScores(
        sample_id_N=np.array([prompt.prompt_id for prompt, _ in chosen], np.int64),
        user_id_N=np.array([prompt.user_id for prompt, _ in chosen], np.int32),
        score_NM=np.concatenate(rows),
        unreachable=len(prompts) - len(chosen),
    )


def write_row_scores(
    run_dir: Path, name: str, scores: RowScores, recall: dict[int, float], *, source: NegativeSource
) -> Path:
    """Write `RUN/scores/NAME.parquet`, atomically, with the checkpoint's Recall@K by K."""
    folder = run_dir / "scores"
    folder.mkdir(parents=True, exist_ok=True)
    columns = [pa.array(scores.sample_id_N), pa.array(scores.user_id_N), pa.array(scores.score_NM.tolist())]
    arrays = [column.cast(field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    head = {"format": FORMAT, "recall": recall, "unreachable": scores.unreachable, "source": source.value}
    table = pa.table(arrays, schema=SCHEMA).replace_schema_metadata({METADATA: json.dumps(head)})
    path, temporary = folder / f"{name}.parquet", folder / f".{name}.partial"
    pq.write_table(table, temporary)
    temporary.rename(path)
    return path


@dataclass(frozen=True, kw_only=True)
class RunScores:
    """Scores of a run's checkpoints."""

    checkpoints: dict[str, CheckpointScores]
    """By name, in the order of the names."""
    rows: int
    negatives: int
    source: NegativeSource


def read_run_scores(run_dir: Path) -> RunScores:
    """Scores of every checkpoint of a run.

    Raises:
        RequestError: there are none, a damaged file, or checkpoints that scored other rows or other negatives.
    """
    paths = sorted((run_dir / "scores").glob("*.parquet"))
    if not paths:
        legal = "a run with evaluation.scores.rows above 0, so that its evaluations were scored"
        raise RequestError(str(run_dir / "scores"), "no NAME.parquet", legal)
    found: dict[str, CheckpointScores] = {}
    first: tuple[list[int], int, NegativeSource] | None = None
    for path in paths:
        recall, source = _read_head(path)
        table = read_table(path, SCHEMA).combine_chunks()
        width = set(table["score"].combine_chunks().value_lengths().to_pylist())
        if len(width) != 1 or None in width:
            raise RequestError(f"{path}: score", f"lists of {sorted(map(str, width))} numbers", "lists of one length")
        rows = (table["sample_id"].to_pylist(), next(iter(width)), source)
        first = first or rows
        if rows != first:
            raise RequestError(str(path), "other rows or other negatives", f"those of {paths[0].name}")
        flat = table["score"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        score_NM = np.asarray(flat, np.float64).reshape(len(table), rows[1])
        positive_NM = np.zeros(score_NM.shape, np.bool_)
        positive_NM[:, 0] = True
        found[path.stem] = CheckpointScores(score_NM=score_NM, positive_NM=positive_NM, recall=recall)
    assert first is not None
    return RunScores(checkpoints=found, rows=len(first[0]), negatives=first[1] - 1, source=first[2])


def _read_head(path: Path) -> tuple[dict[int, float], NegativeSource]:
    """Recall@K by K, and where the negatives come from."""
    raw = (open_parquet(path).schema_arrow.metadata or {}).get(METADATA)
    try:
        head = json.loads(raw or b"{}")
        if head.get("format") != FORMAT:
            raise RequestError(str(path), f"format {head.get('format')!r}", f"scores, format {FORMAT}")
        return {int(k): float(value) for k, value in head["recall"].items()}, NegativeSource(head["source"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise RequestError(str(path), f"is damaged ({error!r})", f"scores, format {FORMAT}") from error
