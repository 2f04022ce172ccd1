"""Contract: `windlass bench step` gives both sides the same prompts, targets and numbers of steps and tokens, and says
so in `checked`; TRL takes exactly one optimiser step per call.

Not checked here: the figures; TRL's arithmetic (tests/trainer/test_trl_equality.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.bench.models import bench_model
from launch.bench.step import step_work
from launch.bench.step_job import StepBench, prompt_builder, random_samples
from launch.bench.trl_way import TrlOptions, build_trl
from tests.launch.test_bench_rollout import bench
from tests.requirements import require

SETTINGS = StepBench(model="tiny", prompts=2, prompt_len=22, group=4, threads=1)


def test_prompts_are_as_long_as_asked() -> None:
    with bench_model(SETTINGS) as model:
        job = SETTINGS.job(model.levels, 512)
        samples = random_samples(SETTINGS, model.catalogue)
        batch = prompt_builder(job, model.catalogue).build(samples)
        assert {len(prompt.token_ids) for prompt in batch.prompts} == {22}
        assert len({prompt.prompt_id for prompt in batch.prompts}) == len(batch.prompts) >= 2 * 6
        tokens, flops = step_work(SETTINGS, model)
        assert tokens == 2 * (22 + 4 * 2)
        assert flops > 0


def test_trl_takes_one_step_per_call() -> None:
    require("trl")
    with bench_model(SETTINGS) as model:
        functions = build_trl(SETTINGS, model.hf_dir, TrlOptions("eager", 4))
        try:
            for number in (1, 2):
                functions["step"]()
                assert functions["facts"]() == {"steps": number, "rows": 8, "tokens_per_row": 3.0}
        finally:
            functions["close"]()


@pytest.mark.long
def test_the_command(tmp_path: Path) -> None:
    for part in ("trl", "vllm", "deepspeed"):
        require(part)
    small = (
        "--model",
        "tiny",
        "--prompts",
        "2",
        "--prompt-len",
        "22",
        "--group",
        "4",
        "--repeats",
        "1",
        "--threads",
        "1",
    )
    answer = bench(tmp_path, "step", *small, blocked=False)
    assert answer["checked"] is True
    assert answer["speedup_vs_trl"] > 0  # type: ignore[operator]
    assert set(answer["ways"]) == {"ours", "trl"}  # type: ignore[call-overload]
