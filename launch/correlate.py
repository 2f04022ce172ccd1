"""`windlass correlate`: over a run's checkpoints, does AUC or windowed partial AUC go with Recall@K?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from data.errors import RequestError
from reward.checkpoint_correlation import RankCorrelation, correlate, pairwise_values
from reward.names import PairwiseMetric, RankingMetric, at
from trainer.row_scores import RunScores, read_run_scores


def correlate_command(run: Annotated[Path, tyro.conf.Positional], /, k: tuple[int, ...] = ()) -> dict[str, Any]:
    """Print the rank correlation of AUC and of WPAUC at K's window with Recall@K over a run's evaluations.

    Args:
        run: folder of a run whose evaluations were scored (evaluation.scores.rows above 0).
        k: cut-offs; none means all of the evaluations that the negatives reach.
    """
    answer = correlations(read_run_scores(run), k) | {"run": str(run)}
    print(table(answer))
    return answer


def correlations(run: RunScores, k: tuple[int, ...] = ()) -> dict[str, Any]:
    """Correlations by K, with the values they come from; what is not defined is None.

    Raises:
        RequestError: a K without a window or a recall, or fewer than three checkpoints.
    """
    scores = list(run.checkpoints.values())
    known = sorted(set.intersection(*(set(one.recall) for one in scores)))
    legal = [cutoff for cutoff in known if cutoff <= run.negatives]
    unknown = [cutoff for cutoff in k if cutoff not in legal]
    if unknown or not legal:
        found = ", ".join(map(str, unknown)) or f"none with {run.negatives} negatives"
        raise RequestError("--k", found, ", ".join(map(str, legal)) or "evaluations with more negatives")
    by_k: dict[str, Any] = {}
    for cutoff in k or legal:
        found_k = correlate(scores, cutoff)
        values = [pairwise_values(one, cutoff) for one in scores]
        by_k[str(cutoff)] = {
            at(RankingMetric.RECALL, cutoff): [one.recall[cutoff] for one in scores],
            **{name: _told(c) | {"values": [value[name] for value in values]} for name, c in found_k.items()},
        }
    return {
        "checkpoints": list(run.checkpoints),
        "rows": run.rows,
        "negatives": run.negatives,
        "source": run.source.value,
        "k": by_k,
    }


def _told(correlation: RankCorrelation) -> dict[str, float | None]:
    named = {"spearman": correlation.spearman, "kendall": correlation.kendall}
    return {name: None if math.isnan(value) else value for name, value in named.items()}


def table(answer: dict[str, Any]) -> str:
    """The answer as a table of text: a row per K."""
    titles = [f"{name} {kind}" for name in ("auc", "wpauc@K") for kind in ("spearman", "kendall")]
    lines = [
        f"{len(answer['checkpoints'])} checkpoints, {answer['rows']} rows against {answer['negatives']} negatives "
        f"({answer['source']}); rank correlation with recall@K",
        f"{'K':>4}" + "".join(f"{title:>18}" for title in titles),
    ]
    for k, found in answer["k"].items():
        metrics = (PairwiseMetric.AUC.value, at(PairwiseMetric.WPAUC, int(k)))
        cells = [found[metric][kind] for metric in metrics for kind in ("spearman", "kendall")]
        lines.append(f"{k:>4}" + "".join(f"{'-':>18}" if cell is None else f"{cell:>+18.3f}" for cell in cells))
    return "\n".join(lines)
