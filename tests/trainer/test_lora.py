"""Contract: a learner with LoRA starts from the same loss as a full one, trains nothing but its factors and the rows of
code tokens, and does the same on one rank and on two under every ZeRO stage; merged weights, the adapter's folder and
the learner itself are one model; the adapter switched off is the initial model.

Not checked here: that an adapter learns a recommender (docs/results/llm.json), CUDA.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data.catalogue import Catalogue
from data.errors import RequestError
from data.text_items import code_catalogue
from data.vocabulary import TextBase
from rollout.live_adapter import is_adapter
from tests.requirements import require
from tests.trainer.learner_world import VOCABULARY, make_completions, make_constraint, save_model
from tests.trainer.rank_pair import RankPair
from tests.trainer.rank_process import sft_rows
from tests.trainer.test_learner import PLAIN, THREADS, run_alone, task
from trainer.jobs import SftJob
from trainer.learner import Learner
from trainer.lora import adapter_base, code_rows, live_adapter
from trainer.settings import LearnerSettings

FIRST_ROW = 30
LORA: dict[str, Any] = {"rank": 4, "alpha": 8}
STEPS: dict[str, Any] = {"steps": ["update", "sft"]}


@pytest.fixture(autouse=True, scope="module")
def needs_deepspeed() -> None:
    require("deepspeed")
    require("peft")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose last rows are code tokens."""
    folder = save_model(tmp_path_factory.mktemp("model"))
    text = TextBase(tokens=FIRST_ROW, rows=VOCABULARY, pad=0, bos=1, eos=2)
    code_catalogue(Catalogue.from_codes([[0, 0], [5, 9]]), text).save(folder / "catalogue")
    return folder


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[str, Any]:
    """Two steps of one rank in float32, that the others are held against."""
    return run_alone(task(model, zero_stage=0, dtype="float32", lora=LORA) | STEPS)


@pytest.fixture(scope="module")
def low(model: Path) -> dict[str, Any]:
    """Two steps in bfloat16, with momentum."""
    return run_alone(low_task(model) | STEPS)


def low_task(model: Path) -> dict[str, Any]:
    """Of `low`, one step."""
    return task(model, zero_stage=1, dtype="bfloat16", lora=LORA, betas=(0.9, 0.95))


def learner(model: Path, *, reference: bool = False, lora: dict[str, Any] | None = None, **settings: Any) -> Learner:
    whole = LearnerSettings(
        **(PLAIN | THREADS | {"dtype": "float32", "zero_stage": 0, "lora": lora or LORA} | settings)
    )
    return Learner(whole, model, make_constraint(), reference_dir=model if reference else None)


def test_rows_of_code_tokens(model: Path, tmp_path: Path) -> None:
    assert code_rows(model) == range(FIRST_ROW, FIRST_ROW + 16)
    assert code_rows(tmp_path) == range(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_loss_is_that_of_full_training(
    model: Path, dtype: str, alone: dict[str, Any], low: dict[str, Any]
) -> None:
    full = run_alone(task(model, zero_stage=0 if dtype == "float32" else 1, dtype=dtype))
    lora, rounding = (alone, 1e-6) if dtype == "float32" else (low, 1e-2)
    assert lora["loss"][0] == pytest.approx(full["loss"][0], rel=rounding)


def test_only_factors_and_code_rows_change(model: Path, alone: dict[str, Any]) -> None:
    found = alone
    before = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    trained = {name.removeprefix("master/") for name in found if name.startswith("master/")}
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in trained)
    for name, value in before.items():
        changed = (found[f"weight/{name}"] != value.detach().numpy()).reshape(len(value), -1).any(1)
        if name == "model.embed_tokens.weight":
            assert changed.tolist() == [FIRST_ROW <= row < FIRST_ROW + 16 for row in range(VOCABULARY)]
        else:
            assert changed.all() == ("proj" in name), name
            assert changed.any() == ("proj" in name), name


@pytest.fixture(scope="module")
def two_ranks(
    model: Path, rank_pair: RankPair, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    tasks = {str(stage): task(model, zero_stage=stage, dtype="float32", lora=LORA) | STEPS for stage in (1, 2, 3)}
    return rank_pair.run(folder, tasks)


@pytest.mark.parametrize("case", ["1", "2", "3"])
def test_zero_stages_do_the_same(alone: dict[str, Any], two_ranks: dict[str, list[dict[str, Any]]], case: str) -> None:
    for rank in two_ranks[case]:
        assert rank["norm"] == pytest.approx(alone["norm"], rel=1e-5)
        for name, value in alone.items():
            if name.startswith(("master/", "weight/")):
                np.testing.assert_allclose(rank[name], value, atol=2e-5, err_msg=name)
    assert sum(float(rank["loss"][0]) for rank in two_ranks[case]) == pytest.approx(alone["loss"][0], rel=1e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_states_do_the_same(model: Path, stage: int) -> None:
    kept, offloaded = (
        run_alone(task(model, zero_stage=stage, dtype="bfloat16", lora=LORA, offload_optimiser=offload) | STEPS)
        for offload in (False, True)
    )
    for name, value in kept.items():
        if "/" in name:
            np.testing.assert_allclose(offloaded[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("stage", [0, 3])
def test_merged_weights_and_adapter_are_the_learner(model: Path, tmp_path: Path, stage: int) -> None:
    from peft import PeftModel

    trained = learner(model, zero_stage=stage, lr=1e-2)
    for _ in range(2):
        trained.update_sft(sft_rows(3))
    own = trained.evaluate_nll(sft_rows(3))["nll"]
    trained.export_hf(tmp_path / "hf")
    trained.export_adapter(tmp_path / "adapter")
    trained.close()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert adapter_base(tmp_path / "adapter") == model
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    start = _nll(AutoModelForCausalLM.from_pretrained(model))
    assert own < start - 1
    assert _nll(merged) == pytest.approx(own, rel=1e-5)
    assert _nll(adapted) == pytest.approx(own, rel=1e-5)


@torch.no_grad()
def _nll(lm: Any) -> float:
    total = 0.0
    for tokens, learned in sft_rows(3):
        ids = torch.from_numpy(tokens.astype(np.int64))
        logp = lm.eval()(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        total -= float(logp[torch.from_numpy(learned[1:])].sum())
    return total


@pytest.mark.parametrize("stage", [0, 3])
def test_the_reference_is_the_adapter_switched_off(model: Path, stage: int) -> None:
    trained = learner(model, reference=True, zero_stage=stage, lr=1e-2)
    completions = make_completions(seed=2)
    first = trained.score(completions, 0.7)
    assert first.ref_logp_PGT is not None
    np.testing.assert_allclose(first.ref_logp_PGT, first.logp_PGT, atol=1e-6)
    trained.update_sft(sft_rows())
    second = trained.score(completions, 0.7)
    trained.update_sft(sft_rows())
    third = trained.score(completions, 0.7)
    trained.close()
    assert second.ref_logp_PGT is not None
    assert third.ref_logp_PGT is not None
    np.testing.assert_allclose(second.ref_logp_PGT, first.ref_logp_PGT, atol=1e-6)
    np.testing.assert_allclose(third.ref_logp_PGT, first.ref_logp_PGT, atol=1e-6)
    # Switching it on again left it trainable.
    assert np.abs(second.logp_PGT - first.logp_PGT).max() > 1e-2
    assert np.abs(third.logp_PGT - second.logp_PGT).max() > 1e-2


def test_a_state_continues(model: Path, tmp_path: Path, low: dict[str, Any]) -> None:
    item, whole = low_task(model), low
    run_alone(item | {"save": str(tmp_path / "state")})
    second = run_alone(item | {"steps": ["sft"], "seed": item["seed"] + 1, "load": str(tmp_path / "state")})
    assert second["loss"][0] == whole["loss"][1]
    for name, value in whole.items():
        if "/" in name:
            np.testing.assert_array_equal(second[name], value, err_msg=name)
    parameters = json.loads((tmp_path / "state" / "learner.json").read_text())["parameters"]
    assert all("lora_" in name or "delta" in name for name in parameters)


def test_what_travels_alone(model: Path) -> None:
    """Names, shapes and order of the specs are those of the tensors; rows go under the name of their matrix."""
    trained = learner(model, lora=LORA | {"push": "adapter"}, zero_stage=3)
    specs, aliases = trained.describe_weights()
    tensors = list(trained._travelling())
    trained.close()
    assert not aliases
    assert [(spec.name, spec.shape) for spec in specs] == [(name, tuple(value.shape)) for name, value in tensors]
    names = [spec.name for spec in specs]
    assert is_adapter(names)
    assert [name for name in names if name.startswith("rows/")] == ["rows/model.embed_tokens.weight"]
    assert "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight" in names
    shape = live_adapter(trained.settings.lora, model)
    assert (shape.rank, shape.alpha, shape.first_row, shape.rows) == (4, 8, FIRST_ROW, 16)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"engine": "reference"}, r"rollout\.engine: reference; legal: vllm"),
        ({"tensor_parallel": 2}, r"tensor_parallel: 2"),
    ],
)
def test_an_adapter_alone_needs_engines_that_apply_it(rollout: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SftJob(
            data={"dataset": "x"},
            limits={"max_steps": 1},
            learner={"lora": {"rank": 2, "push": "adapter"}},
            rollout=rollout,
        )


def test_unknown_targets_are_refused(model: Path) -> None:
    with pytest.raises(RequestError, match=r"learner\.lora\.targets: wrong; legal: among down_proj, gate_proj"):
        learner(model, lora={"rank": 2, "targets": ("q_proj", "wrong")})
