"""A run folder as a finished job leaves it, with invented numbers; and commands that share a process and a cluster."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from launch.cli import run
from tests.requirements import require

CUTOFFS = (1, 3, 5, 10, 20, 50)
STAGES = ("popularity", "cooccurrence", "sasrec", "sft", "sft_continued", "rl")


def make_summary() -> dict[str, Any]:
    """A summary.json in the shape that the demo writes."""
    stages: dict[str, Any] = {}
    for rank, stage in enumerate(STAGES):
        ndcg = {f"ndcg@{k}": 0.02 * (rank + 1) * math.log2(k + 1) / 2 for k in CUTOFFS}
        hr = {f"hr@{k}": 1.8 * ndcg[f"ndcg@{k}"] for k in CUTOFFS}
        stages[stage] = {
            "n": 2000,
            **hr,
            **ndcg,
            "coverage@10": 0.1 * (rank + 1),
            "invalid": {"constrained": 0.0, "unconstrained": 0.05 if stage in ("sft", "rl") else 0.0},
            "ci95": {name: [0.9 * v, 1.1 * v] for name, v in {**hr, **ndcg}.items()},
        }
    return {
        "format": 1,
        "stages": stages,
        "comparisons": {"rl - sft": {"ndcg@10": {"mean": 0.002, "low": -0.001, "high": 0.005}}},
        "policy_gap": {"mean": 1e-3, "max": 2e-2, "noise": 1.1e-3},
        "weight_versions": list(range(41)),
        "wall_seconds": 411.0,
        "peak_pss_gib": 5.2,
        "engine": {"name": "vllm", "version": "0.32.0", "count": 1},
        "learner": {"backend": "deepspeed", "zero_stage": 2, "ranks": 1},
        "reward": {"backend": "ray-serve", "requests": 40},
        "interrupted": False,
    }


def make_steps(count: int = 40) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    steps: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        line: dict[str, Any] = {
            "step": step,
            "loss": math.exp(-step / 20) + 0.05 * math.sin(step),
            "reward/mean": 0.1 + step / 400 + 0.01 * math.sin(step),
            "reward/hit": 0.15 + step / 500,
            "policy_gap/mean": 1e-3 * (1 + 0.2 * math.sin(step)),
            "policy_gap/noise": 1e-3,
            "legal_mass": 0.97 + 0.0005 * step,
            "entropy": 2.0 - step / 60,
            "time/rollout": 1.2,
            "time/reward": 0.1,
            "time/score": 0.4,
            "time/update": 0.9,
            "time/push": 0.1,
        }
        if step % 10 == 0:
            line |= {f"valid/ndcg@{k}": 0.01 * math.log2(k + 1) + step / 4000 for k in CUTOFFS}
            line |= {f"valid/hr@{k}": 0.02 * math.log2(k + 1) + step / 3000 for k in CUTOFFS}
        steps.append(line)
    return steps


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A finished run in a folder of its own."""
    run = tmp_path / "demo"
    run.mkdir()
    (run / "summary.json").write_text(json.dumps(make_summary()))
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in make_steps()))
    (run / "config.yaml").write_text("job: rl\nseed: 1\n")
    entry = {"commit": "0123456789abcdef", "dirty": True, "hardware": {"cores": 2, "processor": "a CPU", "cards": []}}
    (run / "environment.json").write_text(json.dumps([entry]))
    return run


class Here(Protocol):
    """Runs a command line in this process, as `tests.small_world.windlass` does in one of its own."""

    def __call__(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """The exit code and what was said."""
        ...


@pytest.fixture(scope="module")
def windlass_here() -> Iterator[Here]:
    """Commands that share this process and one Ray, whose starts are most of a small evaluation."""
    require("ray")
    from launch.cluster import cluster
    from trainer.run_settings import ClusterSettings

    def here(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        said, complained = io.StringIO(), io.StringIO()
        with contextlib.chdir(cwd), contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            code = run(arguments)
        return subprocess.CompletedProcess(arguments, code, said.getvalue(), complained.getvalue())

    with cluster(ClusterSettings(object_store_mib=128)):
        yield here
