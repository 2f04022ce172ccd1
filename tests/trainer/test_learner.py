"""Contract: loss, gradients and scores do not depend on ranks, ZeRO stage, packing or accumulation; state is exact.

The reference is one rank with small micro-batches in float32, itself equal to plain forwards (oracle). With beta1 = 0
and without clipping AdamW's first moment is the gradient. Two ranks run as processes of their own, one of them with a
filler in the first step. Not here: Ray (test_learner_group.py), CUDA.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data.errors import RequestError, RunError
from tests.requirements import require
from tests.trainer.learner_world import (
    make_completions,
    make_constraint,
    make_inputs,
    oracle_loss,
    oracle_scores,
    save_model,
)
from tests.trainer.rank_pair import RankPair

PLAIN: dict[str, Any] = {"row_tokens": 64, "token_budget": 64, "grad_clip": 0.0, "lr": 1e-3, "betas": (0.0, 0.95)}
WIDE = PLAIN | {"row_tokens": 128, "token_budget": 256}
THREADS = {"threads": 1, "device": "cpu"}
SEED = 4
"""Of the first step's completions, which make three micro-batches on two ranks."""
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}


@pytest.fixture(autouse=True, scope="module")
def needs_deepspeed() -> None:
    require("deepspeed")


def task(model: Path, **settings: Any) -> dict[str, Any]:
    return {"settings": PLAIN | THREADS | settings, "model": str(model), "steps": ["update"], "seed": SEED}


def run_alone(item: dict[str, Any]) -> dict[str, Any]:
    from tests.trainer.rank_process import run_task
    from trainer.ranks import RankPlace

    return run_task(item, RankPlace())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model: Path) -> dict[str, dict[str, Any]]:
    """One rank, stage 0 in float32 and stage 1 in bfloat16."""
    return {dtype: run_alone(task(model, zero_stage=int(dtype == "bfloat16"), dtype=dtype)) for dtype in TOLERANCE}


@pytest.fixture(scope="module")
def two_ranks(
    model: Path, rank_pair: RankPair, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """All stages and types on two ranks, then states: written on two ranks, continued there."""
    folder = tmp_path_factory.mktemp("ranks")
    tasks = {
        f"{dtype}-{stage}-{name}": task(model, zero_stage=stage, dtype=dtype, **settings)
        for dtype in TOLERANCE
        for stage in (0, 1, 2, 3)
        for name, settings in (("narrow", {}), ("wide", WIDE))
        if name == "narrow" or stage == 2
    }
    for dtype, stage in (("float32", 2), ("bfloat16", 2), ("bfloat16", 3), ("bfloat16", 1)):
        base = task(model, zero_stage=stage, dtype=dtype, betas=(0.9, 0.95), grad_clip=0.5, weight_decay=0.1)
        state = str(folder / f"state-{dtype}-{stage}")
        steps = ["update", "sft", "update", "sft"]
        tasks[f"whole-{dtype}-{stage}"] = base | {"steps": steps}
        tasks[f"first-{dtype}-{stage}"] = base | {"steps": steps[:2], "save": state}
        tasks[f"second-{dtype}-{stage}"] = base | {"steps": steps[2:], "load": state, "seed": SEED + 2}
    tasks["export-3"] = task(model, zero_stage=3, dtype="bfloat16") | {"export": str(folder / "export")}
    return rank_pair.run(folder, tasks) | {"folder": [{"path": folder}]}


def gradient_gap(found: dict[str, Any], exact: dict[str, Any]) -> float:
    """Largest difference of a gradient, relative to the norm of its parameter's gradient."""
    gaps = []
    for name, gradient in exact.items():
        if name.startswith("exp_avg/"):
            gaps.append(float(np.linalg.norm(found[name] - gradient) / np.linalg.norm(gradient)))
    return max(gaps)


def test_one_rank_equals_plain_forwards(model: Path, reference: dict[str, dict[str, Any]]) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model)
    completions = make_completions(seed=SEED)
    loss = oracle_loss(plain, completions, make_inputs(completions, seed=SEED))
    torch.autograd.backward(loss)
    found = reference["float32"]
    assert found["loss"][0] == pytest.approx(loss.item(), rel=1e-6)
    exact = {f"exp_avg/{name}": value.grad.numpy() for name, value in plain.named_parameters()}
    assert gradient_gap(found, exact) < 2e-6
    norm = math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in exact.values()))
    assert found["norm"][0] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_does_not_depend_on_stage_or_packing(
    model: Path, reference: dict[str, dict[str, Any]], dtype: str, stage: int
) -> None:
    found = run_alone(task(model, zero_stage=stage, dtype=dtype, **WIDE))
    assert found["loss"][0] == pytest.approx(reference[dtype]["loss"][0], rel=TOLERANCE[dtype])
    assert gradient_gap(found, reference[dtype]) < TOLERANCE[dtype]


@pytest.mark.parametrize(("stage", "positions"), [(0, 1), (3, 7)])
def test_logits_in_stretches_change_nothing(
    model: Path, reference: dict[str, dict[str, Any]], stage: int, positions: int
) -> None:
    whole = reference["float32"]
    found = run_alone(task(model, zero_stage=stage, dtype="float32", head_positions=positions, **WIDE))
    assert found["loss"][0] == pytest.approx(whole["loss"][0], rel=1e-6)
    assert gradient_gap(found, whole) < 2e-6


def test_logits_in_stretches_change_no_supervised_step(model: Path) -> None:
    item = task(model, zero_stage=0, dtype="float32") | {"steps": ["sft"]}
    whole = run_alone(item)
    found = run_alone(item | {"settings": item["settings"] | {"head_positions": 5}})
    assert found["loss"][0] == pytest.approx(whole["loss"][0], rel=1e-6)
    assert gradient_gap(found, whole) < 2e-6


def test_a_filler_on_one_of_two_ranks_is_among_the_cases() -> None:
    from trainer.micro_batches import micro_batches
    from trainer.trees import completion_pieces

    pieces = completion_pieces(make_completions(seed=SEED), 64)
    plans = [micro_batches(pieces, token_budget=64, rank=rank, ranks=2) for rank in (0, 1)]
    assert sorted(sum(len(batch.target_K) == 0 for batch in plan) for plan in plans) == [0, 1]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("case", ["0-narrow", "1-narrow", "2-narrow", "3-narrow", "2-wide"])
def test_two_ranks_equal_one(
    two_ranks: dict[str, list[dict[str, Any]]], reference: dict[str, dict[str, Any]], dtype: str, case: str
) -> None:
    ranks = two_ranks[f"{dtype}-{case}"]
    loss = sum(float(rank["loss"][0]) for rank in ranks)
    assert loss == pytest.approx(reference[dtype]["loss"][0], rel=TOLERANCE[dtype])
    for rank in ranks:
        assert gradient_gap(rank, reference[dtype]) < TOLERANCE[dtype]
        assert float(rank["norm"][0]) == pytest.approx(reference[dtype]["norm"][0], rel=TOLERANCE[dtype])


@pytest.mark.parametrize("case", ["float32-2", "bfloat16-1", "bfloat16-2", "bfloat16-3"])
def test_resumed_state_is_exact(two_ranks: dict[str, list[dict[str, Any]]], case: str) -> None:
    for whole, second in zip(two_ranks[f"whole-{case}"], two_ranks[f"second-{case}"], strict=True):
        assert int(second["step"]) == 2
        assert whole["loss"][2:].tolist() == second["loss"].tolist()
        for name in whole:
            if "/" in name or name == "logp":
                np.testing.assert_array_equal(whole[name], second[name], err_msg=name)


@pytest.mark.parametrize(
    ("written", "stage"), [("float32-2", 0), ("float32-2", 3), ("bfloat16-3", 2), ("bfloat16-2", 1)]
)
def test_state_moves_to_one_rank_and_another_stage(
    model: Path, two_ranks: dict[str, list[dict[str, Any]]], written: str, stage: int
) -> None:
    folder = two_ranks["folder"][0]["path"]
    dtype = written.split("-")[0]
    item = task(model, zero_stage=stage, dtype=dtype, betas=(0.9, 0.95), grad_clip=0.5, weight_decay=0.1)
    moved = run_alone(item | {"steps": [], "load": str(folder / f"state-{written}")})
    first = two_ranks[f"first-{written}"][0]
    for name in first:
        if "/" in name:
            np.testing.assert_array_equal(moved[name], first[name], err_msg=name)
    going = run_alone(item | {"steps": ["update", "sft"], "load": str(folder / f"state-{written}"), "seed": SEED + 2})
    whole = two_ranks[f"whole-{written}"]
    for step in range(2):
        loss = sum(float(rank["loss"][2 + step]) for rank in whole)
        assert going["loss"][step] == pytest.approx(loss, rel=10 * TOLERANCE[dtype])


def test_export_loads(two_ranks: dict[str, list[dict[str, Any]]]) -> None:
    folder = two_ranks["folder"][0]["path"] / "export"
    lm = AutoModelForCausalLM.from_pretrained(folder)
    assert lm.dtype == torch.bfloat16
    assert lm.generation_config.max_length in (None, 20)
    rank = two_ranks["export-3"][0]
    for name, value in lm.named_parameters():
        np.testing.assert_array_equal(value.detach().float().numpy(), rank[f"weight/{name}"])
    assert lm.lm_head.weight is lm.model.embed_tokens.weight


def group_twin(group: Any) -> torch.dtype:
    """The type that a local group's learner measures its noise in."""
    twin: torch.dtype = group._local._twin._dtype
    return twin


def test_scores_of_a_rank_and_noise(model: Path) -> None:
    from trainer.learner_group import LearnerGroup
    from trainer.settings import LearnerSettings

    completions = make_completions()
    outputs = {}
    for dtype in TOLERANCE:
        settings = LearnerSettings(**(PLAIN | THREADS | {"dtype": dtype}))
        group = LearnerGroup.local(settings, model, make_constraint(), reference_dir=model)
        outputs[dtype] = group.score(completions, 0.7)
        noise = group.noise(completions, 0.7, group.score(completions, 0.7).logp_PGT)
        gap = np.abs(outputs[dtype].logp_PGT - outputs["float32"].logp_PGT)[completions.token_mask_PGT]
        assert group_twin(group) == {"float32": torch.float64, "bfloat16": torch.float32}[dtype]
        if dtype == "float32":
            assert 0 < noise["mean"] < noise["max"] < 2e-5
        else:  # the twin holds the rounded weights, so its gap is not exactly the one to the unrounded model
            assert 0.2 * gap.mean() < noise["mean"] < 5 * gap.mean()
        assert outputs[dtype].ref_logp_PGT == pytest.approx(outputs[dtype].logp_PGT, abs=1e-6)
        group.close()
    oracle = oracle_scores(AutoModelForCausalLM.from_pretrained(model), completions, 0.7)
    for place, (logp, full, mass, entropy) in oracle.items():
        scores = outputs["float32"]
        assert scores.logp_PGT[place] == pytest.approx(float(logp.detach()), abs=2e-5)
        assert scores.full_logp_PGT[place] == pytest.approx(float(full.detach()), abs=2e-5)
        assert scores.legal_mass_PGT[place] == pytest.approx(float(mass.detach()), abs=2e-5)
        assert scores.entropy_PGT[place] == pytest.approx(float(entropy.detach()), abs=2e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_non_finite_loss_leaves_weights_alone(model: Path, stage: int, dtype: str) -> None:
    from trainer.learner_group import LearnerGroup
    from trainer.settings import LearnerSettings

    settings = LearnerSettings(**(PLAIN | THREADS | {"dtype": dtype, "zero_stage": stage}))
    group = LearnerGroup.local(settings, model, make_constraint())
    completions = make_completions()
    before = group.score(completions, 1.0).logp_PGT
    inputs = make_inputs(completions)
    inputs.advantage_PGT[0, 0, 0] = np.inf
    with pytest.raises(RunError, match="optimiser step 1"):
        group.update(completions, inputs)
    np.testing.assert_array_equal(group.score(completions, 1.0).logp_PGT, before)
    assert group.step == 0
    group.close()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_learner_starts_where_another_library_ended_the_groups(model: Path, stage: int) -> None:
    """vLLM's engine destroys the process groups of its process when it ends."""
    from trainer.learner_group import LearnerGroup
    from trainer.settings import LearnerSettings

    completions, losses = make_completions(), []
    for _ in range(2):
        group = LearnerGroup.local(
            LearnerSettings(**(PLAIN | THREADS | {"zero_stage": stage})), model, make_constraint()
        )
        losses.append(group.update(completions, make_inputs(completions))["loss"])
        group.close()
        torch.distributed.destroy_process_group()
    assert losses[0] == losses[1]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_non_finite_gradient_leaves_weights_alone(model: Path, stage: int, dtype: str) -> None:
    """The loss is finite, so only the gradient norm tells."""
    from trainer.learner import Learner
    from trainer.learner_group import LearnerGroup
    from trainer.settings import LearnerSettings

    settings = LearnerSettings(**(PLAIN | THREADS | {"dtype": dtype, "zero_stage": stage}))
    learner = Learner(settings, model, make_constraint())
    group = LearnerGroup(settings, learner, [])
    completions = make_completions()
    before = group.score(completions, 1.0).logp_PGT
    next(iter(learner._trained.values())).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RunError, match=r"gradient norm (inf|nan) in optimiser step 1; stopped before the step"):
        group.update(completions, make_inputs(completions))
    np.testing.assert_array_equal(group.score(completions, 1.0).logp_PGT, before)
    group.close()


def test_state_of_another_model_is_refused(
    tmp_path: Path, two_ranks: dict[str, list[dict[str, Any]]], model: Path
) -> None:
    from trainer.learner import Learner
    from trainer.settings import LearnerSettings

    learner = Learner(LearnerSettings(**(PLAIN | THREADS)), model, make_constraint())
    with pytest.raises(RequestError, match="missing"):
        learner.load(tmp_path)
    (tmp_path / "learner.json").write_text(json.dumps({"format": 99}), encoding="utf-8")
    with pytest.raises(RequestError, match="format 99"):
        learner.load(tmp_path)
    (tmp_path / "learner.json").write_text(
        json.dumps({"format": 1, "parameters": ["x"], "files": [], "step": 1}), encoding="utf-8"
    )
    with pytest.raises(RequestError, match="parameters that differ"):
        learner.load(tmp_path)
    learner.close()
