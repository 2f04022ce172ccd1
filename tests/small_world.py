"""A small world for whole jobs: users who walk along a ring of items, codes for the items, recipes of a few steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data.codes import Codes, codes_path
from data.dataset import Dataset
from tests.data.tiny import import_events

USERS, ITEMS, EVENTS = 60, 48, 14


def write_dataset(
    folder: Path, *, starts_s: int = 10_000, step_s: int = 97, ratios: tuple[float, float, float] = (8.0, 1.0, 1.0)
) -> Dataset:
    """A dataset whose next item is mostly a neighbour of the last one, with two-level codes called `default`.

    Args:
        starts_s: users begin within so many seconds.
        step_s: seconds between two events of a user.
        ratios: of the split.
    """
    rng = np.random.default_rng(0)
    events = []
    for user in range(USERS):
        position = int(rng.integers(ITEMS))
        start = int(rng.integers(starts_s))
        for step in range(EVENTS):
            events.append((user, f"item-{position:02d}", start + step_s * step))
            position = (position + int(rng.integers(1, 4))) % ITEMS
    dataset = import_events(folder, events, ratios=ratios)
    paths = [[item // 8, item % 8] for item in range(dataset.n_items)]
    codes = Codes.from_lists(paths, provenance={"fingerprint": dataset.fingerprint})
    codes.save(codes_path(dataset.path, "default"))
    return dataset


def recipe(dataset: Path, job: str, **sections: Mapping[str, Any] | int | str) -> dict[str, Any]:
    """A job of a few float32 steps; `sections` are merged over it, one level deep."""
    content: dict[str, Any] = {
        "job": job,
        "seed": 3,
        "data": {"dataset": str(dataset), "history": 6, "max_prompt_tokens": 16},
        "init": "tiny",
        "learner": {"dtype": "float32", "row_tokens": 64, "token_budget": 256, "lr": 1e-3, "threads": 1},
        "rollout": {
            "dtype": "float32",
            "width": 8,
            "shard_size": 4,
            "max_model_len": 64,
            "kv_cache_gib": 0.1,
            "threads": 1,
        },
        "limits": {"max_steps": 3},
        "evaluation": {"rows": 16, "k": [1, 5, 10], "metric": "ndcg@10", "batch": 16},
        "checkpoints": {"interval": 1, "last": 2},
        "cluster": {"object_store_mib": 128},
    }
    if job == "rl":
        content["batch_prompts"] = 8
    for name, value in sections.items():
        content[name] = {**content.get(name, {}), **value} if isinstance(value, Mapping) else value
    return content


def write_recipe(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a recipe file."""
    path.write_text("# A job of a test.\n" + yaml.safe_dump(dict(content)))
    return path


def write_jobs(folder: Path) -> Dataset:
    """Write a dataset and, for a reference engine, the recipes `rl.yaml` and `sft.yaml`; returns the dataset."""
    dataset = write_dataset(folder / "source")
    for job in ("rl", "sft"):
        write_recipe(folder / f"{job}.yaml", recipe(dataset.path, job, rollout={"engine": "reference"}))
    return dataset


def windlass(*arguments: str, cwd: Path, timeout: float = 400, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in a process of its own (`python -m` would find the packages of `cwd` first)."""
    return subprocess.run(
        [str(Path(sys.executable).parent / "windlass"), *arguments],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def read_steps(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
