"""Contract: a job runs across three hosts that share a file system and a wire, and nothing else. When a host of engines
is cut off, the job goes on; when the learner's host is cut off, the job waits for it and goes on from its manifest when
it is back. The weights are those of the same job on one machine, to the bit.

Hosts are network namespaces with addresses of their own (`make test-cluster`; needs root), Ray nodes with token
authentication, weights by gloo over the wire. Not checked here: GPUs, real switches, hosts with clocks of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.launch.network import RayHosts, lacking, ray_hosts, wait_until
from tests.requirements import require
from tests.small_world import read_steps, recipe, windlass, write_dataset, write_recipe
from trainer.run_status import STATUS

pytestmark = pytest.mark.long
STEPS = 60
HEAD, ENGINES, LEARNER = 0, 1, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and the run of one machine."""
    for part in ("vllm", "deepspeed", "ray"):
        require(part)
    if lacking():
        pytest.skip(lacking())
    folder = tmp_path_factory.mktemp("network")
    dataset = write_dataset(folder / "source")
    content = recipe(
        dataset.path,
        "rl",
        limits={"max_steps": STEPS},
        rollout={"engines": 2, "deadline_s": 40.0, "start_deadline_s": 120.0},
        learner={"timeout_s": 60.0},
        weights={"mover": "gloo", "deadline_s": 40.0},
        checkpoints={"interval": 5, "last": 2},
    )
    write_recipe(folder / "job.yaml", content)
    whole = windlass("train", "job.yaml", "--run-dir", "runs/whole", cwd=folder)
    assert whole.returncode == 0, whole.stderr
    return folder


@pytest.fixture
def cluster() -> Iterator[RayHosts]:
    """Three hosts: the head with room for an engine, one for another engine, one for the learner."""
    with ray_hosts(3) as made:
        # One CPU each, so that one engine is on the head and the other on the second host.
        made.start(HEAD, cpus=1, marks={"engines": 1})
        await_node(made, HEAD)
        made.start(ENGINES, cpus=1, marks={"engines": 1})
        made.start(LEARNER, cpus=1, marks={"learners": 1})
        for number in (ENGINES, LEARNER):
            await_node(made, number)
        yield made


def await_node(hosts: RayHosts, number: int) -> None:
    log = hosts.folder / f"node-{number}.log"
    wait_until(lambda: "Ray runtime started" in log.read_text(), log.name, seconds=150, told=hosts.told)


def step_of(run: Path) -> int:
    return int(json.loads((run / STATUS).read_text())["step"]) if (run / STATUS).is_file() else -1


def rows_of(run: Path) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in json.loads((run / STATUS).read_text())["engines"]}


def test_hosts_are_cut_off_and_come_back(world: Path, cluster: RayHosts) -> None:
    run, log = world / "runs" / "cluster", cluster.folder / "job.log"
    words = ["--cluster.engine_node", "engines", "--cluster.learner_node", "learners"]
    words += ["--cluster.preflight_deadline_s", "240", "--cluster.learner_restarts", "3"]
    job = cluster.machines[HEAD].start(
        str(Path(sys.executable).parent / "windlass"),
        *("train", str(world / "job.yaml"), "--run-dir", str(run), "--cluster.address", cluster.address, *words),
        log=log,
        **cluster.variables,
    )

    def told() -> str:
        return f"{log.read_text()[-3000:]}\n{cluster.told()}"

    def reached(step: int, seconds: float) -> None:
        def there() -> bool:
            assert job.poll() is None, told()
            return step_of(run) >= step

        wait_until(there, f"step {step}", seconds=seconds, told=told)

    reached(3, 240)
    assert len(rows_of(run)) == 2

    cluster.machines[ENGINES].cut_off()
    before = step_of(run)
    reached(before + 8, 300)
    assert read_steps(run)[-1]["system/engines_healthy"] == 1
    assert read_steps(run)[-1]["system/engine_restarts"] >= 1

    cluster.machines[LEARNER].cut_off()
    wait_until(lambda: "restart_learners" in log.read_text(), "the learner's loss", seconds=200, told=told)
    assert job.poll() is None, told()
    # The hosts come back as hosts that were switched off do: with a fresh node.
    for number, mark in ((ENGINES, "engines"), (LEARNER, "learners")):
        cluster.machines[number].kill_all()
        cluster.machines[number].reconnect()
        cluster.start(number, cpus=1, marks={mark: 1})
    assert job.wait(timeout=400) == 0, told()

    assert "continuing from" in log.read_text()
    ours, theirs = (load_file(each / f"checkpoints/step-{STEPS:06d}/hf/model.safetensors") for each in pair(world))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].tobytes() == theirs[name].tobytes(), name
    assert [step["step"] for step in read_steps(run)] == list(range(STEPS + 1))
    for step in read_steps(run)[1:]:
        assert step["weight_version"] == step["weight_version/oldest"] == step["step"] - 1


def pair(world: Path) -> tuple[Path, Path]:
    return world / "runs" / "cluster", world / "runs" / "whole"


def test_what_is_missing_is_told_within_the_deadline(world: Path, cluster: RayHosts) -> None:
    log = cluster.folder / "job.log"
    words = ["--cluster.learner_node", "nowhere", "--cluster.preflight_deadline_s", "3"]
    job = cluster.machines[HEAD].start(
        str(Path(sys.executable).parent / "windlass"),
        *("train", str(world / "job.yaml"), "--run-dir", str(world / "runs" / "none")),
        *("--cluster.address", cluster.address, *words),
        log=log,
        **cluster.variables,
    )
    try:
        assert job.wait(timeout=120) == 2, log.read_text()
    except subprocess.TimeoutExpired:
        pytest.fail(log.read_text())
    last = log.read_text().strip().splitlines()[-1]
    assert "learner.ranks: room for 0 of 1; legal: a node with the Ray resource 'nowhere'" in last
