"""Contract: `windlass bench orchestrator` keeps the real loop, fleet, records and object store at work over simulated
engines and says truly how busy they were; `windlass bench scale` times whole steps of real engines and ranks, also on a
Ray cluster of two nodes. Both answer by their schema and check what they timed.

Not checked here: the figures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import torch

from data.errors import RequestError
from launch.bench.orchestrator import OrchestratorBench, orchestrator_command
from launch.bench.scale import ScaleBench, scale_bench_command
from launch.bench.simulated_engines import EngineHost
from launch.provenance import ROOT
from tests.requirements import require


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def checked(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    schema = json.loads((ROOT / "docs" / "schemas" / f"bench-{name}.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(json.loads(json.dumps(answer, default=str)))
    return answer


def test_the_loop_over_simulated_engines() -> None:
    require("ray")
    settings = OrchestratorBench(
        model="tiny", engines="2,5", latency_s=0.3, shards_per_engine=3, prompts=8, group=4, prompt_len=30, steps=2,
        threads=1, object_store_mib=100,
    )  # fmt: skip
    answer = checked("orchestrator", orchestrator_command(settings))
    assert answer["checked"]
    assert [run["engines"] for run in answer["runs"]] == [2, 5]
    for run in answer["runs"]:
        # Two steps of three rounds, whatever the machine adds to them; an engine with a shard ahead works on one.
        assert run["seconds"] >= 2 * 3 * 0.3
        assert 0.1 < run["busy_share"] <= 1.01
        assert run["busy_share"] * run["seconds"] >= 0.95 * 2 * 3 * 0.3 - 0.31, "what was done is counted"


def test_busy_seconds_are_those_between_two_times() -> None:
    host = EngineHost.__new__(EngineHost)
    host._worked = [(0.0, 2.0), (1.0, 5.0), (8.0, 9.0)]
    import asyncio

    assert asyncio.run(host.busy_seconds(1.5, 4.0)) == pytest.approx(0.5 + 2.5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"engines": "1,2,3"}, "--learners: 1,2; legal: as many numbers as --engines, 3"),
        ({"engines": "1,x"}, "--engines: 1,x; legal: comma-separated numbers"),
        ({"engines": "1,3"}, "--prompts: 16; legal: a multiple of every number of engines, also of 3"),
        ({"learners": "0,1"}, "--learners: 0,1; legal: numbers from 1"),
    ],
)
def test_wrong_numbers(change: dict[str, str], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        ScaleBench(**change).pairs()  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="--engines: a"):
        OrchestratorBench(engines="a").counts()


@pytest.mark.long
def test_steps_on_two_local_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("vllm", "deepspeed", "ray"):
        require(part)
    from ray.cluster_utils import Cluster

    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 2**27}
    )
    try:
        nodes.add_node(num_cpus=2, object_store_memory=2**27)
        # The packages of a node are those of this checkout, whose digest the check compares.
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        settings = ScaleBench(
            model="tiny", prompts=4, prompt_len=20, group=4, dtype="float32", repeats=2, engines="1,2", learners="1,2"
        )
        answer = checked("scale", scale_bench_command(settings))
    finally:
        nodes.shutdown()
        os.environ.pop("RAY_ADDRESS", None)
    assert answer["checked"]
    assert [(run["engines"], run["learners"]) for run in answer["runs"]] == [(1, 1), (2, 2)]
    for run in answer["runs"]:
        assert run["push_s"] > 0
        assert run["policy_gap"] < 1e-4
    assert answer["runs"][0]["efficiency"] == 1.0
