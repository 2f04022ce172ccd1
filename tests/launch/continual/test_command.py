"""`windlass continual` and `windlass registry` as a user runs them: a real ABPO update of a tiny model by the log that
its own sampling made, a real evaluation, the answers against their schemas, and requests that are wrong.

The engine is the reference one; the rules of the cycle are in test_cycle.py, dying is in test_dying.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from data.catalogue import Catalogue
from data.code_vectors import codebooks_path, save_codebooks
from data.codes import Codes, OnCollision, codes_path
from data.growth import same_tokens
from launch import cli
from launch.continual.cycle import begin_registry
from launch.continual.registry import Registry
from launch.provenance import ROOT
from tests.requirements import require
from tests.small_world import recipe, windlass, write_dataset, write_recipe
from tests.tiny_model import write_tiny_model
from trainer.prompt_card import PromptCard

UNCHECKED = {"WINDLASS_PACKAGE_DIGEST": "unchecked"}
GUARD = {"conditions": [{"metric": "exposed_hr@10", "tolerance": 1.0}]}


class World:
    """A dataset, a model, a recipe, and the log of the model's first day."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        dataset = write_dataset(folder / "dataset")
        self.dataset = dataset.path
        self.model = write_tiny_model(folder / "model", Catalogue.build(dataset, "default"))
        PromptCard(history=6, exclude_seen=True, max_prompt_tokens=16).write(self.model)
        self.log = folder / "log"
        self.registry = folder / "registry"
        named = Registry(folder / "naming", create=True)
        begin_registry(named, self.model, at=0.0)
        simulated = windlass(
            *("data", "simulate", str(self.model), "--data", str(dataset.path), "--out", str(self.log)),
            *("--rollout.engine", "reference", "--rollout.dtype", "float32", "--horizon", "10", "--split", "train"),
            *("--policy-version", named.version(1).name, "--seed", "2"),
            cwd=folder,
            **UNCHECKED,
        )
        assert simulated.returncode == 0, simulated.stderr
        content = recipe(
            self.dataset,
            "rl",
            init=str(self.model),
            rollout={"engine": "reference", "decode": "sample"},
            reward={"item_match": 0.0, "rank_penalty": 0.0, "feedback": 1.0},
            objective={"anchor": {"mode": "append"}},
            evaluation={"every": 3},
        )
        self.recipe = write_recipe(folder / "abpo.yaml", content | {"continual": {"guard": GUARD}})
        plain = {"reward": {"item_match": 1.0, "rank_penalty": 0.0}, "objective": {}}
        write_recipe(folder / "grpo.yaml", content | plain | {"continual": {"guard": GUARD}})
        supervised = recipe(
            self.dataset, "sft", init=str(self.model), rollout={"engine": "reference"}, evaluation={"every": 3}
        )
        write_recipe(folder / "sft.yaml", supervised | {"batch_rows": 8, "continual": {"guard": GUARD}})

    def run(self, *arguments: str, name: str = "abpo", recipe: str = "") -> tuple[int, list[dict[str, Any]]]:
        """One start of the service with a recipe and a registry of its own; exit code and answer."""
        registry = self.registry if name == "abpo" else self.folder / f"registry-{name}"
        done = windlass(
            *(
                "continual",
                str(self.folder / f"{recipe or name}.yaml"),
                "--log",
                str(self.log),
                "--registry",
                str(registry),
            ),
            *("--once", "--json", "-", *arguments),
            cwd=self.folder,
            **UNCHECKED,
        )
        assert done.returncode in (0, 3), done.stderr
        answer = json.loads(done.stdout)
        validate("continual", answer)
        return done.returncode, answer


def validate(schema: str, answer: Any) -> None:
    content = json.loads((ROOT / "docs" / "schemas" / f"{schema}.schema.json").read_text())
    jsonschema.Draft202012Validator(content).validate(answer)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    require("ray")
    require("deepspeed")
    return World(tmp_path_factory.mktemp("continual"))


@pytest.mark.long
def test_a_day_is_promoted_and_the_next_start_has_nothing_to_do(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    code, (result,) = world.run()
    assert (code, result["decision"], result["version"]) == (0, "promoted", 2)
    evidence = result["metrics"]["guard"][0]["evidence"]
    assert evidence["n"] > 0
    assert evidence["difference"]["low"] <= evidence["difference"]["value"] <= evidence["difference"]["high"]
    assert result["counts"]["held_out"] + result["counts"]["train"] == result["counts"]["rows"]
    registry = Registry(world.registry)
    assert registry.current() == registry.version(2)
    assert registry.version(2).digest != registry.version(1).digest
    assert registry.version(2).lineage["updater"]["job"]["objective"]["anchor"]["mode"] == "append"
    assert world.run() == (0, [])
    for command, schema in (("list", "registry-list"), ("show", "registry-show"), ("rollback", "registry-switch")):
        assert cli.run(["registry", command, str(world.registry), "--json", "-"]) == 0
        validate(schema, json.loads(capsys.readouterr().out))
    assert (world.registry / "current").readlink().name == "000001"
    assert cli.run(["registry", "promote", str(world.registry), "--version", "2", "--json", "-"]) == 0
    validate("registry-switch", json.loads(capsys.readouterr().out))
    assert cli.run(["registry", "prune", str(world.registry), "--keep", "1", "--json", "-"]) == 0
    validate("registry-prune", json.loads(capsys.readouterr().out))


@pytest.mark.long
@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_alternatives_to_abpo_update_by_recipe(world: World, name: str) -> None:
    code, (result,) = world.run(name=name)
    assert (code, result["decision"], result["version"]) == (0, "promoted", 2)
    registry = Registry(world.folder / f"registry-{name}")
    assert registry.version(2).digest != registry.version(1).digest
    assert registry.version(2).lineage["updater"]["job"]["job"] == ("sft" if name == "sft" else "rl")
    assert world.run(name=name) == (0, [])


@pytest.mark.long
def test_an_update_follows_a_catalogue_that_has_grown(world: World) -> None:
    (world.folder / "new.csv").write_text("item_key,title\n" + "".join(f"new-{n},New {n}\n" for n in range(20)))
    grown = world.folder / "grown"
    codes = Codes.load(codes_path(world.dataset, "default"))
    provenance = codes.provenance | {"settings": {"source": "cooccurrence"}}
    codes = dataclasses.replace(codes, on_collision=OnCollision.RESOLVE, provenance=provenance)
    codes.save(codes_path(world.dataset, "default"))
    books = [np.arange(2 * size, dtype=np.float32).reshape(size, 2) for size in codes.level_sizes]
    save_codebooks(codebooks_path(world.dataset, "default"), codes, books)
    places = ["--dataset", str(world.dataset), "--out", str(grown), "--items", str(world.folder / "new.csv")]
    assert cli.run(["data", "extend", *places, "--retire", "item-03"]) == 0
    code, (result,) = world.run("--data.dataset", str(grown), name="grown", recipe="abpo")
    assert (code, result["decision"]) == (0, "promoted")
    before, after = (
        Catalogue.load(path / "catalogue") for path in (world.model, world.folder / "registry-grown/current")
    )
    assert same_tokens(before, after)
    assert (after.n_items, after.vocabulary.size) == (before.n_items + 20, before.vocabulary.size + 20)
    assert not after.active[before.item_keys.index("item-03")]
    assert world.run("--data.dataset", str(grown), name="grown", recipe="abpo") == (0, [])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--once", "--from", "yesterday"], "--from: yesterday"),
        (["--json", "-"], "--json: -; legal: with --once"),
        (["--once", "--continual.late", "never"], "continual.late"),
        (["--once", "--continual.rows.held_out", "2"], "continual.rows.held_out"),
        (["--once", "--job", "ranker"], "job: 'ranker'; legal: rl or sft"),
        (["--limits.max_stepz", "1"], "limits.max_stepz"),
        (["--once", "--registry", "s3://bucket/registry"], "--registry: s3:/bucket/registry; legal: a local folder"),
    ],
)
def test_wrong_requests_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    places = ["--log", str(tmp_path), "--registry", str(tmp_path / "registry")]
    assert cli.run(["continual", "abpo", *places, *arguments]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1
    assert not (tmp_path / "registry").exists()


def test_a_registry_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["list"], ["rollback"], ["promote", "--version", "1"]):
        assert cli.run(["registry", command[0], str(tmp_path / "none"), *command[1:]]) == 2
    assert not (tmp_path / "none").exists()
    assert "registry.json" in capsys.readouterr().err
