"""Summary and validation of a dataset folder, for `windlass data inspect`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.dataset import Dataset, Samples
from data.errors import RequestError
from data.parquet import fingerprint_of, open_parquet
from data.schema import CARD, INTERACTIONS, QUARANTINE, SPLIT_NAMES
from data.split import user_starts


def inspect_dataset(path: Path) -> dict[str, Any]:
    """Check every file of a dataset and describe what it holds.

    Reads everything: digests against dataset.json, ids within range, events in order, splits apart in time.

    Raises:
        RequestError: a file is missing, damaged, or not what was imported.
    """
    dataset = Dataset.open(path)
    if dataset.fingerprint != fingerprint_of(dataset.card):
        raise RequestError(f"{path / CARD}: fingerprint", dataset.fingerprint, fingerprint_of(dataset.card))
    items = dataset.items()
    if len(dataset.users()) != dataset.n_users:
        raise RequestError(str(path / "users.parquet"), f"{len(dataset.users())} rows", f"{dataset.n_users}")
    _check_events(dataset)
    samples = {split: dataset.samples(split) for split in SPLIT_NAMES}
    _check_samples(dataset, samples)
    answer: dict[str, Any] = {
        "path": str(path),
        "name": dataset.name,
        "format": dataset.card["format"],
        "fingerprint": dataset.fingerprint,
        "clock": dataset.card.get("clock"),
        "counts": dataset.card["counts"],
        "dropped": dataset.card.get("dropped", {}),
        "repaired": dataset.card.get("repaired", {}),
        "split": dataset.card["split"],
        "splits": {split: _describe(dataset, rows, samples["train"]) for split, rows in samples.items()},
        "events": _describe_events(dataset),
        "items": {
            "rows": len(items),
            "columns": items.column_names,
            "without_title": int(len(items) - np.count_nonzero(items["has_title"].to_numpy())),
            "without_train_event": int((dataset.train_counts() == 0).sum()),
        },
        "codes": sorted(file.stem for file in (path / "codes").glob("*.parquet")),
        "quarantined_rows": _quarantined(path),
    }
    answer["remarks"] = _remarks(answer)
    return answer


def describe_lines(answer: dict[str, Any]) -> list[str]:
    """The answer of `inspect_dataset` for a reader."""
    counts = answer["counts"]
    lines = [
        f"{answer['name']} ({answer['path']}): {counts['events']:,} events, {counts['users']:,} users, "
        f"{counts['items']:,} items; fingerprint {answer['fingerprint']}",
        f"split: {answer['split']['kind']}",
    ]
    for split, row in answer["splits"].items():
        if not row["rows"]:
            lines.append(f"  {split:<5} no rows")
            continue
        span = f", {row['from']} to {row['to']}" if row["from"] else ""
        lines.append(
            f"  {split:<5} {row['rows']:>10,} rows{span}; history median {row['history_median']:g}, "
            f"max {row['history_max']}; users unseen in training {row['unseen_user_share']:.1%}, "
            f"target already in history {row['repeat_share']:.1%}"
        )
    for title in ("dropped", "repaired"):
        if answer[title]:
            lines.append(f"{title}: " + ", ".join(f"{reason} {count:,}" for reason, count in answer[title].items()))
    lines += [f"remark: {remark}" for remark in answer["remarks"]]
    return lines


def _check_events(dataset: Dataset) -> None:
    events = dataset.events
    where = str(dataset.path / INTERACTIONS)
    for name, ids, bound in (("user_id", events.user_E, dataset.n_users), ("item_id", events.item_E, dataset.n_items)):
        if len(ids) and (ids.min() < 0 or ids.max() >= bound):
            raise RequestError(f"{where}: {name}", f"{ids.min()} to {ids.max()}", f"0 to {bound - 1}")
    step = np.diff(events.user_E)
    if (step < 0).any() or (np.diff(events.time_E)[step == 0] < 0).any():
        raise RequestError(where, "rows out of order", "rows by user and time; import again")


def _check_samples(dataset: Dataset, samples: dict[str, Samples]) -> None:
    promised = dataset.card["split"]
    rows = promised.get("rows", {}) if isinstance(promised, dict) else {}
    for split, found in samples.items():
        if len(found) != rows.get(split):
            raise RequestError(f"{dataset.path / CARD}: split.rows.{split}", rows.get(split), f"{len(found)} as stored")
        if (found.end_N <= found.start_N).any():
            raise RequestError(f"{dataset.path}: {split}", "a row without history", "at least one item before a target")


def _describe(dataset: Dataset, rows: Samples, train: Samples) -> dict[str, Any]:
    if not len(rows):
        return {"rows": 0}
    length = rows.end_N - rows.start_N
    repeated = sum(int(rows.target_N[i]) in rows.values[rows.start_N[i] : rows.end_N[i]] for i in _probe(len(rows)))
    known = rows.timestamp_N[rows.timestamp_N > 0]
    clock = dataset.card.get("clock") == "seconds" and len(known) > 0
    return {
        "rows": len(rows),
        "users": len(np.unique(rows.user_id_N)),
        "from": _day(known.min()) if clock else None,
        "to": _day(known.max()) if clock else None,
        "history_median": float(np.median(length)),
        "history_max": int(length.max()),
        "unseen_user_share": float(1 - np.isin(rows.user_id_N, train.user_id_N).mean()),
        "unseen_target_share": float((dataset.train_counts()[rows.target_N] == 0).mean()),
        "repeat_share": repeated / max(len(_probe(len(rows))), 1),
    }


def _probe(rows: int) -> npt.NDArray[np.int64]:
    """At most 20,000 rows, evenly spread, for what must be looked up row by row."""
    return np.unique(np.linspace(0, rows - 1, min(rows, 20_000)).astype(np.int64))


def _describe_events(dataset: Dataset) -> dict[str, Any]:
    events = dataset.events
    if not len(events.user_E):
        return {"rows": 0}
    later = np.arange(len(events.user_E)) > user_starts(events.user_E)
    tied = np.diff(events.time_E)[later[1:]] == 0
    per_user = np.bincount(events.user_E, minlength=dataset.n_users)
    return {
        "rows": len(events.user_E),
        "per_user_median": float(np.median(per_user)),
        "per_user_max": int(per_user.max()),
        "tied_share": float(tied.mean()) if len(tied) else 0.0,
    }


def _quarantined(path: Path) -> int:
    total = 0
    for file in sorted((path / QUARANTINE).glob("*.parquet")):
        with open_parquet(file) as rows:
            total += rows.metadata.num_rows
    return total


def _remarks(answer: dict[str, Any]) -> list[str]:
    """What a user should know before trusting numbers on this dataset."""
    remarks = []
    unseen = answer["splits"]["test"].get("unseen_user_share", 0.0)
    if unseen > 0.5:
        remarks.append(f"{unseen:.0%} of the test rows belong to users unseen in training")
    tied = answer["events"].get("tied_share", 0.0)
    if tied > 0.2 and answer["clock"] == "seconds":
        remarks.append(f"{tied:.0%} of neighbouring events of a user share their time; the order of the source decides")
    if answer["split"]["kind"] == "leave_one_out":
        remarks.append("leave one out mixes times over users; it says nothing about drift")
    if answer["items"]["without_title"]:
        remarks.append(f"{answer['items']['without_title']:,} items have no title; their key stands for it")
    return remarks


def _day(seconds: np.int64) -> str:
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%d")
