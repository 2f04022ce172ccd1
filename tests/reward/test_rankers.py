"""Contract: rankers survive a save and load bit for bit and refuse damaged, foreign or unknown artefacts; co-occurrence
equals a plain double loop; SASRec scores are those of its network and do not depend on the rest of the call; ONNX
models and classes by import path load or are refused with one line.

Not checked here: quality on real data (tests/trainer/test_ranker_training), the service.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.dataset import Sequences
from data.errors import RequestError
from reward.cooccurrence import POPULARITY_SHARE, CooccurrenceRanker
from reward.popularity import PopularityRanker
from reward.ranker import CatalogueRanker, Ranker, check_ranker, load_ranker
from reward.ranking import ABSENT, rank_catalogue, top_items
from reward.sasrec import SASRec, SASRecRanker, SASRecShape
from tests.reward.rankers import PlainRanker

ITEMS = 30
HISTORIES = [np.array(h, np.int32) for h in ([], [3], [4, 5, 6, 4], list(range(ITEMS)) * 3)]
CANDIDATES = [np.array(c, np.int32) for c in ([0, 1, 29], [], [7], list(range(ITEMS)))]


def sequences(rows: list[list[int]]) -> Sequences:
    lengths = np.array([len(row) for row in rows])
    ends = np.cumsum(lengths)
    return Sequences(
        values=np.concatenate(rows).astype(np.int32),
        start_S=ends - lengths,
        end_S=ends,
        loss_from_S=np.ones(len(rows), np.int64),
        user_id_S=np.arange(len(rows), dtype=np.int32),
    )


def rankers() -> dict[str, CatalogueRanker]:
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    network = SASRec(SASRecShape(n_items=ITEMS, width=16, max_history=10))
    torch.nn.init.normal_(network.bias)
    rows = [random.integers(0, ITEMS, random.integers(2, 40)).tolist() for _ in range(20)]
    return {
        "sasrec": SASRecRanker(network, chunk=3),
        "cooccurrence": CooccurrenceRanker.fit(
            sequences(rows), ITEMS, window=5, normalisation=0.5, recency=0.8, history=10
        ),
        "popularity": PopularityRanker(random.integers(0, 100, ITEMS)),
    }


@pytest.mark.parametrize("kind", ["sasrec", "cooccurrence", "popularity"])
def test_saved_and_loaded_scores_are_the_same_bits(kind: str, tmp_path: Path) -> None:
    ranker = rankers()[kind]
    ranker.save(tmp_path)  # type: ignore[attr-defined]
    assert not list(tmp_path.glob("*.pkl"))
    assert {p.name for p in tmp_path.iterdir()} == {
        "ranker.json",
        "weights.safetensors",
    }
    loaded = load_ranker(tmp_path)
    assert isinstance(loaded, CatalogueRanker)
    for one, other in zip(ranker.score(HISTORIES, CANDIDATES), loaded.score(HISTORIES, CANDIDATES), strict=True):
        assert one.tobytes() == other.tobytes()
        assert one.dtype == np.float32
    full = loaded.score_catalogue(HISTORIES)
    for row, wanted, scores in zip(full, CANDIDATES, loaded.score(HISTORIES, CANDIDATES), strict=True):
        np.testing.assert_allclose(row[wanted], scores, rtol=1e-5, atol=1e-5)


def test_cooccurrence_equals_the_plain_double_loop() -> None:
    rows = [[0, 1, 2, 1], [2, 3, 0, 0, 4]]
    window, normalisation, recency = 2, 0.25, 0.5
    count = np.bincount(np.concatenate(rows), minlength=5)
    weight = np.zeros((5, 5))
    for row in rows:
        for i, a in enumerate(row):
            for j, b in enumerate(row):
                if 0 < abs(i - j) <= window:
                    weight[a, b] += 1 / abs(i - j)
    weight /= (count[:, None] * count[None, :]) ** normalisation
    ranker = CooccurrenceRanker.fit(
        sequences(rows), 5, window=window, normalisation=normalisation, recency=recency, history=2
    )
    got = ranker.score_catalogue([np.array([3, 0, 1])])[0]
    expected = weight[1] + recency * weight[0] + POPULARITY_SHARE * count / count.max()
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_sasrec_scores_do_not_depend_on_the_rest_of_the_call() -> None:
    ranker = rankers()["sasrec"]
    together = ranker.score(HISTORIES, CANDIDATES)
    for history, wanted, scores in zip(HISTORIES, CANDIDATES, together, strict=True):
        np.testing.assert_allclose(ranker.score([history], [wanted])[0], scores, atol=1e-6)


def test_sasrec_is_causal_and_cuts_the_oldest_items() -> None:
    ranker = rankers()["sasrec"]
    assert isinstance(ranker, SASRecRanker)
    token = torch.randint(0, ITEMS, (1, 11))
    changed = token.clone()
    changed[0, 6:] = 0
    with torch.inference_mode():
        assert torch.allclose(ranker.network(token)[0, :6], ranker.network(changed)[0, :6], atol=1e-6)
    long, cut = np.arange(25, dtype=np.int32), np.arange(15, 25, dtype=np.int32)
    assert ranker.score([long], [CANDIDATES[3]])[0].tolist() == ranker.score([cut], [CANDIDATES[3]])[0].tolist()


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("ranker.json", lambda b: b[:20], "not JSON"),
        ("ranker.json", lambda b: b"{}", "missing or of a wrong type"),
        ("ranker.json", lambda b: b.replace(b'"format": 1', b'"format": 2'), "legal: 1, the version"),
        ("ranker.json", lambda b: b.replace(b"sasrec", b"unsure"), "sasrec | cooccurrence | popularity"),
        ("ranker.json", lambda b: b.replace(b'"width": 16', b'"width": 32'), "does not fit its kind"),
        ("weights.safetensors", lambda b: b[:-1] + b"?", "legal: the digest of ranker.json"),
    ],
)
def test_damaged_artefacts_are_refused(file: str, damage: object, words: str, tmp_path: Path) -> None:
    rankers()["sasrec"].save(tmp_path)  # type: ignore[attr-defined]
    path = tmp_path / file
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(RequestError) as caught:
        load_ranker(tmp_path)
    assert words in str(caught.value)


def test_weights_that_are_missing_or_no_safetensors_are_refused(tmp_path: Path) -> None:
    rankers()["popularity"].save(tmp_path)  # type: ignore[attr-defined]
    description = json.loads((tmp_path / "ranker.json").read_text())
    import xxhash

    (tmp_path / "weights.safetensors").write_bytes(b"gibberish")
    description["digest"] = xxhash.xxh3_128_hexdigest(b"gibberish")
    (tmp_path / "ranker.json").write_text(json.dumps(description))
    with pytest.raises(RequestError, match="not safetensors"):
        load_ranker(tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(RequestError, match="missing"):
        load_ranker(tmp_path)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("nothing/here", {}, "an artefact folder, a .onnx file, or package.module:Class"),
        ("no_such_module:Ranker", {}, "No module named"),
        ("tests.reward.rankers:plain_scores", {}, "is no class"),
        ("tests.reward.rankers:Absent", {}, "no attribute 'Absent'"),
        ("tests.reward.rankers:PlainRanker", {"depth": 3}, "keyword arguments of"),
        ("tests.reward.rankers:NoRanker", {}, "a class with score"),
        ("absent.onnx", {}, "an existing .onnx file"),
    ],
)
def test_what_is_no_ranker_is_refused_before_anything_starts(source: str, options: dict[str, int], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_ranker(source, options)
    assert words in str(caught.value)


def test_a_class_by_import_path_is_a_ranker() -> None:
    ranker = load_ranker("tests.reward.rankers:PlainRanker")
    assert isinstance(ranker, Ranker)
    assert not isinstance(ranker, CatalogueRanker)


def test_onnx_model_scores_as_its_graph(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    bias = write_onnx_model(path, items=ITEMS + 1)
    ranker = load_ranker(str(path), {"item_offset": 1, "max_history": 4, "rows": 3})
    got = ranker.score(HISTORIES, CANDIDATES)
    for history, wanted, scores in zip(HISTORIES, CANDIDATES, got, strict=True):
        kept = np.zeros(4, np.int64)
        kept[: len(history[-4:])] = history[-4:] + 1
        np.testing.assert_allclose(scores, bias[wanted + 1] + bias[kept].sum(), rtol=1e-6)
    with pytest.raises(RequestError, match="keyword arguments of OnnxRanker"):
        load_ranker(str(path), {"colour": "red"})
    with pytest.raises(RequestError, match="missing"):
        load_ranker(str(path), {"history": "past"})
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(RequestError, match="ONNX Runtime can run"):
        load_ranker(str(path))


def write_onnx_model(path: Path, items: int) -> np.ndarray:
    """A model whose score is table[candidate] + sum of table[history]; returns the table."""
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    table = np.random.default_rng(1).normal(size=items).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "candidates"], ["own"]),
            helper.make_node("Gather", ["table", "history"], ["past"]),
            helper.make_node("ReduceSum", ["past", "axis"], ["sum"], keepdims=1),
            helper.make_node("Add", ["own", "sum"], ["scores"]),
        ],
        "ranker",
        [
            helper.make_tensor_value_info("history", kinds.INT64, ["B", "S"]),
            helper.make_tensor_value_info("candidates", kinds.INT64, ["B", "C"]),
        ],
        [helper.make_tensor_value_info("scores", kinds.FLOAT, ["B", "C"])],
        initializer=[
            onnx.numpy_helper.from_array(table, "table"),
            onnx.numpy_helper.from_array(np.array([1], np.int64), "axis"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return table


def test_top_items_equal_a_full_sort_with_ties() -> None:
    random = np.random.default_rng(4)
    for _ in range(200):
        scores = random.integers(0, 5, 20).astype(np.float32)
        allowed = random.random(20) < 0.7
        k = int(random.integers(1, 25))
        expected = sorted(np.flatnonzero(allowed), key=lambda i: (-scores[i], i))[:k]
        assert top_items(scores, allowed, k).tolist() == expected


def test_lists_leave_out_the_whole_history_and_what_is_not_permitted() -> None:
    from data.dataset import Samples

    samples = Samples(
        user_id_N=np.zeros(2, np.int32),
        target_N=np.array([1, 2], np.int32),
        timestamp_N=np.zeros(2, np.int64),
        sample_id_N=np.arange(2),
        values=np.array([5, 4, 3, 0, 1, 2, 3, 4], np.int32),
        start_N=np.array([0, 3]),
        end_N=np.array([3, 8]),
    )
    ranker = PopularityRanker(np.arange(6))
    permitted = np.array([True, True, False, True, True, True])
    for given in (ranker, PlainRanker()):
        got = rank_catalogue(given, samples, 4, n_items=6, history=1, exclude_seen=True, permitted_I=permitted)
        assert got.tolist() == [[1, 0, ABSENT, ABSENT], [5, ABSENT, ABSENT, ABSENT]]
        got = rank_catalogue(given, samples, 2, n_items=6, history=1, exclude_seen=False)
        assert got.tolist() == [[5, 4], [5, 4]]
