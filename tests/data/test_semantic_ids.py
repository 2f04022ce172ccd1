"""Contract of `data.semantic_ids`, `data.embeddings` and `data.code_building`: residual codes are the nearest ones,
resolved paths are all different and optimal within a prefix, vectors equal a written-out PPMI, training reads nothing
at or behind the validation boundary, and codes are made once per name.

Not checked: whether the codes are good for recommendation (the demo shows it).
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.code_building import IdSettings, Source, build_codes, item_vectors
from data.codes import Codes, OnCollision
from data.embeddings import cooccurrence_counts, cooccurrence_vectors, join_vectors, packaged_model, title_vectors
from data.errors import RequestError
from data.semantic_ids import Quantised, collisions, given_codes, make_codes, quantise, resolve_collisions
from tests.data.tiny import import_events, sequences
from tests.requirements import require

RNG = np.random.default_rng(5)


def test_codes_are_the_nearest_of_what_is_left_over() -> None:
    vectors = RNG.normal(size=(60, 4)).astype(np.float32)
    quantised = quantise(vectors, (8, 5), seed=1)
    left = vectors.copy()
    for level, codebook in enumerate(quantised.codebooks):
        distance = ((left[:, None] - codebook) ** 2).sum(2)
        code = quantised.code_NL[:, level]
        assert np.allclose(distance[np.arange(60), code], distance.min(1), atol=1e-5)
        left = left - codebook[code]
    spread = ((vectors - vectors.mean(0)) ** 2).sum()
    assert quantised.distortion_L[1] == pytest.approx((left**2).sum() / spread, rel=1e-5)
    assert quantised.distortion_L[1] < quantised.distortion_L[0] < 1
    again = quantise(vectors, (8, 5), seed=1)
    assert (again.code_NL == quantised.code_NL).all()


def test_balance_caps_the_first_codes() -> None:
    vectors = np.concatenate([RNG.normal(size=(50, 3)), 20 + RNG.normal(size=(10, 3))]).astype(np.float32)
    balanced = quantise(vectors, (6, 4), seed=0, balance=1.2)
    assert np.bincount(balanced.code_NL[:, 0], minlength=6).max() <= 12
    assert np.bincount(quantise(vectors, (6, 4), seed=0).code_NL[:, 0]).max() > 12


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    share=st.floats(0.2, 1.0),
    spread=st.sampled_from([0.0, 0.1, 3.0]),
)
def test_resolved_paths_are_all_different(seed: int, sizes: list[int], share: float, spread: float) -> None:
    rng = np.random.default_rng(seed)
    items = max(1, int(np.prod(sizes) * share))
    vectors = (spread * rng.normal(size=(items, 2))).astype(np.float32)
    books = tuple(rng.normal(size=(size, 2)).astype(np.float32) for size in sizes)
    first = np.stack([rng.integers(0, max(1, size // 2), items) for size in sizes], 1).astype(np.int32)
    resolved = resolve_collisions(vectors, Quantised(code_NL=first, codebooks=books, distortion_L=()))
    assert collisions(resolved) == (items, 0)
    assert ((resolved >= 0) & (resolved < np.asarray(sizes))).all()


def test_a_collision_is_resolved_at_the_least_distortion() -> None:
    """Three items on one path of a prefix: the best of all assignments of last codes, by enumeration."""
    books = (np.zeros((1, 2), np.float32), RNG.normal(size=(5, 2)).astype(np.float32))
    vectors = RNG.normal(size=(3, 2)).astype(np.float32)
    quantised = Quantised(code_NL=np.zeros((3, 2), np.int32), codebooks=books, distortion_L=())
    found = resolve_collisions(vectors, quantised)[:, 1]

    def cost(codes: tuple[int, ...]) -> float:
        return float(((vectors - books[1][list(codes)]) ** 2).sum())

    best = min(itertools.permutations(range(5), 3), key=cost)
    assert cost(tuple(found.tolist())) == pytest.approx(cost(best))


def test_paths_without_collision_stay() -> None:
    vectors = RNG.normal(size=(40, 6)).astype(np.float32)
    quantised = quantise(vectors, (8, 8), seed=0)
    resolved = resolve_collisions(vectors, quantised)
    prefix, count = np.unique(quantised.code_NL, axis=0, return_counts=True)
    crowded = {tuple(row[:1]) for row in prefix[count > 1].tolist()}
    for before, after in zip(quantised.code_NL.tolist(), resolved.tolist(), strict=True):
        if tuple(before[:1]) not in crowded:
            assert before == after


def test_share_keeps_the_quantisers_paths_and_counts_them() -> None:
    vectors = np.repeat(RNG.normal(size=(5, 3)).astype(np.float32), 2, axis=0)
    codes = make_codes(vectors, (5,), OnCollision.SHARE, seed=0)
    assert codes.distinct_paths() == 5
    assert codes.provenance["colliding_items"] == 10
    assert codes.provenance["moved_items"] == 0
    with pytest.raises(RequestError, match=r"\[5\] \(5 paths\); legal: .*at least 10"):
        make_codes(vectors, (5,), OnCollision.RESOLVE, seed=0)
    with pytest.raises(RequestError, match="level_sizes: 11; legal: at most 10"):
        make_codes(vectors, (11,), OnCollision.SHARE, seed=0)
    resolved = make_codes(vectors, (5, 3), OnCollision.RESOLVE, seed=0)
    assert resolved.distinct_paths() == 10


def test_vectors_that_are_not_finite_are_refused() -> None:
    with pytest.raises(RequestError, match="not finite"):
        quantise(np.full((4, 2), np.nan, dtype=np.float32), (2,), seed=0)


def test_given_codes() -> None:
    codes = given_codes([[3, 0], "<a_3><b_1>", "<a_3><b_0>"], "column sid")
    assert codes.values.tolist() == [3, 0, 3, 1, 3, 0]
    assert codes.on_collision is OnCollision.SHARE
    assert codes.provenance == {"paths": 2}
    for bad in (None, [], "", "x<a_1>", [-1], ["1"], 7):
        with pytest.raises(RequestError, match="column sid, item 1"):
            given_codes([[0], bad], "column sid")


def brute_counts(events: list[list[int]], items: int, window: int | None) -> np.ndarray:
    counts = np.zeros((items, items))
    for sequence in events:
        if window is None:
            for a, b in itertools.permutations(set(sequence), 2):
                counts[a, b] += 1
            continue
        for i, j in itertools.permutations(range(len(sequence)), 2):
            if abs(i - j) <= window and sequence[i] != sequence[j]:
                counts[sequence[i], sequence[j]] += 1
    return counts


@settings(deadline=None, max_examples=60)
@given(
    events=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=5),
    window=st.sampled_from([None, 1, 2, 9]),
)
def test_counts_equal_a_plain_loop(events: list[list[int]], window: int | None) -> None:
    counts = cooccurrence_counts(sequences(events, [0] * len(events)), 6, window)
    assert counts.toarray().tolist() == brute_counts(events, 6, window).tolist()


@pytest.mark.parametrize("items", [30, 600])
def test_vectors_give_back_the_ppmi_matrix(items: int) -> None:
    """Against the formula written out densely; 600 items take the sparse solver."""
    events = [RNG.integers(0, 30, 8).tolist() for _ in range(200)]
    dims = 20
    vectors = cooccurrence_vectors(sequences(events, [0] * 200), items, dims, None)
    counts = brute_counts(events, items, None)
    row, context = counts.sum(1), counts.sum(1) ** 0.75
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log(counts / (row[:, None] * (context / context.sum())))
    u, s, _ = np.linalg.svd(np.where(np.isfinite(pmi), np.maximum(pmi, 0), 0))
    expected = u[:, :dims] * np.sqrt(s[:dims])
    assert np.allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-3)
    assert not vectors[30:].any()
    assert (vectors == cooccurrence_vectors(sequences(events, [0] * 200), items, dims, None)).all()


def test_impossible_vectors_are_refused() -> None:
    with pytest.raises(RequestError, match="dims: 3; legal: 1 to 2"):
        cooccurrence_vectors(sequences([[0, 1, 2]], [0]), 3, 3, None)
    with pytest.raises(RequestError, match="no two items occur together"):
        cooccurrence_vectors(sequences([[0], [1]], [0, 0]), 3, 2, None)


def test_joined_vectors_have_the_asked_weights() -> None:
    joined = join_vectors(RNG.normal(size=(9, 3)).astype(np.float32), RNG.normal(size=(9, 2)).astype(np.float32), 0.5)
    assert np.linalg.norm(joined[:, :3], axis=1).mean() == pytest.approx(1.0, rel=1e-5)
    assert np.linalg.norm(joined[:, 3:], axis=1).mean() == pytest.approx(0.5, rel=1e-5)


def events_with_plant(plant: bool) -> list[tuple[int, str, int]]:
    """20 users; late in time, behind the validation boundary, users have items x and y together, or do not."""
    rng = np.random.default_rng(1)
    events = [(user, f"i{rng.integers(0, 12):02}", 100 * t + user) for t in range(20) for user in range(20)]
    events += [(50, "x", 1), (51, "y", 2), (50, "i00", 3), (51, "i01", 4)]
    late = [("x", 5000), ("y", 5001)] if plant else [("i00", 5000), ("i01", 5001)]
    return events + [(user, item, time + 2 * user) for user in range(20) for item, time in late]


def test_a_pair_planted_in_test_events_leaves_no_trace(tmp_path: Path) -> None:
    items = pa.table({"item_id": ["x", "y", *(f"i{i:02}" for i in range(12))], "title": [f"t {i}" for i in range(14)]})
    clean = import_events(tmp_path / "clean", events_with_plant(False), items)
    planted = import_events(tmp_path / "planted", events_with_plant(True), items)
    chosen = IdSettings(source=Source.COOCCURRENCE, dims=6, level_sizes=(6, 6))
    vectors, _ = item_vectors(clean, chosen)
    assert (item_vectors(planted, chosen)[0] == vectors).all()
    assert {0, 1} <= set(planted.samples("test").target_N.tolist())
    every_event = cooccurrence_vectors(planted.sequences("test"), planted.n_items, 6, None)
    assert not np.allclose(every_event, vectors, atol=1e-3)
    codes, _ = build_codes(clean, "c", chosen)
    assert build_codes(planted, "c", chosen)[0].values.tolist() == codes.values.tolist()


def test_codes_are_made_once_per_name(tmp_path: Path) -> None:
    dataset = import_events(tmp_path, events_with_plant(False))
    chosen = IdSettings(source=Source.COOCCURRENCE, dims=6, level_sizes=(6, 6))
    codes, existed = build_codes(dataset, "c", chosen)
    assert not existed
    assert codes.provenance["fingerprint"] == dataset.fingerprint
    assert codes.provenance["settings"]["dims"] == 6
    again, existed = build_codes(dataset, "c", chosen)
    assert existed
    assert again.values.tolist() == codes.values.tolist()
    with pytest.raises(RequestError, match=r"made with dims 6; legal: another name"):
        build_codes(dataset, "c", chosen.model_copy(update={"dims": 5}))
    with pytest.raises(RequestError, match=r"column: sid; legal: item_id \|"):
        build_codes(dataset, "d", IdSettings(source=Source.COLUMN))
    assert Codes.load(dataset.path / "codes" / "c.parquet").on_collision is OnCollision.RESOLVE


def test_title_vectors_of_the_packaged_model(tmp_path: Path) -> None:
    require("sentence-model")
    texts = ["The Godfather, 1972, crime", "The Godfather: Part II, 1974, crime", "Toy Story, animation", " "]
    vectors = title_vectors(texts, packaged_model())
    assert vectors.shape == (4, 384)
    assert np.allclose(np.linalg.norm(vectors[:3], axis=1), 1, atol=1e-4)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    assert not vectors[3].any()
    with pytest.raises(RequestError, match=r"no modules\.json"):
        title_vectors(texts, tmp_path)
