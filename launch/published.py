"""Published numbers beside ours: rows of a CSV `dataset, split, method, metric, value, source, note`."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.errors import RequestError

COLUMNS = ("dataset", "method", "metric", "value")


def published_rows(path: Path, dataset: str) -> dict[str, dict[str, float]]:
    """Values by method and metric name (`hr@10`) of one dataset, in the order of the file.

    Raises:
        RequestError: no such file, a missing column, a value that is no number, or nothing about the dataset.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise RequestError(str(path), f"no column {', '.join(missing)}", f"columns {', '.join(COLUMNS)}")
            rows = [row for row in reader if (row["dataset"] or "").replace("-", "_") == dataset.replace("-", "_")]
    except OSError as error:
        raise RequestError("--published", f"{path}: {error.strerror}", "a CSV file of published results") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise RequestError("--published", f"{path}: {error}", "a CSV file in UTF-8") from error
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        where = f"{path}: {row['method']} {row['metric']}"
        try:
            value = float(row["value"] or "")
        except ValueError as error:
            raise RequestError(where, repr(row["value"]), "a number") from error
        if not math.isfinite(value):
            raise RequestError(where, row["value"], "a finite number; leave the row out where there is none")
        found.setdefault(row["method"], {})[row["metric"].lower()] = value
    if not found:
        raise RequestError(str(path), f"nothing about the dataset {dataset}", "a file with rows of this dataset")
    return found


def table(columns: Sequence[str], rows: Mapping[str, Mapping[str, float]]) -> str:
    """A plain-text table; `-` where a method has no value."""
    width = max((len(name) for name in rows), default=0)
    lines = [" " * width + "".join(f"  {column:>9}" for column in columns)]
    for name, values in rows.items():
        cells = "".join(f"  {values[c]:>9.4f}" if c in values else f"  {'-':>9}" for c in columns)
        lines.append(f"{name:<{width}}{cells}")
    return "\n".join(lines)
