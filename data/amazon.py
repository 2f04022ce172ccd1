"""Amazon reviews of 2018 and 2023: JSON-lines files of reviews and of item metadata, gzip or plain.

2018: `reviewerID, asin, overall, unixReviewTime` (seconds, whole days) beside metadata with `asin, title, brand,
category, description`. 2023: `user_id, parent_asin, rating, timestamp` (milliseconds) beside metadata with
`parent_asin, title, store, categories, description`. The `title` of a 2023 review is the review's, not the item's.

Sources: Ni, Li and McAuley (EMNLP 2019) for 2018; Hou et al. (arXiv 2403.03952) for 2023.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data.parquet import check_file
from data.quarantine import Quarantine
from data.reading import read_json_lines
from data.sources import RawEvents, RawItems, Source, TimeUnit

_ATTRIBUTES = pa.schema([("brand", pa.string()), ("category", pa.string()), ("description", pa.string())])


@dataclass(frozen=True, kw_only=True)
class _Edition:
    """Field names of one edition."""

    year: str
    user: str
    item: str
    timestamp: str
    rating: str
    brand: str
    category: str
    time_unit: TimeUnit


_2018 = _Edition(
    year="2018",
    user="reviewerID",
    item="asin",
    timestamp="unixReviewTime",
    rating="overall",
    brand="brand",
    category="category",
    time_unit=TimeUnit.SECONDS,
)
_2023 = _Edition(
    year="2023",
    user="user_id",
    item="parent_asin",
    timestamp="timestamp",
    rating="rating",
    brand="store",
    category="categories",
    time_unit=TimeUnit.MILLISECONDS,
)


def amazon_2018(reviews: Path, metadata: Path | None) -> Source:
    """Reviews (`NAME.json.gz` or `NAME_5.json.gz`) and metadata (`meta_NAME.json.gz`) of 2018."""
    return _source(reviews, metadata, _2018)


def amazon_2023(reviews: Path, metadata: Path | None) -> Source:
    """Reviews (`NAME.jsonl.gz`) and metadata (`meta_NAME.jsonl.gz`) of 2023."""
    return _source(reviews, metadata, _2023)


def _source(reviews: Path, metadata: Path | None, edition: _Edition) -> Source:
    check_file(reviews)
    if metadata is not None:
        check_file(metadata)
    fields = (edition.user, edition.item, edition.timestamp, edition.rating)

    def events(quarantine: Quarantine) -> Iterator[RawEvents]:
        for first, rows in read_json_lines(reviews, fields, quarantine):
            user, item, timestamp, rating = (pa.array([_scalar(row[f]) for row in rows], pa.string()) for f in fields)
            yield RawEvents(
                source=reviews.name, first_row=first, user=user, item=item, timestamp=timestamp, rating=rating
            )

    def items(path: Path, quarantine: Quarantine) -> Iterator[RawItems]:
        names = (edition.item, "title", edition.brand, edition.category, "description")
        for first, rows in read_json_lines(path, names, quarantine):
            key, title, *rest = (pa.array([_scalar(row[f]) for row in rows], pa.string()) for f in names)
            attributes = pa.RecordBatch.from_arrays(rest, _ATTRIBUTES.names)
            yield RawItems(source=path.name, first_row=first, key=key, title=title, attributes=attributes)

    name = reviews.name.split(".")[0].lower()
    return Source(
        name=f"amazon-{edition.year}-{name}",
        description={
            "source": f"Amazon reviews {edition.year}",
            "files": str(reviews),
            **({} if metadata is None else {"items": str(metadata)}),
        },
        events=events,
        items=(lambda quarantine: items(metadata, quarantine)) if metadata is not None else None,
        attributes=_ATTRIBUTES if metadata is not None else pa.schema([]),
        time_unit=edition.time_unit,
    )


def _scalar(value: Any) -> str | None:
    """JSON value as text for the checks that follow: lists of text joined, other structures as JSON."""
    if value is None or isinstance(value, bool):
        return None if value is None else json.dumps(value)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return _scalar(", ".join(value))
    if isinstance(value, list | dict):
        return _scalar(json.dumps(value))
    return str(value)
