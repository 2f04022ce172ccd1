"""`windlass smoke`: the whole loop on real processes in about a minute, to see that an installation works.

MovieLens-100K is imported, a few supervised steps are taken on two learner ranks, then three steps of reinforcement
learning with rollouts by vLLM and rewards by Ray Serve, and the result is evaluated. The figures mean nothing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from data.errors import RunError
from launch.demo import Plan, run_demo

FEW = ("--evaluation.rows", "32", "--evaluation.test-rows", "64", "--evaluation.test-unconstrained-rows", "16")
OVERRIDES = {
    "*": (*FEW, "--evaluation.every", "0", "--checkpoints.interval", "10"),
    "sasrec": ("--limits.max_steps", "30", "--evaluation.rows", "100"),
    "sft": ("--limits.max_steps", "20", "--learner.warmup_steps", "5"),
    "rl": ("--limits.max_steps", "3", "--batch_prompts", "32", "--rollout.shard_size", "16"),
}


def smoke_command(run_dir: Path | None = None) -> int:
    """Run the whole loop once, small.

    Args:
        run_dir: folder to keep; none uses a temporary one.
    """
    if run_dir is not None:
        smoke(run_dir)
        return 0
    with tempfile.TemporaryDirectory(prefix="windlass-smoke-") as folder:
        smoke(Path(folder))
        print("smoke: the folder was temporary; --run-dir DIR keeps one")
    return 0


def smoke(run_dir: Path) -> None:
    """Run the loop in a folder and check what must hold in a sound installation.

    Raises:
        RunError: engine and learner disagree, an output was no item, or the reward service was not asked.
    """
    plan = Plan(
        run_dir=run_dir,
        dataset=run_dir / "dataset",
        stages=("sasrec", "sft", "rl"),
        overrides=OVERRIDES,
        command=("smoke",),
    )
    summary = run_demo(plan)
    if summary["interrupted"]:
        return
    problems = []
    if any(summary["stages"][stage]["violations"] for stage in ("sft", "rl")):
        problems.append("outputs violate the constraint")
    if summary["reward"]["requests"] < 1:
        problems.append("the reward service was never asked")
    if summary["weight_versions"] != [0, 1, 2]:
        problems.append(f"rollouts came from the weight versions {summary['weight_versions']} and not from 0, 1, 2")
    if problems:
        raise RunError("smoke: " + "; ".join(problems))
    print(f"smoke: sound; policy gap {summary['policy_gap']['mean']:.1e}")
