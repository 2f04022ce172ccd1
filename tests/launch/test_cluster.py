"""Contract: workers import our packages although the user's folder holds its own `data/` and `trainer.py`, can import
the user's other modules, and refuse to start when their packages differ from the driver's.

Not checked here: several machines.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.errors import RequestError, RunError
from launch.cluster import (
    UNCHECKED,
    check_packages,
    check_shared_memory,
    cluster,
    forget_serve,
    full_store_named,
    runtime_environment,
    start_ray,
)
from launch.provenance import ROOT, package_digest
from tests.requirements import require
from trainer.run_settings import ClusterSettings

SCRIPT = """
import sys
import ray
from launch.cluster import DIGEST_VARIABLE, cluster
from launch.user_path import append_user_path
from trainer.run_settings import ClusterSettings

@ray.remote(num_cpus=0)
def look():
    import data, trainer.jobs, own_ranker
    return data.__file__, trainer.__file__, own_ranker.NAME

if __name__ == "__main__":
    with cluster(ClusterSettings(object_store_mib=100), environment=dict([a.split("=") for a in sys.argv[1:]])):
        print(*ray.get(look.remote()))
"""


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """A folder with modules named like ours, and one of the user's own."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise ImportError('the data of the user')")
    (tmp_path / "trainer.py").write_text("raise ImportError('the trainer of the user')")
    (tmp_path / "own_ranker.py").write_text("NAME = 'mine'")
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "start.py").write_text(SCRIPT)
    return tmp_path


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script in the user's folder."""
    return subprocess.run(
        [sys.executable, str(folder / "scripts" / "start.py"), *arguments],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_workers_take_our_packages_and_the_users_modules(user_folder: Path) -> None:
    require("ray")
    # Unchecked: this test is about paths, and somebody may be editing the packages meanwhile.
    done = start(user_folder, WINDLASS_PACKAGE_DIGEST=UNCHECKED)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(ROOT / "data/__init__.py"), str(ROOT / "trainer/__init__.py"), "mine"]


@pytest.mark.long
def test_a_worker_with_other_packages_refuses_to_start(user_folder: Path) -> None:
    require("ray")
    done = start(user_folder, "WINDLASS_PACKAGE_DIGEST=0123")
    assert done.returncode == 1
    assert "a Ray worker refused to start" in done.stderr


def test_the_digest_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_PACKAGE_DIGEST", package_digest())
    check_packages()
    monkeypatch.setenv("WINDLASS_PACKAGE_DIGEST", "0" * 64)
    with pytest.raises(RunError, match="install the same version on every node"):
        check_packages()


def test_faults_reach_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_FAULT", "push:2")
    monkeypatch.delenv("WINDLASS_PACKAGE_DIGEST", raising=False)
    variables = runtime_environment({"EXTRA": "1"})["env_vars"]
    assert variables["WINDLASS_FAULT"] == "push:2"
    assert variables["EXTRA"] == "1"
    assert variables["WINDLASS_PACKAGE_DIGEST"] == package_digest()


def test_an_object_store_that_is_too_large_or_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require("ray")
    from ray.exceptions import ObjectStoreFullError

    with pytest.raises(RequestError, match=r"cluster\.object_store_mib: 999999999; legal: at most \d+"):
        check_shared_memory(999_999_999, tmp_path)
    check_shared_memory(1, tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    told = r"object store of 100 MiB \(cluster\.object_store_mib\) is full: .*what was finished before stays"
    with pytest.raises(RunError, match=told), full_store_named(ClusterSettings(object_store_mib=100)):
        raise ObjectStoreFullError("no room for 5 bytes")
    joined = ClusterSettings(address="head:6379")
    with pytest.raises(RunError, match="object store of the cluster is full"), full_store_named(joined):
        raise ObjectStoreFullError("no room")


def test_ray_is_started_again_when_the_machine_was_too_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    require("ray")
    words = ["The current node timed out during startup. This", "another trouble"]
    calls: list[str] = []

    def init(**arguments: object) -> None:
        calls.append("init")
        if words:
            raise Exception(words.pop(0))  # as Ray does

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: calls.append("shutdown"))
    with pytest.raises(Exception, match="another trouble"):
        start_ray({})
    assert calls == ["init", "shutdown", "init"]
    start_ray({})
    words += ["timed out during startup"] * 3
    with pytest.raises(Exception, match="timed out"):
        start_ray({})
    assert calls.count("init") == 6


def test_a_cluster_that_takes_calls_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for Ray; with a real cluster: tests/launch/submission/test_ray_job.py."""
    require("ray")
    done: list[object] = []
    monkeypatch.setattr("launch.cluster.check_address", done.append)
    monkeypatch.setattr("launch.cluster.start_ray", done.append)
    monkeypatch.setattr("launch.cluster.check_nodes", done.append)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("launch.cluster._try_a_worker", lambda: False)
    told = r"cluster\.address: head:6379, which takes calls without a token; legal: .* or cluster\.unauthenticated true"
    with pytest.raises(RequestError, match=told), cluster(ClusterSettings(address="head:6379")):
        raise AssertionError("a run began there")
    assert len(done) == 2, "no node was asked for anything"
    with cluster(ClusterSettings(address="head:6379", unauthenticated=True)):
        assert len(done) == 5
    monkeypatch.setattr("launch.cluster._try_a_worker", lambda: True)
    with cluster(ClusterSettings(address="head:6379")):
        assert len(done) == 8


def test_the_next_cluster_of_this_process_looks_for_serve_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve knows its controller by the job's number, which every local cluster begins with. With real ones, in the
    same process: the jobs of this folder and tests/reward/test_service.py."""
    require("ray")
    from ray.serve import context

    monkeypatch.setattr(context, "_global_client", object())
    forget_serve()
    assert context._global_client is None
