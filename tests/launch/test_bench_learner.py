"""Contract: `windlass bench learner` compares what it says: trees and all ways of rows give the same scores and, in
float32, the same gradients; the limit and the work are those of counting tokens; a wrong gradient is found out; it
needs no vLLM, Ray or DeepSpeed.

Not checked here: the figures; the attention and the trees by themselves (tests/trainer).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import RequestError
from launch.bench import learner
from launch.bench.learner import ROWS, LearnerBench, build_way, compare_gradients, learner_work, random_completions
from launch.bench.models import BenchModel, bench_model
from rollout.settings import EngineDtype
from tests.launch.test_bench_rollout import bench

SETTINGS = LearnerBench(model="tiny", prompts=3, prompt_len=20, group=5, threads=1, dtype=EngineDtype.FLOAT32)


@pytest.fixture(scope="module")
def model() -> Iterator[BenchModel]:
    with bench_model(SETTINGS) as found:
        yield found


def test_all_ways_compute_the_same(model: BenchModel) -> None:
    completions = random_completions(SETTINGS, model)
    assert completions.shape == (3, 5, 4)
    scores = {name: build_way(name, SETTINGS, model, completions)() for name in ("ours", *ROWS)}
    for name in ROWS:
        assert scores[name].shape == (3 * 5 * 4,)
        torch.testing.assert_close(scores[name], scores["ours"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_compared(model: BenchModel, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS.model_copy(update={"activation_checkpointing": checkpointing})
    completions = random_completions(settings, model)
    assert max(compare_gradients(settings, model, completions).values()) < learner.TOLERANCE

    def shifted(*arguments: object) -> object:
        pieces = completion_pieces(*arguments)  # type: ignore[arg-type]
        return [
            piece.__class__(**{**vars(piece), "position_N": piece.position_N + (piece.branch_N > 0)})
            for piece in pieces
        ]

    completion_pieces = learner.completion_pieces
    monkeypatch.setattr(learner, "completion_pieces", shifted)
    assert compare_gradients(settings, model, completions)["gradient_gap"] > learner.TOLERANCE


def test_a_gradient_that_is_no_number_is_noticed(model: BenchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class OneBroken:
        def __init__(self, name: str) -> None:
            self.lm = torch.nn.ParameterDict({"first": torch.ones(2), "last": torch.ones(2)})
            for parameter in self.lm.parameters():
                parameter.grad = torch.ones(2)
            if name == "ours":
                self.lm["last"].grad.fill_(torch.nan)

        def __call__(self) -> torch.Tensor:
            return torch.zeros(1)

    monkeypatch.setattr(learner, "build_way", lambda name, *others: OneBroken(name))
    check = compare_gradients(SETTINGS, model, random_completions(SETTINGS, model))
    assert not check["gradient_gap"] <= learner.TOLERANCE


def test_the_limit_and_the_work_count_tokens(model: BenchModel) -> None:
    usual = LearnerBench(threads=1)
    assert (usual.prompt_len, usual.group, usual.levels) == (250, 16, 4)
    assert learner.row_limit(usual, 4) == pytest.approx(16 * 254 / (250 + 64))
    tokens, flops = learner_work(SETTINGS, model, trees=True)
    row_tokens, row_flops = learner_work(SETTINGS, model, trees=False)
    assert (tokens, row_tokens) == (3 * (20 + 5 * 3), 3 * 5 * 23)
    assert flops < row_flops


def test_a_group_beyond_the_catalogue_is_refused(model: BenchModel) -> None:
    with pytest.raises(RequestError, match="--group"):
        random_completions(SETTINGS.model_copy(update={"group": model.catalogue.n_items + 1}), model)


def test_the_command_needs_no_vllm_ray_or_deepspeed(tmp_path: Path) -> None:
    small = (
        "--model",
        "tiny",
        "--prompts",
        "2",
        "--prompt-len",
        "20",
        "--group",
        "4",
        "--repeats",
        "1",
        "--threads",
        "1",
    )
    answer = bench(tmp_path, "learner", *small, blocked=True)
    assert answer["checked"] is True
    assert answer["limit"] == pytest.approx(4 * 24 / (20 + 16))
    assert np.isfinite(float(answer["fraction_of_limit"]))  # type: ignore[arg-type]
    assert answer["fastest_rows"] in ROWS
