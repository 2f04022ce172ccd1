"""Contract: whatever is killed or stopped while a job runs (engines, learners, reward replicas, Ray's idle workers, the
driver), the job goes on, no step is lost or taken twice, no group comes from stale weights, and the final weights and
metrics equal those of the undisturbed run bit for bit.

Synchronous rollouts on CPU. A seeded sample of five strikes runs in `make test`, 100 in `make test-long`
(WINDLASS_CHAOS tells how many). Not checked here: hosts that are cut off (test_network.py).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.launch.chaos import Chaos, Victim
from tests.requirements import require
from tests.small_world import read_steps, recipe, windlass, write_dataset, write_recipe
from trainer.run_log import reproducible

RANKER = """import numpy as np


class PlainRanker:
    def score(self, histories, candidates):
        last = [int(history[-1]) if len(history) else -1 for history in histories]
        return [(1000 * base + wanted).astype(np.float32) for base, wanted in zip(last, candidates, strict=True)]
"""
"""A ranker as a user brings it: a module in the folder of the job."""


def world(folder: Path, steps: int, **sections: object) -> Path:
    """A folder with a recipe and the undisturbed run `runs/whole`."""
    for part in ("vllm", "deepspeed", "ray"):
        require(part)
    dataset = write_dataset(folder / "source")
    patient = {"engine_restarts": 10_000, "learner_restarts": 10_000}
    content = recipe(
        dataset.path,
        "rl",
        limits={"max_steps": steps},
        cluster=patient,
        # Who is stopped for good is noticed soon; with four shards a step the engine has one ahead when it is struck.
        rollout={"deadline_s": 8.0, "start_deadline_s": 120.0, "shard_size": 2},
        # The small rate keeps the policy from collapsing on the ranker's favourites in hundreds of steps.
        learner={"timeout_s": 60.0, "lr": 1e-4},
        weights={"deadline_s": 15.0, "probe_deadline_s": 15.0},
        checkpoints={"interval": 1, "last": 2},
        evaluation={"rows": 4},
        **sections,  # type: ignore[arg-type]
    )
    write_recipe(folder / "job.yaml", content)
    done = windlass("train", "job.yaml", "--run-dir", "runs/whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def assert_undisturbed(folder: Path, chaos: Chaos, steps: int) -> None:
    """Equal to the undisturbed run, every step once, every group from the weights of the step before."""
    whole = folder / "runs" / "whole"
    last = f"checkpoints/step-{steps:06d}/hf/model.safetensors"
    ours, theirs = load_file(chaos.run / last), load_file(whole / last)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].tobytes() == theirs[name].tobytes(), name
    lines = read_steps(chaos.run)
    assert [line["step"] for line in lines] == list(range(steps + 1))
    for line in lines[1:]:
        assert line["weight_version"] == line["weight_version/oldest"] == line["step"] - 1
    assert [reproducible(line) for line in lines] == [reproducible(line) for line in read_steps(whole)]


def test_five_strikes(tmp_path: Path) -> None:
    steps = 16
    folder = world(tmp_path, steps)
    parts = (Victim.ENGINE, Victim.LEARNER, Victim.WORKER, Victim.DRIVER)
    chaos = Chaos(folder, folder / "runs" / "struck", 5, parts, first=Victim.DRIVER)
    chaos.go(5)
    assert chaos.strikes.total() == 5
    assert_undisturbed(folder, chaos, steps)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_hundred_strikes(tmp_path: Path) -> None:
    count = int(os.environ.get("WINDLASS_CHAOS", "100"))
    steps = 6 * count
    # A replica that is gone is asked again until Serve has another one: a failed reward would be another run.
    (tmp_path / "plain_ranker.py").write_text(RANKER)
    ranker = {"ranker": "plain_ranker:PlainRanker", "ranker_score": 0.001, "replicas": 2}
    ranker |= {"retries": 10, "deadline_s": 10.0, "max_failed_share": 0.0}
    folder = world(tmp_path, steps, reward=ranker)
    chaos = Chaos(folder, folder / "runs" / "struck", 11, tuple(Victim))
    chaos.go(count)
    (folder / "strikes.log").write_text("\n".join([*chaos.log, str(dict(chaos.strikes))]))
    assert chaos.strikes.total() == count
    assert_undisturbed(folder, chaos, steps)
