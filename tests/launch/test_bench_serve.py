"""Contract: `windlass bench serve` with the real service (Ray Serve, vLLM): answers by its schema and by that of all
benchmarks, takes the service down and back up under load, and finds every answered request in the log.

Not checked: its figures. What the service promises is in tests/launch/serving.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from data.errors import RequestError
from launch.bench.serve import Load, ServeBench
from launch.bench.settings import Device
from launch.provenance import ROOT
from tests.requirements import require
from tests.small_world import windlass


def schema(name: str) -> Any:
    return json.loads((ROOT / "docs" / "schemas" / f"{name}.schema.json").read_text())


@pytest.mark.long
def test_a_small_load(tmp_path: Path) -> None:
    require("vllm")
    require("ray")
    done = windlass(
        *("bench", "serve", "--model", "tiny", "--prompt-len", "31", "--dtype", "float32", "--threads", "1"),
        *("--clients", "4", "--requests", "40", "--items", "2", "--repeats", "2", "--json", "-"),
        cwd=tmp_path,
        WINDLASS_PACKAGE_DIGEST="unchecked",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout)
    jsonschema.validate(answer, schema("bench"))
    jsonschema.validate(answer, schema("bench-serve"))
    assert answer["checked"]
    assert (answer["lost"], answer["refused"]) == (0, 0)
    assert answer["killed"]["refused"] > 0
    # Two warm-ups of 16 and 4, two repetitions of two ways, and the storm around the kill.
    assert answer["answered"] == 20 + 4 * 40 + answer["killed"]["answered"]
    assert answer["work"]["requests_per_call"] > 1


def test_only_a_cpu_serves_here() -> None:
    with pytest.raises(RequestError, match="--device: cuda; legal: cpu"):
        ServeBench(device=Device.CUDA).check_device(Device.CPU)


class Clients:
    """Answers in place of the clients' process."""

    def __init__(self) -> None:
        self.loads: list[tuple[int, int]] = []

    def call(self, name: str, *arguments: Any) -> Any:
        done = float(len(self.loads))
        if name == "counters":
            return {"requests": 12 * done, "calls": 3 * done, "engine_s": done, "disk_s": 0.5 * done}
        self.loads.append(arguments)
        number, count = len(self.loads), arguments[1]
        ids = [f"{number}-{row}" for row in range(count)]
        latency_s = [0.001 * (row + 1) for row in range(count)]
        return {"ids": ids, "latency_s": latency_s, "at_s": latency_s, "refused": 1, "seconds": 2.0}


def test_figures_are_of_the_measured_repetitions_alone() -> None:
    child = Clients()
    load = Load(child, ServeBench(requests=99, clients=4))  # type: ignore[arg-type]
    way = load.way(4, 2)
    assert way.warm_up is not None
    way.warm_up()
    assert [way.time(), way.time()] == [2.0, 2.0]
    assert child.loads == [(4, 16), (4, 99), (4, 99)]
    assert (len(load.answered), load.refused) == (16 + 99 + 99, 3)
    assert load.latency_ms(4) == pytest.approx({"p50": 50, "p95": 94, "p99": 98}, abs=0.5)
    assert load.work(4) == pytest.approx({"requests_per_call": 4, "engine_share": 0.5, "disk_share": 0.25})
