"""Semantic IDs: residual quantisation of item vectors (k-means per level), and what to do about collisions.

Level l quantises what the levels before leave over, so that items which share a prefix are alike. `resolve` gives
every item a path of its own: within each prefix, items and last codes are matched at the least total distortion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from data.codes import Codes, OnCollision
from data.errors import RequestError
from data.records import BoolArray, FloatArray, IntArray

_FIRST_CANDIDATES: Final = 16
_BALANCE_ROUNDS: Final = 15
_SID_TOKEN: Final = re.compile(r"<[a-z]_(\d+)>")


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantised:
    """Codes of a residual quantiser."""

    code_NL: IntArray
    codebooks: tuple[FloatArray, ...]
    """Per level [codes, dims]."""
    distortion_L: tuple[float, ...]
    """Share of the vectors' variance that is left after each level."""


def quantise(
    vectors: FloatArray, level_sizes: Sequence[int], *, seed: int, iterations: int = 40, balance: float = 0.0
) -> Quantised:
    """Residual k-means with faiss.

    Args:
        vectors: float32 [N, dims].
        balance: with a positive value, a first code takes at most `balance * N / level_sizes[0]` items.

    Raises:
        RequestError: more codes at a level than items, or vectors that are not finite.
    """
    check_level_sizes(level_sizes, len(vectors), OnCollision.SHARE)
    if not np.isfinite(vectors).all():
        raise RequestError("item vectors", "not finite", "finite numbers")
    residual = np.ascontiguousarray(vectors, dtype=np.float32)
    total = float(((residual - residual.mean(0)) ** 2).sum())
    codes, codebooks, left = [], [], []
    for level, size in enumerate(level_sizes):
        code_N, codebook = _kmeans(residual, size, seed + level, iterations)
        if level == 0 and balance > 0:
            code_N, codebook = _balance(residual, code_N, codebook, math.ceil(len(vectors) / size * balance))
        residual = np.ascontiguousarray(residual - codebook[code_N])
        codes.append(code_N)
        codebooks.append(codebook)
        left.append(float((residual**2).sum()) / total if total else 0.0)
    return Quantised(code_NL=np.stack(codes, 1), codebooks=tuple(codebooks), distortion_L=tuple(left))


def check_level_sizes(level_sizes: Sequence[int], n_items: int, on_collision: OnCollision) -> None:
    """Refuse level sizes that cannot work for that many items."""
    if max(level_sizes) > n_items:
        raise RequestError("level_sizes", max(level_sizes), f"at most {n_items}, the number of items")
    if on_collision is OnCollision.RESOLVE:
        _check_paths(level_sizes, n_items)


def _check_paths(level_sizes: Sequence[int], n_items: int) -> None:
    paths = math.prod(level_sizes)
    if paths < n_items:
        legal = f"sizes whose product is at least {n_items}, the number of items; or on_collision share"
        raise RequestError("level_sizes", f"{list(level_sizes)} ({paths} paths)", legal)


def _kmeans(vectors: FloatArray, size: int, seed: int, iterations: int) -> tuple[IntArray, FloatArray]:
    import faiss

    kmeans = faiss.Kmeans(
        vectors.shape[1], size, niter=iterations, seed=seed, nredo=3, min_points_per_centroid=1, verbose=False
    )
    kmeans.train(vectors)
    _, nearest = kmeans.index.search(vectors, 1)
    return nearest[:, 0].astype(np.int32), np.asarray(kmeans.centroids, dtype=np.float32)


def _balance(vectors: FloatArray, code_N: IntArray, codebook: FloatArray, capacity: int) -> tuple[IntArray, FloatArray]:
    """Lloyd rounds in which a code takes at most `capacity` items; who loses most by its second choice goes first."""
    if capacity * len(codebook) < len(vectors):
        raise RequestError(
            "balance", f"room for {capacity * len(codebook)} items", f"{len(vectors)} or more: at least 1"
        )
    for _ in range(_BALANCE_ROUNDS):
        distance_NK = squared_distances(vectors, codebook)
        preference_NK = np.argsort(distance_NK, 1)
        two_NK = np.partition(distance_NK, 1, axis=1)[:, :2] if len(codebook) > 1 else np.repeat(distance_NK, 2, 1)
        room = np.full(len(codebook), capacity)
        code_N = np.empty(len(vectors), dtype=np.int32)
        for row in np.argsort(-(two_NK[:, 1] - two_NK[:, 0]), kind="stable"):
            choice = next(code for code in preference_NK[row] if room[code])
            code_N[row] = choice
            room[choice] -= 1
        taken = np.bincount(code_N, minlength=len(codebook))
        sums = np.zeros(codebook.shape, dtype=np.float64)
        np.add.at(sums, code_N, vectors)
        means = (sums / np.maximum(taken, 1)[:, None]).astype(np.float32)
        codebook = np.where(taken[:, None] > 0, means, codebook)
    return code_N, codebook


def resolve_collisions(vectors: FloatArray, quantised: Quantised) -> IntArray:
    """Paths [N, L] that are all different, near the quantiser's.

    Items of a prefix (all levels but the last) that has more items than last codes first move to the nearest prefix
    with room, those that fit worst first; then each prefix with a collision matches its items to last codes.

    Raises:
        RequestError: more items than paths.
    """
    sizes = [len(codebook) for codebook in quantised.codebooks]
    _check_paths(sizes, len(vectors))
    code_NL = quantised.code_NL.copy()
    codebooks, last = quantised.codebooks[:-1], quantised.codebooks[-1]
    members: dict[tuple[int, ...], list[int]] = {}
    for row, prefix in enumerate(map(tuple, code_NL[:, :-1].tolist())):
        members.setdefault(prefix, []).append(row)
    crowded = [prefix for prefix, rows in members.items() if len(rows) > len(last)]
    for prefix in crowded:
        rows = np.asarray(members[prefix])
        distance = ((vectors[rows] - _decode(codebooks, np.asarray(prefix))) ** 2).sum(1)
        rows = rows[np.argsort(distance, kind="stable")]
        members[prefix] = rows[: len(last)].tolist()
        for row in rows[len(last) :].tolist():
            nearest = _nearest_prefix_with_room(vectors[row], codebooks, members, len(last))
            members.setdefault(nearest, []).append(row)
            code_NL[row, :-1] = nearest
            residual = vectors[row] - _decode(codebooks, np.asarray(nearest))
            code_NL[row, -1] = squared_distances(residual[None], last)[0].argmin()
    for prefix, group in members.items():
        rows = np.asarray(group)
        if len(rows) == len(np.unique(code_NL[rows, -1])):
            continue
        residual = vectors[rows] - _decode(codebooks, np.asarray(prefix))
        order, code = linear_sum_assignment(squared_distances(residual, last))
        code_NL[rows[order], -1] = code
    return code_NL


def _nearest_prefix_with_room(
    vector: FloatArray,
    codebooks: Sequence[FloatArray],
    members: dict[tuple[int, ...], list[int]],
    room: int,
) -> tuple[int, ...]:
    """Best-first over the prefixes: a beam over the levels, widened until it holds a prefix that is not full."""
    prefixes = math.prod(len(codebook) for codebook in codebooks)
    width = _FIRST_CANDIDATES
    while True:
        beams: list[tuple[int, ...]] = [()]
        residual_BD = vector[None]
        for codebook in codebooks:
            distance = squared_distances(residual_BD, codebook).ravel()
            best = np.argsort(distance, kind="stable")[:width]
            parent, code = best // len(codebook), best % len(codebook)
            beams = [(*beams[p], int(c)) for p, c in zip(parent, code, strict=True)]
            residual_BD = residual_BD[parent] - codebook[code]
        for beam in beams:
            if len(members.get(beam, ())) < room:
                return beam
        if width >= prefixes:
            raise RequestError("level_sizes", "every path is taken", "more codes per level")
        width *= 4


def _decode(codebooks: Sequence[FloatArray], prefix: npt.NDArray[np.integer]) -> FloatArray | float:
    return sum((book[code] for book, code in zip(codebooks, prefix, strict=True)), start=0.0)


def squared_distances(vectors: FloatArray, codebook: FloatArray) -> npt.NDArray[np.float64]:
    """Squared distances [N, K] in float64, so that ties and small gaps are not rounding."""
    wide, book = vectors.astype(np.float64), codebook.astype(np.float64)
    squares: npt.NDArray[np.float64] = (wide**2).sum(1)[:, None] - 2 * wide @ book.T + (book**2).sum(1)
    return np.maximum(squares, 0.0)


def collisions(code_NL: npt.NDArray[np.integer]) -> tuple[int, int]:
    """(number of different paths, number of items that share their path with another)."""
    _, inverse, counts = np.unique(code_NL, axis=0, return_inverse=True, return_counts=True)
    shared: BoolArray = counts[inverse.ravel()] > 1
    return len(counts), int(shared.sum())


def make_codes(
    vectors: FloatArray,
    level_sizes: Sequence[int],
    on_collision: OnCollision,
    *,
    seed: int,
    iterations: int = 40,
    balance: float = 0.0,
    provenance: dict[str, Any] | None = None,
) -> Codes:
    """Codes of item vectors, with what happened on the way added to the provenance."""
    quantised = quantise(vectors, level_sizes, seed=seed, iterations=iterations, balance=balance)
    return codes_of(vectors, quantised, on_collision, provenance)


def codes_of(
    vectors: FloatArray, quantised: Quantised, on_collision: OnCollision, provenance: dict[str, Any] | None = None
) -> Codes:
    """The codes of quantised vectors; see `make_codes`."""
    paths, colliding = collisions(quantised.code_NL)
    code_NL = quantised.code_NL
    if on_collision is OnCollision.RESOLVE:
        code_NL = resolve_collisions(vectors, quantised)
    facts = {
        "quantiser_paths": paths,
        "colliding_items": colliding,
        "moved_items": int((code_NL != quantised.code_NL).any(1).sum()),
        "paths": collisions(code_NL)[0],
        "distortion": [round(left, 6) for left in quantised.distortion_L],
    }
    items, levels = code_NL.shape
    return Codes(
        values=np.ascontiguousarray(code_NL, dtype=np.int32).ravel(),
        start=np.arange(items + 1, dtype=np.int64) * levels,
        level_sizes=tuple(len(codebook) for codebook in quantised.codebooks),
        on_collision=on_collision,
        provenance={**(provenance or {}), **facts},
    )


def given_codes(column: Sequence[object], where: str, provenance: dict[str, Any] | None = None) -> Codes:
    """Codes that come with the items: lists of codes, or texts such as `<a_12><b_3><c_7>`. Items may share a path.

    Raises:
        RequestError: an item without codes, or a text that is not made of such tokens.
    """
    paths = [_given_path(value, f"{where}, item {item}") for item, value in enumerate(column)]
    facts = {"paths": len(set(map(tuple, paths)))}
    codes = Codes.from_lists(paths, on_collision=OnCollision.SHARE, provenance={**(provenance or {}), **facts})
    codes.check(where)
    return codes


def _given_path(value: object, where: str) -> list[int]:
    legal = "a list of codes, or a text such as <a_12><b_3><c_7>"
    if isinstance(value, str):
        tokens = _SID_TOKEN.findall(value)
        if not tokens or _SID_TOKEN.sub("", value).strip():
            raise RequestError(where, repr(value), legal)
        return [int(token) for token in tokens]
    if isinstance(value, list) and value and all(isinstance(code, int) and code >= 0 for code in value):
        return list(value)
    raise RequestError(where, repr(value), legal)
