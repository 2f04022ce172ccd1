"""Small datasets for tests of what is built on datasets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.dataset import Dataset, Samples, Sequences
from data.importing import ImportRules, import_source
from data.sources import TimeUnit
from data.tabular import ColumnNames, table


def import_events(
    folder: Path,
    events: list[tuple[int, str, int]],
    items: pa.Table | None = None,
    *,
    ratios: tuple[float, float, float] = (8.0, 1.0, 1.0),
    ratings: list[float | None] | None = None,
) -> Dataset:
    """Import (user, item key, time) rows, with ratings where they are given, and a chronological split."""
    folder.mkdir(parents=True, exist_ok=True)
    user, item, time = zip(*events, strict=True)
    columns = {"user_id": user, "item_id": item, "timestamp": time}
    if ratings is not None:
        columns["rating"] = pa.array(ratings, pa.float32())
    pq.write_table(pa.table(columns), folder / "events.parquet")
    if items is not None:
        pq.write_table(items, folder / "items.parquet")
    source = table(
        folder / "events.parquet",
        folder / "items.parquet" if items is not None else None,
        ColumnNames(),
        TimeUnit.SECONDS,
    )
    rules = ImportRules(unknown_items="add" if items is None else "drop", ratios=ratios)
    return import_source(source, folder / "dataset", rules)


def samples(histories: list[list[int]], targets: list[int]) -> Samples:
    """Samples of the given histories, users and times being the row numbers."""
    rows = np.arange(len(histories), dtype=np.int64)
    end = np.cumsum([len(history) for history in histories], dtype=np.int64)
    return Samples(
        user_id_N=rows.astype(np.int32),
        target_N=np.asarray(targets, dtype=np.int32),
        timestamp_N=1000 + rows,
        sample_id_N=rows,
        values=np.asarray([item for history in histories for item in history], dtype=np.int32),
        start_N=end - [len(history) for history in histories],
        end_N=end,
    )


def sequences(events: list[list[int]], loss_from: list[int]) -> Sequences:
    """Whole sequences of the given items."""
    end = np.cumsum([len(items) for items in events], dtype=np.int64)
    return Sequences(
        values=np.asarray([item for items in events for item in items], dtype=np.int32),
        start_S=end - [len(items) for items in events],
        end_S=end,
        loss_from_S=np.asarray(loss_from, dtype=np.int64),
        user_id_S=np.arange(len(events), dtype=np.int32),
    )
