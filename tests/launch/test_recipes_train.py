"""Contract: `windlass train NAME` trains every recipe for a few steps through the real fleet (Ray, vLLM, DeepSpeed) on
a small world, with what its header asks for before it; every step tells the metrics of the recipe's stages; the clips
of the recipes with several minibatches act.

Not checked: recipes that begin with a pretrained model, which this world has not (test_language_job.py), and `laac`
(tests/trainer/test_laac_job.py); what the methods do (tests/trainer) and how good the models are (docs/results.md). A
recipe's sizes and places are replaced, its method is not.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.config import load_job, recipe_header, recipe_names, recipe_path
from tests.requirements import require
from tests.small_world import read_steps, windlass, write_dataset
from trainer.gate import GateKind
from trainer.group_settings import Refill
from trainer.jobs import CriticJob, PolicyJobSettings, RankerJob, RlJob
from trainer.tempering import TemperingMode
from trainer.truncation import TruncationLevel
from trainer.window import WindowKind

STEPS = 3
TRAINED = [name for name in recipe_names() if name != "laac" and not name.startswith(("qwen", "llm-"))]
CLIPPING = ("dapo", "dr_grpo", "gspo")
SIZES = {
    "data.codes": "default",
    "data.history": 6,
    "data.max_prompt_tokens": 16,
    "learner.ranks": 1,
    "learner.dtype": "float32",
    "learner.row_tokens": 64,
    "learner.token_budget": 512,
    "learner.threads": 1,
    "rollout.engines": 1,
    "rollout.dtype": "float32",
    "rollout.max_model_len": 64,
    "rollout.kv_cache_gib": 0.1,
    "rollout.threads": 1,
    "evaluation.every": 0,
    "evaluation.k": "[1, 5, 10]",
    "checkpoints.interval": STEPS,
    "cluster.object_store_mib": 128,
}
LISTS = {
    # The items of the small world have no genres to explore.
    "lists.needs": "[{name: interest}, {name: trend}]",
    "lists.held_out": "",
    "lists.candidates": 12,
    "lists.positives": 3,
}
LIST_ROWS = {"data.max_prompt_tokens": 64, "learner.row_tokens": 128, "rollout.max_model_len": 128}
CRITIC = LISTS | {"data.codes": "default", "data.history": 6, "data.max_prompt_tokens": 64, "critic.epochs": 1}


@dataclass(frozen=True)
class World:
    """A dataset, and what the headers of the recipes ask for."""

    folder: Path
    dataset: Path
    policy: Path
    ranker: Path
    feedback: Path

    def overrides(self, name: str) -> list[str]:
        """The recipe's sizes and places, replaced by small ones."""
        job = load_job(name)
        if isinstance(job, CriticJob):
            return arguments(CRITIC | {"data.dataset": self.dataset})
        changes: dict[str, Any] = {"data.dataset": self.dataset, "limits.max_steps": STEPS, "evaluation.rows": 16}
        if isinstance(job, RankerJob):
            changes |= {"data.history": 6, "evaluation.every": 0, "evaluation.k": "[1, 5, 10]"}
            return arguments(changes)
        changes |= SIZES | {"evaluation.test_rows": 0}
        if job.lists.on:
            changes |= LISTS | LIST_ROWS
        if not isinstance(job, RlJob):
            # A run of another recipe gives `init`; the presets stay, for the recipes that begin with one.
            changes |= {"batch_rows": 8} | ({} if job.feedback is None else {"feedback": self.feedback})
            changes |= {} if job.init in ("mini", "tiny") else {"init": self.policy}
            return arguments(changes | {"init_embeddings": "auto"})
        start = self.trained("flexrec-sft") if job.lists.on else self.policy
        changes |= {"init": start, "batch_prompts": 16, "data.latest_rows": "null", "rollout.shard_size": 16}
        if name in CLIPPING:
            # Three small batches move the policy less than the forty-eight of the recipe.
            changes["learner.lr"] = 1e-3
        if job.reward.ranker is not None:
            critic = self.trained("flexrec-critic") / "ranker" if job.lists.on else None
            changes["reward.ranker"] = critic or self.ranker
        if job.feedback is not None:
            changes["feedback"] = self.feedback
        return arguments(changes)

    def trained(self, name: str) -> Path:
        """The run directory of a recipe, which is run unless it was."""
        run_dir = self.folder / "runs" / name
        return run_dir if (run_dir / "summary.json").is_file() else self.train(name)

    def train(self, name: str) -> Path:
        """Run a recipe as a user would; returns its run directory."""
        run_dir = self.folder / "runs" / name
        done = windlass("train", name, "--run-dir", str(run_dir), *self.overrides(name), cwd=self.folder)
        assert done.returncode == 0, done.stderr[-3000:]
        return run_dir


def arguments(changes: dict[str, Any]) -> list[str]:
    """`--key value` for each change."""
    return [word for key, value in changes.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The small world with a trained model, a ranker and a feedback log, made by the commands a user types."""
    for part in ("vllm", "deepspeed", "ray"):
        require(part)
    folder = tmp_path_factory.mktemp("recipes")
    dataset = write_dataset(folder / "source").path
    runs = folder / "runs"
    found = World(folder, dataset, runs / "ml100k-sft", runs / "ml100k-ranker" / "ranker", folder / "feedback")
    for name in ("ml100k-ranker", "ml100k-sft"):
        found.train(name)
    places = ["--data", str(dataset), "--out", str(found.feedback)]
    engine = ["--rollout.dtype", "float32", "--rollout.max-model-len", "64", "--rollout.kv-cache-gib", "0.1"]
    done = windlass("data", "simulate", str(found.policy), *places, *engine, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", TRAINED)
def test_every_recipe_trains(name: str, world: World) -> None:
    run_dir = world.trained(name)
    summary = json.loads((run_dir / "summary.json").read_text())
    job = load_job(name)
    if isinstance(job, RankerJob | CriticJob):
        assert summary["digest"]
        return
    assert summary["steps"] == STEPS
    assert summary["engine"]["name"] == "vllm"
    assert summary["learner"]["backend"] == "deepspeed"
    steps = read_steps(run_dir)[1:]
    assert all(math.isfinite(step["loss"]) for step in steps)
    if isinstance(job, RlJob):
        check_rl(name, job, steps, summary)


def check_rl(name: str, job: RlJob, steps: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """What the metrics of a recipe must say of its method."""
    assert [step["weight_version"] for step in steps] == list(range(STEPS))
    assert all(step["policy_gap/mean"] < 1e-4 and step["reward/failed_share"] == 0 for step in steps)
    assert (summary["reward"]["requests"] > 0) == (job.reward.ranker is not None)
    for step in steps:
        missing = logged(job) - {metric for metric, value in step.items() if value is not None}
        assert not missing, missing
    if job.objective.gate.kind is not GateKind.NONE:
        assert all(0 <= step["gate/open"] <= 1 for step in steps)
    if job.objective.anchor.is_member:
        assert all(step["anchor/not_legal"] == 0 for step in steps)
    if name in CLIPPING:
        shares = [step["ratio/clip_high_share"] + step["ratio/clip_low_share"] for step in steps]
        assert max(shares) > 0


def logged(job: RlJob) -> set[str]:
    """Metrics that every step of the job must have."""
    objective = job.objective
    names = {"groups/live_share", "groups/zero_variance_share", "advantage/sum"}
    if not objective.credit.of_lists:
        names.add("groups/no_hit_share")
    names |= {"policy_gap/mean", "legal_mass", "ratio/clip_high_share", "ratio/clip_low_share", "time/objective"}
    if objective.gate.kind is not GateKind.NONE:
        names |= {"gate/open", "gate/hard"}
    if objective.gate.asks_negatives:
        names |= {"gate/head", "gate/tail", "gate_fail/timeout"}
    if objective.anchor.is_member:
        names |= {"anchor/weight_mean", "anchor/weight_max", "anchor/effective_size", "anchor/silent_share"}
    if objective.tempering.mode is not TemperingMode.NONE:
        names |= {"tempering/mean", "tempering/confidence"}
    if objective.window.kind is not WindowKind.NONE:
        names |= {"window/mass/0", "window/mass/4", "window/clamped_groups"}
    if objective.truncation.level is not TruncationLevel.NONE:
        names |= {"truncation/mean", "truncation/limited_share"}
    if job.group.refill is not Refill.NONE:
        names |= {"refill/dropped_groups", "refill/extra_prompts", "refill/missing_groups"}
    return names


def test_headers_say_what_to_run_before() -> None:
    for name in recipe_names():
        job = load_job(name)
        header = recipe_header(recipe_path(name))
        if isinstance(job, RlJob) and job.init.endswith("runs/demo/sft") and name != "demo-rl":
            assert "`windlass demo`" in header
        simulated = "`windlass data simulate" in header
        if isinstance(job, PolicyJobSettings) and job.feedback is not None:
            assert simulated or f"`windlass replay {name}`" in header
        else:
            assert not simulated
