"""Contract: the plan of a job's memory counts what the learner holds to the byte, what a backward pass keeps within a
tenth, and every recipe of a language model fits the cards that its header names.

Measured on small models and on CPU, where the tensors are the same ones; not checked here: a card.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from data.errors import RequestError
from launch.config import load_job, recipe_header, recipe_names, recipe_path
from launch.doctor import doctor_command
from launch.memory_plan import ModelSize, layer_activations, learner_plan, memory_plan, model_size
from launch.model_shapes import SHAPES, model_config
from launch.provenance import ROOT
from tests.requirements import require
from tests.small_world import recipe, write_recipe
from tests.trainer.learner_world import make_constraint, save_model
from tests.trainer.rank_process import sft_rows
from trainer.jobs import RlJob
from trainer.learner import Learner
from trainer.learner_state import MASTER, MOMENTS
from trainer.policy import Policy
from trainer.settings import LearnerSettings
from trainer.tree_attention import ATTENTION
from trainer.trees import lay_out, sequence_pieces

LANGUAGE = [name for name in recipe_names() if name.startswith("qwen")]


@pytest.mark.parametrize("lora", [{}, {"rank": 4}])
@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "bfloat16")])
def test_what_a_learner_holds(tmp_path: Path, stage: int, dtype: str, lora: dict[str, Any]) -> None:
    require("deepspeed")
    folder = save_model(tmp_path / "model")
    settings = LearnerSettings(
        zero_stage=stage, dtype=dtype, lora=lora, row_tokens=64, token_budget=64, threads=1, device="cpu"
    )
    learner = Learner(settings, folder, make_constraint())
    learner.update_sft(sft_rows())
    state, width = learner._state, 4 if dtype == "float32" else 2
    parameters = {id(p): p for p in learner._engine.module.parameters()}.values()
    weights = sum(p.numel() * p.element_size() for p in parameters)
    masters = 0 if width == 4 else sum(state.get(p, MASTER).nbytes for p in learner._trained.values())
    moments = sum(state.get(p, kind).nbytes for p in learner._trained.values() for kind in MOMENTS)
    learner.close()
    config = transformers.AutoConfig.from_pretrained(folder)
    plan = learner_plan(settings, config, model_size(config, settings, 0), reference=False, head_share=0.25)
    assert plan.device["weights"] == weights
    assert plan.device["optimiser states"] == masters + moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_what_a_backward_pass_keeps(family: str, dtype: torch.dtype) -> None:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=400,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    lm = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).to(dtype)
    weights = {parameter.untyped_storage().data_ptr() for parameter in lm.parameters()}
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 400, 64).astype(np.int32), np.arange(64) >= 63) for _ in range(8)]
    batch = lay_out(sequence_pieces(rows, 64))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Policy(lm)(batch)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    measured = sum(size for place, size in storages.items() if place not in weights)
    planned = layer_activations(config, dtype.itemsize, head_norms=family == "Qwen3") * 4 * len(batch.token_N)
    assert planned == pytest.approx(measured, rel=0.1)


def test_known_shapes_are_the_published_sizes() -> None:
    full = LearnerSettings()
    billions = {name: model_size(model_config(f"models/{name}", 0), full, 0).whole / 1e9 for name in SHAPES}
    assert billions == pytest.approx(
        {"Qwen2.5-0.5B-Instruct": 0.494, "Qwen2.5-1.5B-Instruct": 1.544, "Qwen3-8B": 8.191}, abs=1e-3
    )
    lora = LearnerSettings(lora={"rank": 16})
    size = model_size(model_config("models/Qwen3-8B", 1024), lora, 1024)
    # 16 x (in + out) of seven matrices in 36 layers, and 1024 rows of embedding and head.
    layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12_288)
    assert size.trained == 16 * 36 * layer + 2 * 1024 * 4096


def test_codes_are_added_to_a_model_that_has_none(tmp_path: Path) -> None:
    transformers.LlamaConfig(vocab_size=400).save_pretrained(tmp_path)
    assert model_config(str(tmp_path), 64).vocab_size == 464
    (tmp_path / "catalogue").mkdir()  # as a checkpoint of a run has one
    assert model_config(str(tmp_path), 64).vocab_size == 400


def test_stages_and_offload_move_memory() -> None:
    config = model_config("models/Qwen2.5-0.5B-Instruct", 0)
    size = ModelSize(whole=1000, trained=800, head_norms=False)

    def plan(**settings: Any) -> Any:
        return learner_plan(LearnerSettings(ranks=4, **settings), config, size, reference=False, head_share=0.1)

    def parts(**settings: Any) -> list[int]:
        found = plan(**settings).device
        return [found[name] for name in ("weights", "gradients", "optimiser states")]

    assert parts(zero_stage=0) == [2000, 1600, 9600]
    assert parts(zero_stage=1) == [2000, 3200, 2400]
    assert parts(zero_stage=2) == [2000, 800, 2400]
    assert parts(zero_stage=3) == [500, 800, 2400]
    offloaded = plan(zero_stage=2, offload_optimiser=True)
    assert offloaded.host == {"optimiser states": 2400}
    assert "optimiser states" not in offloaded.device
    whole, less = plan(zero_stage=2), plan(zero_stage=2, activation_checkpointing=True)
    assert less.device["activations"] < whole.device["activations"] / 10


def test_there_is_a_recipe_for_every_size_and_number_of_cards() -> None:
    sizes, cards = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen3-8b"), ("1gpu", "8gpu", "16gpu")
    assert set(LANGUAGE) == {f"{size}-{number}" for size in sizes for number in cards}


@pytest.mark.parametrize("name", LANGUAGE)
def test_recipes_fit_their_cards(name: str) -> None:
    job = load_job(name)
    assert isinstance(job, RlJob)
    learner, engine = (process.record() for process in memory_plan(job))
    cards = int(name.rpartition("-")[2].removesuffix("gpu"))
    assert learner["count"] * job.learner.gpus + engine["count"] * job.rollout.gpus == pytest.approx(cards)
    room = float(recipe_header(recipe_path(name)).partition(" GiB")[0].rsplit(" ", 1)[1])
    if cards == 1:
        assert learner["total_gib"] + engine["total_gib"] <= room
    else:
        assert max(learner["total_gib"], engine["total_gib"]) <= room


def test_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    answer = doctor_command(plan="qwen3-8b-8gpu")
    schema = json.loads((ROOT / "docs" / "schemas" / "doctor.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(answer)
    assert "4 x learner rank" in capsys.readouterr().out


def bad_recipes(folder: Path) -> Iterator[tuple[str, str]]:
    """(recipe, what is said about it)."""
    yield "ml100k-ranker", r"--plan: ml100k-ranker, a job of another kind"
    path = write_recipe(folder / "far.yaml", recipe(folder, "sft", init="models/unknown", text={"items": "codes"}))
    yield str(path), r"init: .*models/unknown; legal: a model on this machine, or a path that ends with Qwen2\.5-0\.5B"


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    for name, message in bad_recipes(tmp_path):
        with pytest.raises(RequestError, match=message):
            doctor_command(plan=name)
