"""Contract: a command submitted with `--to ray` runs on a real Ray cluster with token authentication, from nothing but
the shipped folder; its output and exit code come back; a stop ends it with a checkpoint; a secret stays a name.

A real head of one node with the Jobs API. Not checked here: several nodes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.provenance import PACKAGES, ROOT
from tests.launch.submission.ray_head import ray_head
from tests.requirements import require
from tests.small_world import recipe, write_dataset, write_recipe

pytestmark = pytest.mark.long
SECRET = "not-to-be-seen-anywhere"


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    for part in ("ray", "vllm", "deepspeed"):
        require(part)
    with ray_head(WINDLASS_TEST_TOKEN=SECRET) as access:
        yield access


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages with a digest of its own, a recipe, and nothing that git knows."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data" / "errors.py").open("a").write("\n# A copy, to be told from the installed package.\n")
    (folder / ".env").write_text(f"TOKEN={SECRET}")
    dataset = write_dataset(tmp_path_factory.mktemp("shared"))
    write_recipe(folder / "job.yaml", recipe(dataset.path, "sft", batch_rows=8, limits={"max_steps": 2}))
    return folder


def submit(head: dict[str, str], folder: Path, options: list[str], words: list[str]) -> subprocess.Popen[str]:
    """Run `windlass submit --to ray` of the installed packages in a folder."""
    windlass = str(Path(sys.executable).parent / "windlass")
    to_ray = ["submit", "--to", "ray", "--address", head["DASHBOARD"], "--python", sys.executable]
    return subprocess.Popen(
        [windlass, *to_ray, *options, "--", *words],
        cwd=folder,
        env={**os.environ, **head},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_job_of_shipped_packages_alone(head: dict[str, str], checkout: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = submit(head, checkout, ["--secret", "WINDLASS_TEST_TOKEN"], ["train", "job.yaml", "--run-dir", str(run)])
    told, _ = process.communicate(timeout=400)
    assert process.returncode == 0, told
    assert "left out, as it looks like a secret: .env" in told
    assert f"{run}: " in told, "the output of the job is shown"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["interrupted"] is False
    # Neither the driver nor any worker took the installed packages: their digest is another.
    (entry,) = json.loads((run / "environment.json").read_text())
    from launch.provenance import package_digest

    assert entry["package_digest"] != package_digest()
    assert not [path for path in run.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert SECRET not in told
    assert not list(run.glob(".node-check-*"))


def test_a_stop_ends_with_a_checkpoint(head: dict[str, str], checkout: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", "job.yaml", "--run-dir", str(run), "--limits.max_steps", "100000"]
    process = submit(head, checkout, [], words)
    deadline = time.monotonic() + 200
    while not list(run.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert json.loads((run / "summary.json").read_text())["interrupted"] is True


def test_failures_come_back(head: dict[str, str], checkout: Path, tmp_path: Path) -> None:
    process = submit(head, checkout, ["--secret", "WINDLASS_ABSENT"], ["doctor"])
    told, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "WINDLASS_ABSENT: is not set on this node" in told
    process = submit(head, checkout, [], ["eval", str(tmp_path / "none"), "--data", str(tmp_path / "none")])
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 2, told
    assert "windlass: " in told


def test_a_cluster_without_tokens_is_refused() -> None:
    require("ray")
    script = (
        "from data.errors import RequestError\nfrom launch.cluster import cluster\n"
        "from trainer.run_settings import ClusterSettings\n"
        "for open_too in (False, True):\n"
        "    try:\n        with cluster(ClusterSettings(unauthenticated=open_too)):\n            print('joined')\n"
        "    except RequestError as error:\n        print(error)\n"
    )
    with ray_head(RAY_AUTH_MODE="disabled") as access:
        environment = {**os.environ, **access, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": access["GCS"]}
        command = [sys.executable, "-P", "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    refused, joined = [line for line in done.stdout.splitlines() if line.startswith(("cluster.address", "joined"))]
    assert "which takes calls without a token" in refused, done.stderr
    assert joined == "joined"
