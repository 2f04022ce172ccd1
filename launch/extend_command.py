"""`windlass data extend`: a dataset with further and retired items."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import tyro
from pydantic import Field, model_validator

from data.dataset import Dataset
from data.errors import RequestError
from data.growth import extend_dataset
from data.parquet import READ_ERRORS, check_file, first_line
from data.settings import Settings


class ExtendCommand(Settings):
    """Arguments of the command."""

    dataset: Path
    """Folder that `windlass data import` wrote; it does not change."""
    out: Path
    """Folder of the new dataset, which shares the files that are the same."""
    items: Path | None = None
    """New items, Parquet or CSV: `item_key`, perhaps `title`, and other columns of the item table."""
    retire: tuple[str, ...] = ()
    """Keys of items that are not recommended any more; they keep their ids and codes."""
    name: str = Field("default", min_length=1)
    """Name of the codes that are extended; others are left behind. A dataset without codes needs none: to a language
    model its items may be titles."""

    @model_validator(mode="after")
    def _something(self) -> ExtendCommand:
        if self.items is None and not self.retire:
            raise RequestError("extend", "neither --items nor --retire", "something to change")
        return self


def extend_command(arguments: Annotated[ExtendCommand, tyro.conf.arg(name="")]) -> dict[str, Any]:
    """Add items to a dataset and retire others, without touching an old item's id or codes, in a new folder.

    `windlass continual` on the new folder goes on from a model of the old one: its vocabulary grows by the new codes.
    """
    items = None if arguments.items is None else read_items(arguments.items)
    growth = extend_dataset(
        Dataset.open(arguments.dataset),
        arguments.out,
        items=items,
        retire=arguments.retire,
        retired_at=int(time.time()),
        codes_name=arguments.name,
    )
    answer = {
        "path": str(arguments.out),
        "items": growth.dataset.n_items,
        "new_items": growth.new_items,
        "retired_items": growth.retired_items,
        "new_codes": growth.new_codes,
        "level_sizes": [] if growth.codes is None else list(growth.codes.level_sizes),
        "fingerprint": growth.dataset.fingerprint,
    }
    codes = f"{growth.new_codes} new codes on the last level, level sizes {answer['level_sizes']}"
    print(
        f"{arguments.out}: {answer['items']:,} items, {growth.new_items:,} of them new, {growth.retired_items:,} "
        f"retired now; {codes if growth.codes else 'no codes'}"
    )
    return answer


def read_items(path: Path) -> pa.Table:
    """A table of items from Parquet or CSV; keys may be numbers.

    Raises:
        RequestError: missing or unreadable.
    """
    check_file(path)
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else pacsv.read_csv(path)
    except READ_ERRORS as error:
        raise RequestError(str(path), f"cannot be read ({first_line(error)})", "a Parquet or CSV file") from error
    if "item_key" in table.column_names:
        place = table.column_names.index("item_key")
        table = table.set_column(place, "item_key", table["item_key"].cast(pa.string()))
    return table
