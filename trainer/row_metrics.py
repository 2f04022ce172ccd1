"""Metrics of each evaluated row, kept so that runs can be compared pair by pair.

`RUN/rows/NAME.parquet` has one row per evaluated sample: `sample_id:int64` (the row number in the split),
`user_id:int32` (rows of one user are resampled together) and a float32 column per metric, by the names of
`reward.names`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import RequestError
from data.records import FloatArray, IntArray, LongArray

FORMAT = 1


KEYS = ("sample_id", "user_id")


@dataclass(frozen=True, kw_only=True)
class RowMetrics:
    """One evaluation, row by row, ordered by sample id."""

    name: str
    """Stage or step."""
    split: str
    dataset: str
    """Fingerprint of the dataset."""
    sample_id_N: LongArray
    user_id_N: IntArray
    value_N: dict[str, FloatArray]
    """Values by the name of the metric."""


def write_row_metrics(run_dir: Path, rows: RowMetrics) -> Path:
    """Write `RUN/rows/NAME.parquet`, atomically."""
    folder = run_dir / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"sample_id": pa.array(np.asarray(rows.sample_id_N, np.int64))}
    columns["user_id"] = pa.array(np.asarray(rows.user_id_N, np.int32))
    columns |= {metric: pa.array(np.asarray(values, np.float32)) for metric, values in rows.value_N.items()}
    table = pa.table(columns).replace_schema_metadata(
        {"format": str(FORMAT), "split": rows.split, "dataset": rows.dataset, "name": rows.name}
    )
    path = folder / f"{rows.name}.parquet"
    temporary = folder / f".{rows.name}.partial"
    pq.write_table(table, temporary)
    temporary.rename(path)
    return path


def read_row_metrics(path: Path) -> RowMetrics:
    """Read one evaluation.

    Raises:
        RequestError: no such file, not Parquet, another format, or a sample that is there twice.
    """
    legal = "rows/NAME.parquet of an evaluated run"
    if not path.is_file():
        raise RequestError(str(path), "no such file", legal)
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise RequestError(str(path), " ".join(str(error).split()), legal) from error
    metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    wrong = [name for name in ("name", "split", "dataset") if name not in metadata]
    wrong += [f.name for f in table.schema if not (pa.types.is_integer(f.type) or pa.types.is_floating(f.type))]
    if metadata.get("format") == str(FORMAT) and wrong:
        raise RequestError(str(path), f"{wrong[0]} is absent or no number", legal)
    if metadata.get("format") != str(FORMAT) or not set(KEYS) <= set(table.column_names):
        raise RequestError(str(path), f"format {metadata.get('format')!r}", f"format {FORMAT} with {', '.join(KEYS)}")
    sample_id_N = table.column("sample_id").to_numpy()
    if len(np.unique(sample_id_N)) != len(sample_id_N):
        raise RequestError(str(path), "a sample_id twice", "one row per sample")
    order = np.argsort(sample_id_N)
    return RowMetrics(
        name=metadata["name"],
        split=metadata["split"],
        dataset=metadata["dataset"],
        sample_id_N=sample_id_N[order],
        user_id_N=table.column("user_id").to_numpy()[order],
        value_N={
            name: table.column(name).to_numpy().astype(np.float32)[order]
            for name in table.column_names
            if name not in KEYS
        },
    )
