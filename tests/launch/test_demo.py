"""Contract: the demo's jobs are asked on equal terms, its table and summary have the promised shape, and a demo that
is started again runs only what is left.

The whole loop on real processes, small, is a long test; the figures of the real demo are in docs/results.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from data.code_building import build_codes
from data.errors import RequestError
from launch import demo
from launch.demo import Clock, Plan, finished, link_checkpoints, open_dataset, optimiser_steps, run_demo
from launch.demo_table import NAMES, comparison_lines, comparisons, reward_course, reward_words, table
from launch.memory import MemorySampler
from launch.provenance import ROOT
from launch.smoke import OVERRIDES
from tests.data.tiny import import_events
from tests.requirements import require
from trainer.interruption import Interruption
from trainer.jobs import RankerJob, RlJob
from trainer.row_metrics import RowMetrics, write_row_metrics

KS = (1, 3, 5, 10, 20, 50)


def plan(folder: Path) -> Plan:
    return Plan(run_dir=folder / "run", dataset=folder / "dataset")


def test_the_stages_are_asked_on_equal_terms(tmp_path: Path) -> None:
    jobs = [plan(tmp_path).policy_job(stage) for stage in demo.POLICIES]
    assert len({(job.seed, job.data.history, job.data.exclude_seen, job.data.codes) for job in jobs}) == 1
    assert len({(job.evaluation.test_rows, job.evaluation.k, job.evaluation.metric) for job in jobs}) == 1
    assert jobs[0].evaluation.test_rows >= 2000
    assert jobs[0].evaluation.k == KS
    ranker = plan(tmp_path).job("sasrec")
    assert (ranker.data.history, ranker.data.exclude_seen) == (jobs[0].data.history, jobs[0].data.exclude_seen)


def test_the_control_takes_as_many_steps_as_rl(tmp_path: Path) -> None:
    rl, control = plan(tmp_path).policy_job("rl"), plan(tmp_path).policy_job("sft_continued")
    assert isinstance(rl, RlJob)
    assert rl.limits.max_steps is not None
    assert rl.limits.max_steps >= 30
    assert control.limits.max_steps == optimiser_steps(rl)
    assert control.init == rl.init == str(tmp_path / "run" / "sft")
    assert rl.reward.asks_ranker
    twice = Plan(**{**plan(tmp_path).__dict__, "overrides": {"rl": ("--objective.updates", "2")}})
    assert twice.policy_job("sft_continued").limits.max_steps == 2 * rl.limits.max_steps


def stage(value: float, free: float | None) -> dict[str, Any]:
    metrics = {f"{name}@{k}": value for name in ("hr", "ndcg") for k in KS}
    return {**metrics, "coverage@10": 0.5, "n": 7, "invalid": {"constrained": 0.0, "unconstrained": free}}


def test_one_table_with_every_stage() -> None:
    stages = {name: stage(0.01 * rank, 0.25 if rank > 2 else None) for rank, name in enumerate(NAMES)}
    lines = table(stages, KS).splitlines()
    assert len(lines) == 2 + len(NAMES)
    assert all(f"{metric}@{k}" in lines[0] for metric in ("HR", "NDCG") for k in KS)
    assert lines[6].startswith("SFT+GRPO")
    assert lines[6].count("0.0500") == 2 * len(KS)
    assert "0.2500" in lines[6]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1].startswith("7 rows")


def test_comparisons_pair_the_same_rows(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    files = {}
    for name, gain in (("sft", 0.0), ("rl", 0.1)):
        value_N = random.random(200).astype(np.float32) * 0.01 + np.float32(gain)
        rows = RowMetrics(
            name=name,
            split="test",
            dataset="d",
            sample_id_N=np.arange(200),
            user_id_N=np.repeat(np.arange(50, dtype=np.int32), 4),
            value_N={f"{metric}@{k}": value_N for metric in ("hr", "ndcg") for k in KS},
        )
        files[name] = write_row_metrics(tmp_path / name, rows)
    found = comparisons(files, KS)
    assert list(found) == ["rl - sft"]
    assert found["rl - sft"]["ndcg@10"]["mean"] == pytest.approx(0.1, abs=0.005)
    assert set(found["rl - sft"]) == {f"{metric}@{k}" for metric in ("hr", "ndcg") for k in KS}
    assert "does not hold 0" in comparison_lines(found)[0]


def steps(rewards: list[float], passes: float) -> list[dict[str, Any]]:
    course = [
        {"step": n, "reward/mean": reward, "epoch": passes * n / len(rewards)} for n, reward in enumerate(rewards, 1)
    ]
    return [{"step": 0, "ndcg@10": 0.1}, *course]


def test_the_course_of_the_reward_is_told_as_it_is() -> None:
    rising = reward_course(steps([0.001 * n for n in range(30)], 6.0))
    assert rising["steps"] == 30
    assert rising["slope_per_step"] == pytest.approx(0.001)
    assert rising["last"] - rising["first"] == pytest.approx(0.02)
    assert "rose" in reward_words(rising, 1024)
    assert "6.0 passes over the latest 1,024" in reward_words(rising, 1024)
    falling = reward_course(steps([1.0, 0.9, 0.8, 0.7], 0.5))
    assert falling["averaged_over"] == 2
    assert "did not rise" in reward_words(falling, None)
    assert "passes" not in reward_words(falling, None)
    assert "too few" in reward_words(reward_course(steps([1.0], 1.0)), None)


def test_links_are_relative_and_follow_a_new_best(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / "rl" / "checkpoints" / f"step-{step:06d}" / "hf").mkdir(parents=True)
    for step in (1, 2):
        link_checkpoints(tmp_path, {"rl": f"/elsewhere/rl/checkpoints/step-{step:06d}"})
        link = tmp_path / "checkpoints" / "rl"
        assert not link.readlink().is_absolute()
        assert link.resolve().name == f"step-{step:06d}"
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert [path.parent.name for path in moved.glob("checkpoints/*/hf")] == ["rl"]


def test_time_adds_up_over_starts(tmp_path: Path) -> None:
    memory = MemorySampler()
    for _ in range(2):
        clock = Clock(tmp_path / "progress.json")
        with clock.phase("data", memory):
            pass
        with clock.phase("results", memory):
            present = clock.totals()
    assert list(present["phase_seconds"]) == ["data", "results"]
    assert present["wall_seconds"] == sum(present["phase_seconds"].values()) > 0
    assert clock.totals()["phase_seconds"]["results"] > present["phase_seconds"]["results"]
    started = Clock(tmp_path / "other.json", started=time.time() - 5).totals()
    assert started["phase_seconds"]["start"] == pytest.approx(5, abs=1)


def test_an_interrupted_stage_is_not_finished(tmp_path: Path) -> None:
    assert finished(tmp_path) is None
    (tmp_path / "summary.json").write_text(json.dumps({"interrupted": True}))
    assert finished(tmp_path) is None
    (tmp_path / "summary.json").write_text(json.dumps({"interrupted": False}))
    assert finished(tmp_path) is not None


def test_another_dataset_is_refused(tmp_path: Path) -> None:
    dataset = import_events(tmp_path, [(user, f"i{n}", 10 * n + user) for user in range(4) for n in range(6)])
    with pytest.raises(RequestError, match="with other rules"):
        open_dataset(dataset.path)


def test_a_finished_stage_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("movielens")
    small = plan(tmp_path)
    dataset = open_dataset(small.dataset)
    build_codes(dataset, demo.CODES, demo.CODE_SETTINGS)
    asked: list[str] = []

    def train(job: RankerJob, *_: object) -> dict[str, Any]:
        asked.append(job.job)
        return {"digest": 1}

    monkeypatch.setattr(demo, "train_ranker_job", train)
    with Interruption() as interruption, MemorySampler() as memory:
        for _ in range(2):
            job = small.job("sasrec")
            assert demo.run_stage(small, "sasrec", job, memory, interruption)["digest"] == 1
    assert asked == ["ranker"]


@pytest.mark.long
def test_the_whole_loop_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("movielens", "vllm", "deepspeed", "ray"):
        require(part)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small = Plan(
        run_dir=tmp_path / "run",
        dataset=tmp_path / "dataset",
        overrides={**OVERRIDES, "sft_continued": ("--learner.warmup_steps", "1")},
    )
    summary = run_demo(small)
    assert capsys.readouterr().out.count("SFT+GRPO  ") == 1
    assert list(summary["stages"]) == list(NAMES)
    schema = json.loads((ROOT / "docs" / "schemas" / "summary.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(json.loads((small.run_dir / "summary.json").read_text()))
    assert {row["n"] for row in summary["stages"].values()} == {64}
    assert summary["selection"]["rl"]["candidates"][0] == 0
    assert summary["steps"]["sft_continued"] == summary["steps"]["rl"] == 3
    assert summary["policy_gap"]["max"] < 1e-3
    assert summary["reward"]["requests"] >= 3
    models = sorted(small.run_dir.glob("checkpoints/*/hf"))
    assert [path.parent.name for path in models] == ["rl", "sft", "sft_continued"]
    for model in models:
        AutoModelForCausalLM.from_pretrained(model)
        AutoTokenizer.from_pretrained(model)
    again = run_demo(small)
    assert capsys.readouterr().out.count("finished before") == 4
    assert again["stages"] == summary["stages"]
