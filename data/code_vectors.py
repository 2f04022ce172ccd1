"""The centres of a quantiser beside its codes: `codes/NAME.codebooks.safetensors`.

A model whose code embeddings start at these centres begins with what the vectors know about items, instead of with
noise. Codes that were given, and not made by a quantiser, have none.

Suffixes: `_CD` code of a level, dimension of the item vectors; `_ID` item; `_E` step of a path; `_N` item at a level.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_arrays

from data.codes import Codes, codes_path
from data.errors import RequestError
from data.records import FloatArray

FORMAT: Final = "1"
_NAME: Final = "codebook_{level}"


def code_centres(codes: Codes, vectors_ID: FloatArray) -> tuple[FloatArray, ...]:
    """Centres of given codes, level by level: the mean over the items with a code of what the levels before leave of
    their vectors; zero for a code without items.

    Args:
        codes: paths of the items.
        vectors_ID: float32 [n_items, dims].
    """
    item_E = np.repeat(np.arange(codes.n_items), np.diff(codes.start))
    level_E = np.arange(len(codes.values)) - np.repeat(codes.start[:-1], np.diff(codes.start))
    left_ID = vectors_ID.astype(np.float64)
    centres = []
    for level, size in enumerate(codes.level_sizes):
        here = level_E == level
        item_N, code_N = item_E[here], codes.values[here]
        sum_CD = np.zeros((size, left_ID.shape[1]))
        np.add.at(sum_CD, code_N, left_ID[item_N])
        centre_CD = sum_CD / np.maximum(np.bincount(code_N, minlength=size), 1)[:, None]
        left_ID[item_N] -= centre_CD[code_N]
        centres.append(centre_CD.astype(np.float32))
    return tuple(centres)


def codebooks_path(dataset_path: Path, name: str) -> Path:
    """Where the codebooks of the codes called `name` lie."""
    return codes_path(dataset_path, name).with_suffix(".codebooks.safetensors")


def paths_digest(codes: Codes) -> str:
    """What ties codebooks to their codes: a digest of every path and of the sizes of the levels."""
    state = xxhash.xxh3_128(repr(codes.level_sizes).encode())
    state.update(np.ascontiguousarray(codes.values, dtype="<i4").tobytes())
    state.update(np.ascontiguousarray(codes.start, dtype="<i8").tobytes())
    return state.hexdigest()


def save_codebooks(path: Path, codes: Codes, codebooks: Sequence[FloatArray]) -> None:
    """Write the file: a temporary one first, then renamed.

    Args:
        path: from `codebooks_path`.
        codes: what they were made with.
        codebooks: float32 [codes of the level, dims] per level.
    """
    arrays = {
        _NAME.format(level=level): np.ascontiguousarray(book_CD, dtype=np.float32)
        for level, book_CD in enumerate(codebooks)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(save_arrays(arrays, metadata={"format": FORMAT, "paths": paths_digest(codes)}))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_codebooks(path: Path, codes: Codes) -> tuple[FloatArray, ...]:
    """The codebooks of codes, per level float32 [codes, dims].

    Raises:
        RequestError: absent, damaged, of another format version, or of other codes.
    """
    if not path.is_file():
        raise RequestError(str(path), "no such file", "codes made by `windlass data ids` from item vectors")
    try:
        with safe_open(path, framework="numpy") as reader:
            metadata = reader.metadata() or {}
            arrays = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RequestError(str(path), f"cannot be read ({error})", "a file written by `windlass data ids`") from error
    if metadata.get("format") != FORMAT:
        raise RequestError(str(path), f"format {metadata.get('format')!r}", f"format {FORMAT!r}")
    if metadata.get("paths") != paths_digest(codes):
        raise RequestError(str(path), "belongs to other codes", "the codebooks of the codes beside it")
    books = tuple(arrays.get(_NAME.format(level=level), np.zeros((0, 0))) for level in range(len(codes.level_sizes)))
    for level, (book_CD, size) in enumerate(zip(books, codes.level_sizes, strict=True)):
        if book_CD.ndim != 2 or len(book_CD) != size or not np.isfinite(book_CD).all():
            raise RequestError(f"{path}: level {level}", f"shape {book_CD.shape}", f"{size} finite vectors")
    return books
