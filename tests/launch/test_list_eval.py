"""Contract: `windlass eval --lists` answers as its schema says, on a model of ranked lists with the real engine and
fleet: every need apart, seen and unseen told, beside the orders that no policy made; an ideal order has NDCG 1, no list
is invalid, its own rows differ from themselves by nothing; what cannot be measured is one line.

A tiny random model. Not checked: that lists are right (tests/rollout/test_list_decoding.py), training on lists.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from data.catalogue import Catalogue
from data.dataset import Dataset
from launch.cli import run
from launch.provenance import ROOT
from reward.popularity import PopularityRanker
from tests.launch.conftest import Here
from tests.requirements import require
from tests.small_world import write_dataset
from tests.tiny_model import write_tiny_model
from trainer.list_data import list_catalogue
from trainer.list_settings import ListSettings
from trainer.prompt_card import PromptCard

ENGINE = ("--rollout.dtype", "float32", "--rollout.kv-cache-gib", "0.1", "--cluster.object-store-mib", "128")
LISTS = ListSettings.model_validate(
    {
        "needs": [{"name": "interest"}, {"name": "trend"}, {"name": "niche"}],
        "held_out": "niche",
        "candidates": 12,
        "positives": 3,
    }
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path]:
    """A dataset and a model of lists, in one folder, with a ranker."""
    folder = tmp_path_factory.mktemp("list-eval")
    dataset = write_dataset(folder / "source")
    catalogue = list_catalogue(Catalogue.build(dataset, "default"), LISTS)
    model = write_tiny_model(folder / "hf", catalogue, hidden=32, layers=1)
    PromptCard(history=6, exclude_seen=True, max_prompt_tokens=64, lists=LISTS).write(model)
    PopularityRanker(dataset.train_counts()).save(folder / "ranker")
    return dataset, model


def ask(here: Here, world: tuple[Dataset, Path], cwd: Path, *arguments: str) -> dict[str, Any]:
    """The checked answer of an evaluation."""
    dataset, model = world
    places = ("eval", str(model), "--data", str(dataset.path), "--lists", "--rows", "10", "--k", "5", "10", "50")
    done = here(*places, *arguments, "--json", "a.json", cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "invalid lists: 0.0000" in done.stdout
    found: dict[str, Any] = json.loads((cwd / "a.json").read_text())
    schema = json.loads((ROOT / "docs" / "schemas" / "eval-lists.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(found)
    return found


def test_every_need_is_measured_beside_the_orders(
    windlass_here: Here, world: tuple[Dataset, Path], tmp_path: Path
) -> None:
    require("vllm")
    _, model = world
    ranker = str(model.parent / "ranker")
    found = ask(windlass_here, world, tmp_path, "--ranking.rankers", ranker, ranker, "--save", "run:first", *ENGINE)
    assert found["engine"]["name"] == "vllm"
    assert found["violations"] == found["invalid"]["constrained"] == 0
    roles = {name: need["role"] for name, need in found["needs"].items()}
    assert roles == {"interest": "trained", "trend": "trained", "niche": "held_out"}
    assert (found["seen"]["needs"], found["unseen"]["needs"]) == (["interest", "trend"], ["niche"])
    assert found["metrics"] == found["seen"]["metrics"]
    names = {f"{name}@{k}" for name in ("ndcg", "recall", "mrr", "hr") for k in (5, 10, 12)}
    for part in (*found["needs"].values(), found["seen"], found["unseen"]):
        assert set(part["metrics"]) == names
        assert part["metrics"]["recall@12"] == 1
        for name, (low, high) in part["ci95"].items():
            assert low <= part["metrics"][name] + 1e-9
            assert part["metrics"][name] <= high + 1e-9
    assert set(found["orders"]) == {"ideal", "random", "popularity", "popularity-2"}
    for group in ("seen", "unseen"):
        assert found["orders"]["ideal"][group]["metrics"]["ndcg@5"] == pytest.approx(1)
        counted = [found["orders"][name][group]["metrics"] for name in ("popularity", "popularity-2")]
        assert counted[0] == counted[1] != found[group]["metrics"]
    both = [found["needs"][name]["metrics"]["ndcg@5"] for name in ("interest", "trend")]
    assert found["seen"]["metrics"]["ndcg@5"] == pytest.approx(np.mean(both))
    # The same lists again differ from themselves by nothing; samples differ, and other prompts are refused.
    reference = (*ENGINE, "--rollout.engine", "reference", "--base", "run:first")
    drawn = ask(windlass_here, world, tmp_path, "--ranking.decode", "sample", "--ranking.width", "3", *reference)
    for part in (drawn, drawn["seen"], drawn["unseen"], drawn["needs"]["niche"]):
        assert part["differences"]["ndcg@5"]["mean"] != 0
    difference = drawn["needs"]["trend"]["differences"]["mrr@10"]
    assert difference["base"] == pytest.approx(found["needs"]["trend"]["metrics"]["mrr@10"], abs=1e-6)
    assert difference["mean"] == pytest.approx(difference["other"] - difference["base"])
    dataset, _ = world
    same = ask(windlass_here, world, tmp_path, *reference)
    assert all(one["mean"] == pytest.approx(0, abs=1e-6) for one in same["differences"].values())
    places = ("eval", str(model), "--data", str(dataset.path), "--lists", "--rows", "9", *reference)
    refused = windlass_here(*places, cwd=tmp_path)
    assert refused.returncode == 2
    assert "lists for the same" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--save", "run"], "--save: run; legal: RUN:NAME"),
        (["--save", "run:a/b"], "--save"),
        (["--base", "nowhere"], "has no evaluated rows"),
        (["--ranking.rankers", "nowhere"], "--ranking.rankers"),
        (["--ranking.decode", "sample_without_replacement"], "--ranking.decode"),
        (["--ranking.width", "0"], "ranking.width"),
        (["--feedback", "log"], "--feedback"),
        (["--published", "published.csv"], "--published"),
        (["--history", "3"], "--history"),
        (["--k", "0"], "k"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    world: tuple[Dataset, Path], arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, model = world
    assert run(["eval", str(model), "--data", str(dataset.path), "--lists", "--rows", "4", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("windlass: ")
    assert words in said


def test_code_that_a_model_names_is_not_imported(
    world: tuple[Dataset, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, model = world
    foreign = shutil.copytree(model, tmp_path / "foreign")
    card = json.loads((foreign / "prompt.json").read_text())
    card["lists"]["needs"][0] |= {"gain": "planted:gain"}
    (foreign / "prompt.json").write_text(json.dumps(card))
    (tmp_path / "planted.py").write_text("raise SystemError('it was imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["eval", str(foreign), "--data", str(dataset.path), "--lists", "--rows", "4"]
    assert run(command) == 2
    said = capsys.readouterr().err
    assert "names the code planted:gain as its gain; legal: built-in gains and ranker folders, or --trust-code" in said
    assert run([*command, "--trust-code"]) == 2
    assert "it was imported" in capsys.readouterr().err
    card["lists"]["needs"][0]["gain"] = ""
    card["lists"] |= {"source": "retrieved", "retriever": "planted:Ranker"}
    (foreign / "prompt.json").write_text(json.dumps(card))
    assert run(command) == 2
    assert "names the retriever planted:Ranker, which is no folder here" in capsys.readouterr().err
    assert run([*command, "--trust-code"]) == 2
    assert "it was imported" in capsys.readouterr().err
    assert run([*command[:4], "--trust-code"]) == 2
    assert "--trust-code: True; legal: false without --lists" in capsys.readouterr().err


def test_a_model_of_single_items_has_no_lists(
    world: tuple[Dataset, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, _ = world
    model = write_tiny_model(tmp_path, Catalogue.build(dataset, "default"), hidden=32, layers=1)
    PromptCard(history=6, exclude_seen=True, max_prompt_tokens=16).write(model)
    assert run(["eval", str(model), "--data", str(dataset.path), "--lists"]) == 2
    assert "recommends single items; legal: a model that was trained with lists.needs" in capsys.readouterr().err
    assert run(["eval", str(model), "--data", str(dataset.path), "--save", "a:b"]) == 2
    assert "none without --lists" in capsys.readouterr().err
