"""Contract: a node that lacks the run directory, has another folder there, cannot write it, or has other libraries or
another clock, or cannot run our packages, is named in one line; nodes that fit pass.

The judgement on made-up nodes, and the look at this machine. The task on every node of a real cluster is part of
tests/launch/submission.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.errors import RequestError, RunError
from launch.node_check import NodeFacts, check_nodes, judge, look
from tests.requirements import require

HERE = NodeFacts(host="driver", time=1000.0, libraries={"torch": "2", "ray": "1"}, folders={})


def check(**changes: object) -> None:
    node = dataclasses.replace(HERE, **{"host": "other", "folders": {"/run": ""}, **changes})  # type: ignore[arg-type]
    judge({"10.0.0.7": node}, here=HERE, asked_at=900.0)


def test_nodes_that_fit() -> None:
    check()
    check(time=900.0)
    check(time=845.0)


def test_nodes_that_do_not() -> None:
    with pytest.raises(RequestError, match=r"/run: does not exist on node 10\.0\.0\.7 \(other\)"):
        check(folders={"/run": "does not exist"})
    with pytest.raises(RunError, match=r"has torch 3, the driver has 2"):
        check(libraries={"torch": "3", "ray": "1"})
    with pytest.raises(RunError, match=r"has ray not installed, the driver has 1"):
        check(libraries={"torch": "2"})
    with pytest.raises(RunError, match=r"is \+61 s off"):
        check(time=1061.0)
    with pytest.raises(RunError, match=r"is -70 s off"):
        check(time=830.0)


def test_a_look_at_folders(tmp_path: Path) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    for folder in (right, wrong):
        folder.mkdir()
        (folder / "marker").write_text("mine")
    found = look({str(right / "marker"): "mine", str(wrong / "marker"): "yours", str(tmp_path / "no" / "marker"): "a"})
    assert found.folders == {
        str(right): "",
        str(wrong): "is another folder than the driver's",
        str(tmp_path / "no"): "does not exist",
    }
    assert sorted(path.name for path in right.iterdir()) == ["marker"]
    assert found.libraries["torch"]


def test_a_node_without_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for Ray: what its worker says on such a node, whose tasks cannot begin."""
    require("ray")
    import ray
    from ray.exceptions import RayTaskError, WorkerCrashedError

    def asked(error: Exception) -> str:
        def get(call: object) -> object:
            if call == "b0" * 28:
                raise error
            return HERE

        class Task:
            def options(self, *, scheduling_strategy: Any) -> Any:
                return SimpleNamespace(remote=lambda _: scheduling_strategy.node_id)

        ids = {"a0" * 28: "at-good", "b0" * 28: "at-bare"}
        nodes = [{"NodeID": name, "NodeManagerAddress": place, "Alive": True} for name, place in ids.items()]
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        monkeypatch.setattr(ray, "remote", lambda **_: lambda _: Task())
        monkeypatch.setattr(ray, "wait", lambda calls, **_: (calls, []))
        monkeypatch.setattr(ray, "get", get)
        with pytest.raises(RunError) as caught:
            check_nodes([])
        return str(caught.value)

    crashed = asked(WorkerCrashedError())
    assert crashed.startswith("node at-bare cannot run the windlass of the driver: The worker died unexpectedly")
    assert crashed.endswith("; install the same version, with its dependencies, on every node")
    absent = ModuleNotFoundError("No module named 'xxhash'")
    assert "No module named 'xxhash'" in asked(RayTaskError("look", "long\ntraceback", absent))


def test_a_node_is_checked_once_for_its_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cluster that grows meanwhile: those that came are checked, and nobody else again."""
    require("ray")
    import ray

    ids = ["c0" * 28]
    asked: list[str] = []

    class Task:
        def options(self, *, scheduling_strategy: Any) -> Any:
            asked.append(scheduling_strategy.node_id)
            return SimpleNamespace(remote=lambda _: scheduling_strategy.node_id)

    facts = dataclasses.replace(look({}), folders={})
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": i, "NodeManagerAddress": i, "Alive": True} for i in ids])
    monkeypatch.setattr(ray, "remote", lambda **_: lambda _: Task())
    monkeypatch.setattr(ray, "wait", lambda calls, **_: (calls, []))
    monkeypatch.setattr(ray, "get", lambda _: facts)
    for folders in ([tmp_path], [tmp_path], []):
        check_nodes(folders)
    assert asked == ids * 2, "another folder is another question"
    ids.append("d0" * 28)
    check_nodes([tmp_path])
    assert asked == [ids[0], ids[0], ids[1]]
    assert list(tmp_path.iterdir()) == []
