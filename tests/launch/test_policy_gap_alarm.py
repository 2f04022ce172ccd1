"""The alarm: weights that never reach the engine stop the run within a step, even when the push's own checks are off.

`weights.test_blind` switches off both checks of one push, so that only the policy gap can notice. With the checks on:
tests/rollout/test_channel.py. One fault runs in `make test`, the others in `make test-long`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.conftest import Here
from tests.requirements import require
from tests.small_world import read_steps, recipe, write_dataset, write_recipe

FAULTY_VERSION = 1


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose push of version 1 goes wrong unseen."""
    for part in ("vllm", "deepspeed", "ray"):
        require(part)
    folder = tmp_path_factory.mktemp("alarm")
    dataset = write_dataset(folder / "source")
    content = recipe(
        dataset.path,
        "rl",
        # A large step, so that old and new weights differ visibly.
        learner={"lr": 1e-2},
        weights={"test_fault_version": FAULTY_VERSION, "test_blind": True, "bucket_mib": 0.25},
    )
    write_recipe(folder / "job.yaml", content)
    return folder


def assert_the_alarm_stops_the_run(here: Here, world: Path, fault: str) -> None:
    run = world / "runs" / fault
    done = here("train", "job.yaml", "--run-dir", str(run), "--weights.test-fault", fault, cwd=world)
    assert done.returncode == 1, done.stderr
    assert "policy gap of step 2" in done.stderr.splitlines()[-1]
    assert read_steps(run)[-1]["step"] == FAULTY_VERSION
    assert (run / "checkpoints" / f"step-{FAULTY_VERSION:06d}" / "MANIFEST.json").is_file()


def test_a_withheld_head(windlass_here: Here, world: Path) -> None:
    assert_the_alarm_stops_the_run(windlass_here, world, "withhold_head")


@pytest.mark.long
@pytest.mark.parametrize("fault", ["withhold_push", "withhold_bucket"])
def test_other_withheld_weights(windlass_here: Here, world: Path, fault: str) -> None:
    assert_the_alarm_stops_the_run(windlass_here, world, fault)
