"""The answer of `windlass eval --lists`: metrics per need, seen and unseen, with intervals, orders and differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from data.dataset import Dataset
from data.errors import RequestError
from data.records import Decode
from data.settings import Settings
from launch.compare import rows_file
from launch.published import table
from reward.artefact import DESCRIPTION, RankerArtefact
from reward.bootstrap import bootstrap_ratio
from reward.list_metrics import Floats
from reward.names import RankingMetric, at
from reward.ranker import Ranker, load_ranker
from trainer.list_checkpoint import EvaluatedLists, ListModel, ListRows, NeedRole, NeedRows, cut_offs, rows_digest
from trainer.row_metrics import RowMetrics, read_row_metrics, write_row_metrics

SHOWN = (RankingMetric.NDCG, RankingMetric.RECALL, RankingMetric.MRR)
GROUPS = {"seen": NeedRole.TRAINED, "unseen": NeedRole.HELD_OUT}


class RankingSettings(Settings):
    """How lists are answered (`--lists`), and what is held beside them."""

    decode: Decode = Decode.BEAM
    """beam (the most probable list that the beams reach) or sample (the mean over samples)."""
    width: int = Field(1, ge=1, le=1024)
    """Beams, or samples per prompt; one beam takes the most probable item at every place."""
    rankers: tuple[Path, ...] = ()
    """Ranker artefacts whose orders of the candidates are measured as well; a critic orders for each need it knows."""


def load_rankers(paths: Sequence[Path]) -> dict[str, Ranker]:
    """Rankers by the kind of their artefact, numbered where a kind is there twice.

    Raises:
        RequestError: no artefact there.
    """
    found: dict[str, Ranker] = {}
    for path in paths:
        if not (path / DESCRIPTION).is_file():
            raise RequestError("--ranking.rankers", path, f"a ranker's folder, with {DESCRIPTION}")
        kind = RankerArtefact.open(path).kind
        same = sum(name.partition("-")[0] == kind for name in found)
        found[f"{kind}-{same + 1}" if same else kind] = load_ranker(path)
    return found


def check_ranking(ranking: RankingSettings) -> None:
    """Refuse a decoding that has no metrics.

    Raises:
        RequestError: draws without replacement, whose mean says nothing of the policy.
    """
    if ranking.decode is Decode.SAMPLE_WITHOUT_REPLACEMENT:
        raise RequestError("--ranking.decode", ranking.decode.value, "beam or sample")


def row_metrics(evaluated: EvaluatedLists, name: str, which: ListRows, dataset: Dataset) -> RowMetrics:
    """Every prompt of every need as a row, for paired comparisons."""
    needs = list(evaluated.needs.values())
    prompt_id_N = np.concatenate([rows.prompt_id_N for rows in needs])
    order = np.argsort(prompt_id_N, kind="stable")
    values = {
        metric: np.concatenate([rows.value_N[metric] for rows in needs])[order].astype(np.float32)
        for metric in needs[0].value_N
    }
    return RowMetrics(
        name=name,
        split=which.split,
        dataset=rows_digest(evaluated.card, dataset),
        sample_id_N=prompt_id_N[order],
        user_id_N=np.concatenate([rows.user_id_N for rows in needs])[order],
        value_N=values,
    )


def save_rows(target: str, evaluated: EvaluatedLists, which: ListRows, dataset: Dataset) -> Path:
    """Write the rows where `target` (RUN:NAME) says."""
    folder, _, name = target.partition(":")
    return write_row_metrics(Path(folder), row_metrics(evaluated, name, which, dataset))


def check_save(target: str) -> None:
    """Refuse a place for rows before the work.

    Raises:
        RequestError: not RUN:NAME, or a name that is no plain word.
    """
    folder, colon, name = target.partition(":")
    if not folder or not colon or not name or Path(name).name != name:
        raise RequestError("--save", target, "RUN:NAME, which becomes RUN/rows/NAME.parquet")


def read_base(run: str, model: ListModel, which: ListRows, dataset: Dataset) -> RowMetrics:
    """The evaluation to compare with, checked before an engine is started.

    Raises:
        RequestError: there is none, it has other prompts, or it lacks a metric.
    """
    base = read_row_metrics(rows_file(run))
    own = rows_digest(model.card, dataset)
    same = (base.dataset, base.split) == (own, which.split)
    if not same or not np.array_equal(base.sample_id_N, model.prompt_id_N):
        found = f"{run}: {len(base.sample_id_N)} rows of {base.split}, of {base.dataset}"
        legal = f"lists for the same {len(model.prompt_id_N)} prompts of {which.split}, of {own}, kept by --save"
        raise RequestError("--base", found, legal)
    wanted = [at(metric, k) for k in cut_offs(which.ks, model.card.lists) for metric in SHOWN]
    missing = [metric for metric in wanted if metric not in base.value_N]
    if missing:
        raise RequestError("--base", f"{run} has no {missing[0]}", "an evaluation at the same --k")
    return base


def answer(evaluated: EvaluatedLists, which: ListRows, dataset: Dataset, base: RowMetrics | None) -> dict[str, Any]:
    """The answer; `metrics`, `ci95` and `differences` outside of the needs are those of the seen ones."""
    others = {} if base is None else base_values(base, evaluated)
    needs = {
        name: {"role": rows.role.value, **measured({name: rows}, others, which.seed), "prompts": rows.counts}
        for name, rows in evaluated.needs.items()
    }
    parts: dict[str, Any] = {}
    for group, role in GROUPS.items():
        chosen = {name: rows for name, rows in evaluated.needs.items() if rows.role is role}
        parts[group] = {"needs": list(chosen), **measured(chosen, others, which.seed)} if chosen else None
    lists = evaluated.card.lists
    total = sum(len(rows.prompt_id_N) for rows in evaluated.needs.values())
    headline = parts["seen"] or next(iter(needs.values()))
    result: dict[str, Any] = {
        "metrics": headline["metrics"],
        "n": total,
        "exclude_seen": evaluated.card.exclude_seen,
        "invalid": {
            "constrained": sum(r.invalid * len(r.prompt_id_N) for r in evaluated.needs.values()) / total,
            "unconstrained": None,
        },
        "ci95": headline["ci95"],
        "needs": needs,
        **parts,
        "orders": without_policy(evaluated.needs),
        "candidates": lists.candidates,
        "length": lists.spec.width,
        "decode": which.decode.value,
        "width": which.width,
        "split": which.split,
        "dataset": dataset.name,
        "dataset_fingerprint": dataset.fingerprint,
        "history": evaluated.card.history,
        "seed": which.seed,
        "checkpoint": str(evaluated.hf_dir),
        "engine": evaluated.engine,
        "violations": sum(evaluated.violations.values()),
    }
    if base is not None:
        result["differences"] = headline["differences"]
    return result


def measured(needs: Mapping[str, NeedRows], others: Mapping[str, dict[str, Floats]], seed: int) -> dict[str, Any]:
    """Means over needs of the policy's lists with their intervals, and their differences to others."""
    # A prompt weighs 1 / (prompts of its need): the ratio of sums is then the mean over needs of their means.
    weight_N = np.concatenate([np.full(len(r.prompt_id_N), 1 / len(r.prompt_id_N)) for r in needs.values()])
    user_N = np.concatenate([rows.user_id_N for rows in needs.values()])

    def interval(value_N: Floats) -> Any:
        return bootstrap_ratio(value_N * weight_N, weight_N, seed=seed, cluster_N=user_N)

    def joined(values: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
        return {metric: np.concatenate([part[metric] for part in values]) for metric in values[0]}

    ours = joined([rows.value_N for rows in needs.values()])
    intervals = {metric: interval(value_N) for metric, value_N in ours.items()}
    found: dict[str, Any] = {
        "n": len(weight_N),
        "metrics": {metric: one.mean for metric, one in intervals.items()},
        "ci95": {metric: [one.low, one.high] for metric, one in intervals.items()},
    }
    if others:
        base = joined([others[name] for name in needs])
        found["differences"] = {
            metric: {
                **interval(ours[metric] - base[metric]).record(),
                "base": float(np.average(base[metric], weights=weight_N)),
                "other": intervals[metric].mean,
            }
            for metric in base
        }
    return found


def without_policy(needs: Mapping[str, NeedRows]) -> dict[str, Any]:
    """The orders that no policy made, by name, in the shape of the answer, so that a table has them as rows."""
    names = dict.fromkeys(order for rows in needs.values() for order in rows.orders)
    found: dict[str, Any] = {}
    for order in names:
        means = {
            name: {metric: float(values.mean()) for metric, values in rows.orders[order].items()}
            for name, rows in needs.items()
            if order in rows.orders
        }
        found[order] = {"needs": {name: {"metrics": metrics} for name, metrics in means.items()}}
        for group, role in GROUPS.items():
            chosen = [name for name, rows in needs.items() if rows.role is role]
            if chosen and all(name in means for name in chosen):
                mean = {metric: float(np.mean([means[n][metric] for n in chosen])) for metric in means[chosen[0]]}
                found[order][group] = {"metrics": mean}
    return found


def base_values(base: RowMetrics, evaluated: EvaluatedLists) -> dict[str, dict[str, Floats]]:
    """Values of the base by need, in the order of our prompts, for the metrics that both have."""
    found = {}
    for name, rows in evaluated.needs.items():
        place_N = np.searchsorted(base.sample_id_N, rows.prompt_id_N)
        shared = [metric for metric in rows.value_N if metric in base.value_N]
        found[name] = {metric: base.value_N[metric][place_N].astype(np.float64) for metric in shared}
    return found


def show(result: Mapping[str, Any], ks: Sequence[int]) -> None:
    """Print a table of all needs with the orders below each group, then what a reader must know."""
    columns = [f"{metric.value}@{k}" for metric in SHOWN for k in ks]
    rows: dict[str, dict[str, float]] = {}
    for name, need in result["needs"].items():
        rows[f"{name} ({need['role'].replace('_', ' ')}, {need['n']})"] = need["metrics"]
    for group in GROUPS:
        if result[group] is not None:
            rows[f"mean of {group}"] = result[group]["metrics"]
            orders = {name: order[group]["metrics"] for name, order in result["orders"].items() if group in order}
            rows |= {f"  {group}, {name} order": values for name, values in orders.items()}
    print(table(columns, rows))
    for group in GROUPS:
        if result[group] is not None and "differences" in result[group]:
            print(f"mean of {group} to the base: " + ", ".join(told(result[group]["differences"], columns)))
    print(
        f"{result['n']} prompts of {result['split']}, {result['length']} of {result['candidates']} candidates by "
        f"{result['decode']} {result['width']}; invalid lists: {result['invalid']['constrained']:.4f}"
    )


def told(differences: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """Differences in words, a * where the interval does not hold 0."""
    words = []
    for name in columns:
        one = differences[name]
        mark = "" if one["low"] <= 0 <= one["high"] else " *"
        words.append(f"{name} {one['mean']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]{mark}")
    return words
