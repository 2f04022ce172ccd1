"""Labels of items (genres, departments) as a matrix, from the attributes of items.parquet."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa

from data.errors import RequestError
from data.records import BoolArray

MANY_LABELS: Final = "genres"
"""MovieLens: several labels per item, divided by spaces (100K) or bars (1M)."""
ONE_LABEL: Final = "department"
"""Complete Journey: the text is the label."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ItemLabels:
    """Which item has which labels."""

    names: tuple[str, ...]
    label_IX: BoolArray
    """[n_items, labels]; an item without the attribute has none."""

    @staticmethod
    def read(items: pa.Table) -> ItemLabels:
        """From the columns `genres` or `department` of the item table, the first that is there.

        Raises:
            RequestError: neither column is there.
        """
        column = next((name for name in (MANY_LABELS, ONE_LABEL) if name in items.column_names), None)
        if column is None:
            found = f"items.parquet with the columns {', '.join(items.column_names)}"
            raise RequestError("labels of items", found, f"a column {MANY_LABELS} or {ONE_LABEL}")
        texts = items[column].to_pylist()
        split = _split if column == MANY_LABELS else _whole
        labels = [split(text) if text else [] for text in texts]
        names = tuple(sorted({name for some in labels for name in some}))
        number = {name: column for column, name in enumerate(names)}
        label_IX = np.zeros((len(labels), len(names)), dtype=bool)
        for item, some in enumerate(labels):
            label_IX[item, [number[name] for name in some]] = True
        return ItemLabels(names=names, label_IX=label_IX)


def _split(text: str) -> list[str]:
    return [name for name in re.split(r"[|\s]+", text) if name]


def _whole(text: str) -> list[str]:
    return [text.strip()] if text.strip() else []
