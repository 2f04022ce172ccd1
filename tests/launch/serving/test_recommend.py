"""Contract: in batch every context gets what the policy shows for it, whatever the batch, the engine or the file; rows,
columns and order stay; a folder appears whole or not at all; wrong files are one line.

The engine is the reference one in this process. The command with Ray Data and vLLM: test_service.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.catalogue import Catalogue
from launch import cli
from launch.serving.exposure import ExposureSettings, Serving, show
from launch.serving.recommend_command import Recommender, check_contexts, prompt_keys
from rollout.settings import EngineKind, RolloutSettings
from tests.launch.serving.world import ITEMS, write_model
from tests.requirements import require
from tests.tiny_model import tiny_catalogue
from trainer.initial_model import CATALOGUE
from trainer.prompt_card import PromptCard

ENGINES = RolloutSettings(engine=EngineKind.REFERENCE, dtype="float32")


def contexts(count: int = 7) -> pa.Table:
    rng = np.random.default_rng(3)
    history = [rng.integers(0, ITEMS, size).tolist() for size in range(count)]
    history[2] = list(range(ITEMS))
    history[3] = [5, 999]
    return pa.table({"note": [f"n{row}" for row in range(count)], "history": history})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "hf", tiny_catalogue(items=ITEMS), 0)


def recommender(model: Path, **exposure: Any) -> Recommender:
    return Recommender(ENGINES, model, ExposureSettings(**exposure), "v1", 3, 11)


def test_every_context_gets_what_the_policy_shows(model: Path) -> None:
    table = contexts()
    made = recommender(model)
    answered = made(table)
    assert answered["note"].to_pylist() == table["note"].to_pylist()
    assert answered["unknown_items"].to_pylist() == [0, 0, 0, 1, 0, 0, 0]
    builder = PromptCard.read(model).builder(Catalogue.load(model / CATALOGUE), model)
    for row, key in zip(answered.to_pylist(), prompt_keys(table).tolist(), strict=True):
        known = np.array([item for item in row["history"] if item < ITEMS], np.int32)
        if len(set(known)) == ITEMS:
            assert (row["items"], row["decode"], row["logp0"]) == ([], None, [])
            continue
        prompt, _ = builder.prompt(known, key)
        alone = show(made._engine, [prompt], ExposureSettings(), seed=11, items=3)
        assert row["items"] == alone.item_PK[0].tolist()
        assert row["keys"] == [str(item) for item in row["items"]]
        assert row["logp0"] == pytest.approx(alone.logp0_PK[0].tolist(), rel=1e-5)
    # Neither the batch nor the order matters.
    parts = pa.concat_tables([made(table.slice(4)), made(table.slice(0, 4))])
    assert sorted(map(str, parts.to_pylist())) == sorted(map(str, answered.to_pylist()))


def test_keys_as_text_exclusions_and_beams(model: Path) -> None:
    table = pa.table({"request_id": ["a", "b"], "history": [["1", "2"], ["gone"]], "exclude": [None, ["3"]]})
    answered = recommender(model, serve=Serving.BEAM)(table).to_pylist()
    assert [row["unknown_items"] for row in answered] == [0, 1]
    assert 3 not in answered[1]["items"]
    assert not {1, 2} & set(answered[0]["items"])
    assert [row["logp0"] for row in answered] == [None, None]
    assert [row["decode"] for row in answered] == ["beam", "beam"]
    assert answered[0]["scores"] == sorted(answered[0]["scores"], reverse=True)
    # A request id keys the draws by itself.
    moved = table.set_column(1, "history", pa.array([["7"], ["gone"]]))
    np.testing.assert_array_equal(prompt_keys(table), prompt_keys(moved))


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"user": [1]}, "--contexts: history: no such column"),
        ({"history": [1]}, "--contexts: history: int64"),
        ({"history": [[1]], "exclude": [1.0]}, "--contexts: exclude"),
        ({"history": [[1]], "items": [[1]]}, "columns items"),
        ({"history": pa.array([], pa.list_(pa.int64()))}, "has no rows"),
    ],
)
def test_wrong_contexts_are_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], columns: dict[str, Any], named: str
) -> None:
    require("ray")
    pq.write_table(pa.table(columns), tmp_path / "contexts.parquet")
    arguments = ["recommend", str(model), "--contexts", str(tmp_path / "contexts.parquet")]
    assert cli.run([*arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_stays(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("ray")
    pq.write_table(contexts(), tmp_path / "contexts.parquet")
    assert check_contexts(tmp_path / "contexts.parquet") == 7
    (tmp_path / "out").mkdir()
    arguments = ["recommend", str(model), "--contexts", str(tmp_path / "contexts.parquet")]
    assert cli.run([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "text").write_text("no Parquet")
    assert cli.run(["recommend", str(model), "--contexts", str(tmp_path / "text"), "--out", str(tmp_path / "o")]) == 2
    assert "Parquet with a column history" in capsys.readouterr().err
