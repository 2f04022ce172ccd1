"""`windlass compare`: two evaluations of the same rows, with a paired bootstrap over users."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from data.errors import RequestError
from reward.bootstrap import paired_bootstrap
from trainer.row_metrics import RowMetrics, read_row_metrics


def compare_command(
    base: Annotated[str, tyro.conf.Positional],
    other: Annotated[str, tyro.conf.Positional],
    /,
    metrics: tuple[str, ...] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Print the difference OTHER - BASE of every metric with its 95 % interval.

    Args:
        base: run folder, run folder:NAME of one of its evaluations, or a rows/NAME.parquet file.
        other: the same for the run that is compared with it.
        metrics: names of the metrics; none means all that both have.
        resamples: bootstrap resamples.
        seed: seed of the bootstrap.
    """
    for name, value, least in (("--resamples", resamples, 1), ("--seed", seed, 0)):
        if value < least:
            raise RequestError(name, value, f"{least} or more")
    answer = compare(
        read_row_metrics(rows_file(base)), read_row_metrics(rows_file(other)), metrics, resamples=resamples, seed=seed
    )
    print(table(answer, base, other))
    return answer


def rows_file(run: str) -> Path:
    """The file with the row metrics that `RUN`, `RUN:NAME` or a path means.

    Raises:
        RequestError: there is none, or more than one and no name.
    """
    if run.endswith(".parquet"):
        return Path(run)
    folder, _, name = run.partition(":")
    names = sorted(path.stem for path in (Path(folder) / "rows").glob("*.parquet"))
    if not names:
        raise RequestError(
            "run", f"{folder} has no evaluated rows", "a run folder with rows/*.parquet, written by an evaluation"
        )
    if not name and len(names) > 1:
        raise RequestError("run", f"{folder} has several evaluations", ", ".join(f"{folder}:{n}" for n in names))
    if name and name not in names:
        raise RequestError("run", run, ", ".join(f"{folder}:{n}" for n in names))
    return Path(folder) / "rows" / f"{name or names[0]}.parquet"


def compare(
    base: RowMetrics, other: RowMetrics, metrics: tuple[str, ...] = (), *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Differences by metric: `{"mean", "low", "high", "share_above_zero", "base", "other"}`.

    Raises:
        RequestError: the evaluations have other rows, or no metric in common.
    """
    for what, a, b in (("dataset", base.dataset, other.dataset), ("split", base.split, other.split)):
        if a != b:
            raise RequestError(f"compare: {what}", f"{a} and {b}", "two evaluations of the same rows")
    if not np.array_equal(base.sample_id_N, other.sample_id_N):
        shared = len(np.intersect1d(base.sample_id_N, other.sample_id_N))
        raise RequestError(
            "compare: rows",
            f"{len(base.sample_id_N)} and {len(other.sample_id_N)} rows, {shared} of them the same",
            "two evaluations of the same rows",
        )
    both = [name for name in base.value_N if name in other.value_N]
    unknown = [name for name in metrics if name not in both]
    if unknown or not both:
        raise RequestError("--metrics", ", ".join(unknown) or "none in common", ", ".join(both) or "other evaluations")
    differences: dict[str, Any] = {}
    for name in metrics or both:
        interval = paired_bootstrap(
            other.value_N[name], base.value_N[name], seed=seed, resamples=resamples, cluster_N=base.user_id_N
        )
        differences[name] = {
            **interval.record(),
            "base": float(base.value_N[name].mean(dtype=np.float64)),
            "other": float(other.value_N[name].mean(dtype=np.float64)),
        }
    return {
        "n": len(base.sample_id_N),
        "users": len(np.unique(base.user_id_N)),
        "split": base.split,
        "resamples": resamples,
        "differences": differences,
    }


def table(answer: dict[str, Any], base: str, other: str) -> str:
    """The answer as a table of text."""
    lines = [
        f"{other} - {base} on {answer['n']} rows of {answer['users']} users ({answer['split']}); "
        "95 % interval, users resampled",
        f"{'metric':<14}{'base':>9}{'other':>9}{'difference':>12}  interval",
    ]
    for name, d in answer["differences"].items():
        mark = "" if d["low"] <= 0 <= d["high"] else "  *"
        values = f"{name:<14}{d['base']:>9.4f}{d['other']:>9.4f}{d['mean']:>+12.4f}"
        lines.append(f"{values}  [{d['low']:+.4f}, {d['high']:+.4f}]{mark}")
    return "\n".join(lines)
