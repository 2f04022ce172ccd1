"""Contract: `windlass continual` keeps a language model up to date by the log of its own sampling: titles by LoRA with
anchors, codes by supervised training, items retired and added meanwhile; each update begins with the weights of the
version before it, and every version is a whole model with its tokenizer. A model that knows no items is refused first.

Tiny random models on the reference engine (vLLM with language models: tests/launch/test_language_job.py); the rules of
the cycle are in test_cycle.py. Real runs are `long`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from data.catalogue import Catalogue
from data.code_vectors import codebooks_path, save_codebooks
from data.codes import Codes, OnCollision, codes_path
from data.text_settings import TextSettings
from launch import cli
from launch.continual.cycle import begin_registry
from launch.continual.registry import Registry
from tests.launch.conftest import Here
from tests.requirements import require
from tests.small_world import recipe, write_dataset, write_recipe
from tests.tiny_language import write_language
from trainer.initial_model import own_initial_model
from trainer.language_model import Language
from trainer.prompt_card import PromptCard

LANGUAGE: dict[str, Any] = {
    "data": {"max_prompt_tokens": 160},
    "learner": {"row_tokens": 256, "token_budget": 1024, "lr": 1e-2},
    "rollout": {"engine": "reference", "decode": "sample", "max_model_len": 256},
    "evaluation": {"rows": 4},
}
JOBS: dict[str, dict[str, Any]] = {
    "titles": {
        "reward": {"item_match": 0.0, "rank_penalty": 0.0, "feedback": 1.0},
        "objective": {"anchor": {"mode": "append"}},
    },
    "codes": {"batch_rows": 8},
}


class World:
    """A dataset, a language model that knows its items, a log of its first day, and a recipe."""

    def __init__(self, folder: Path, items: str, windlass_here: Here) -> None:
        self.folder = folder
        self._windlass = windlass_here
        dataset = write_dataset(folder / "dataset")
        self.dataset = dataset.path
        text = TextSettings(items=items)
        base = write_language(folder / "base", "smollm")
        language = Language.open(str(base), text, dataset, "default")
        self.model = own_initial_model(
            str(base),
            language.catalogue,
            seed=0,
            dtype=torch.float32,
            target=folder / "model",
            resumed=False,
            language=(language, text),
        )
        PromptCard(history=6, exclude_seen=True, max_prompt_tokens=160, text=text).write(self.model)
        named = Registry(folder / "naming", create=True)
        begin_registry(named, self.model, at=0.0)
        places = ("data", "simulate", str(self.model), "--data", str(self.dataset), "--out", "log")
        how = ("--rollout.engine", "reference", "--rollout.dtype", "float32", "--horizon", "10", "--split", "train")
        named_as = ("--policy-version", named.version(1).name, "--seed", "2")
        simulated = windlass_here(*places, *how, *named_as, cwd=folder)
        assert simulated.returncode == 0, simulated.stderr
        sections = {name: dict(section) for name, section in LANGUAGE.items()}
        if items == "titles":
            sections["learner"]["lora"] = {"rank": 4}
        content = recipe(
            self.dataset,
            "rl" if items == "titles" else "sft",
            init=str(self.model),
            text={"items": items},
            **(sections | JOBS[items]),
        )
        gap = {"metric": "policy_gap", "direction": "lower", "limit": 1e-3}
        guard = {"conditions": [{"metric": "exposed_hr@10", "tolerance": 1.0}, gap]}
        write_recipe(folder / "recipe.yaml", content | {"continual": {"guard": guard}})

    def run(self, *arguments: str) -> list[dict[str, Any]]:
        """The answer of one start of the service."""
        places = ("continual", "recipe.yaml", "--log", "log", "--registry", "registry", "--once", "--json", "a.json")
        done = self._windlass(*places, *arguments, cwd=self.folder)
        assert done.returncode in (0, 3), done.stderr
        found: list[dict[str, Any]] = json.loads((self.folder / "a.json").read_text())
        return found

    def weights(self, version: str) -> dict[str, torch.Tensor]:
        """By name."""
        return load_file(self.folder / "registry" / "versions" / version / "model.safetensors")


@pytest.fixture
def needs() -> None:
    for part in ("deepspeed", "peft"):
        require(part)


@pytest.mark.long
def test_titles_are_updated_by_lora_and_follow_retired_items(needs: None, tmp_path: Path, windlass_here: Here) -> None:
    world = World(tmp_path, "titles", windlass_here)
    later = tmp_path / "later"
    # Titles need no codes.
    shutil.rmtree(world.dataset / "codes")
    places = ["--dataset", str(world.dataset), "--out", str(later)]
    assert cli.run(["data", "extend", *places, "--retire", "item-03"]) == 0
    (result,) = world.run("--data.dataset", str(later))
    assert (result["decision"], result["version"]) == ("promoted", 2), result["reasons"]
    assert [one["evidence"]["n"] > 0 for one in result["metrics"]["guard"]] == [True, True]
    before, after = world.weights("000001"), world.weights("000002")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    # Merged factors: nothing but the adapted matrices moves.
    assert all("_proj" in name for name in changed)
    served = tmp_path / "registry" / "versions" / "000002"
    assert PromptCard.read(served).text.items == "titles"
    catalogue = Catalogue.load(served / "catalogue")
    assert not catalogue.active[catalogue.item_keys.index("item-03")]
    assert len(AutoTokenizer.from_pretrained(served)) == 330
    assert world.run("--data.dataset", str(later)) == []


@pytest.mark.long
def test_codes_are_updated_and_follow_new_items(needs: None, tmp_path: Path, windlass_here: Here) -> None:
    world = World(tmp_path, "codes", windlass_here)
    (tmp_path / "new.csv").write_text("item_key,title\n" + "".join(f"new-{n},New {n}\n" for n in range(20)))
    extendable(world.dataset)
    later = tmp_path / "later"
    places = ["--dataset", str(world.dataset), "--out", str(later), "--items", str(tmp_path / "new.csv")]
    assert cli.run(["data", "extend", *places]) == 0
    (result,) = world.run("--data.dataset", str(later))
    assert (result["decision"], result["version"]) == ("promoted", 2), result["reasons"]
    served = tmp_path / "registry" / "versions" / "000002"
    catalogue = Catalogue.load(served / "catalogue")
    assert catalogue.n_items == 48 + 20
    assert len(AutoTokenizer.from_pretrained(served)) == catalogue.vocabulary.tokens == 330 + 14 + 20
    embedding = "model.embed_tokens.weight"
    assert len(world.weights("000002")[embedding]) == catalogue.vocabulary.size
    assert world.run("--data.dataset", str(later)) == []


def extendable(dataset: Path) -> None:
    """Give the codes the settings and codebooks that further items need."""
    codes = Codes.load(codes_path(dataset, "default"))
    provenance = codes.provenance | {"settings": {"source": "cooccurrence"}}
    codes = dataclasses.replace(codes, on_collision=OnCollision.RESOLVE, provenance=provenance)
    codes.save(codes_path(dataset, "default"))
    books = [np.arange(2 * size, dtype=np.float32).reshape(size, 2) for size in codes.level_sizes]
    save_codebooks(codebooks_path(dataset, "default"), codes, books)


def test_a_base_that_knows_no_items_serves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, base = write_dataset(tmp_path / "dataset"), write_language(tmp_path / "base")
    sections = LANGUAGE | JOBS["titles"]
    write_recipe(tmp_path / "r.yaml", recipe(dataset.path, "rl", init=str(base), text={"items": "titles"}, **sections))
    (tmp_path / "log").mkdir()
    places = ["--log", str(tmp_path / "log"), "--registry", str(tmp_path / "registry")]
    assert cli.run(["continual", str(tmp_path / "r.yaml"), *places, "--once"]) == 2
    assert f"init: {base}; legal: a trained model" in capsys.readouterr().err
    assert Registry(tmp_path / "registry").current() is None
