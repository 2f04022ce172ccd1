"""Contract: codebooks written beside codes come back as they were, and only for those codes.

Not checked here: that `windlass data ids` writes them (test_semantic_ids), and what a model makes of them
(tests/trainer/test_initial_model.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.code_vectors import code_centres, codebooks_path, load_codebooks, save_codebooks
from data.codes import Codes
from data.errors import RequestError


def books(*sizes: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.standard_normal((size, 5)).astype(np.float32) for size in sizes]


def test_round_trip(tmp_path: Path) -> None:
    codes = Codes.from_lists([[0, 1], [2, 0], [2, 1]], [3, 2])
    path = codebooks_path(tmp_path, "v1.2")
    assert path.name == "v1.2.codebooks.safetensors"
    written = books(3, 2)
    save_codebooks(path, codes, written)
    assert [path.name for path in path.parent.iterdir()] == [path.name]
    read = load_codebooks(path, codes)
    for before, after in zip(written, read, strict=True):
        np.testing.assert_array_equal(before, after)


def test_other_codes_are_refused(tmp_path: Path) -> None:
    codes = Codes.from_lists([[0, 1], [2, 0], [2, 1]], [3, 2])
    path = codebooks_path(tmp_path, "a")
    save_codebooks(path, codes, books(3, 2))
    with pytest.raises(RequestError, match="other codes"):
        load_codebooks(path, Codes.from_lists([[0, 1], [2, 1], [2, 0]], [3, 2]))
    save_codebooks(path, codes, books(3))
    with pytest.raises(RequestError, match="level 1"):
        load_codebooks(path, codes)


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"no safetensors"])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    codes = Codes.from_lists([[0], [1]], [2])
    path = codebooks_path(tmp_path, "a")
    with pytest.raises(RequestError, match="no such file"):
        load_codebooks(path, codes)
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(RequestError, match="cannot be read"):
        load_codebooks(path, codes)


def test_centres_of_given_codes_are_means_of_what_is_left() -> None:
    codes = Codes.from_lists([[0, 1], [0, 0], [2]], [3, 2])
    vectors = np.array([[2.0, 0.0], [4.0, 2.0], [0.0, 5.0]], dtype=np.float32)
    first, second = code_centres(codes, vectors)
    np.testing.assert_allclose(first, [[3, 1], [0, 0], [0, 5]])
    np.testing.assert_allclose(second, [[1, 1], [-1, -1]])
