"""Contract: a node that lacks the run directory, has another folder there, cannot write it, or has other libraries or
another clock is named in one line; nodes that fit pass.

The judgement on made-up nodes, and the look at this machine. The task on every node of a real cluster is part of
tests/launch/submission.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from data.errors import RequestError, RunError
from launch.node_check import NodeFacts, judge, look

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
