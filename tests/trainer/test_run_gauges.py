"""Contract: the metrics of a step become the Prometheus metrics that `METRICS` lists, under the names that Ray offers
them, and the Grafana dashboard shows each of them and no other; counters only rise.

The scrape is one of a real Ray node's agent (long). Not checked: Prometheus and Grafana themselves.
"""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from launch.provenance import ROOT
from rollout.fleet_health import FleetHealth
from tests.requirements import require
from trainer.run_gauges import METRICS, Kind, RunGauges, Sample, counts, rates, samples

STEP: dict[str, Any] = {
    "time/step": 4.0,
    "time/score": 1.0,
    "time/update": 1.0,
    "time/ahead/rollout": 3.0,
    "tokens/prompt": 300.0,
    "tokens/completion": 100.0,
    "staleness/groups_0": 2.0,
    "staleness/groups_1": 3.0,
    "staleness/dropped/stale": 1.0,
    "queue/batches_waiting": 1.0,
    "system/shards_waiting": 5.0,
    "policy_gap/mean": 1e-6,
    "reward/mean": 0.5,
    "loss": None,
    "system/learner_restarts": 2.0,
}


def suffix(name: str) -> str:
    return {Kind.COUNTER: "_total", Kind.HISTOGRAM: "_bucket", Kind.GAUGE: ""}[METRICS[name].kind]


def test_rates_of_a_step() -> None:
    assert rates(STEP) == {"perf/busy/learners": 0.5, "perf/busy/fleet": 0.75, "perf/tokens_per_s": 100.0}
    assert rates({}) == {}


def test_samples_of_a_step() -> None:
    found = samples(7, STEP | rates(STEP))
    assert Sample(name="windlass_step", value=7.0) in found
    assert Sample(name="windlass_learner_restarts", value=2.0) in found
    assert Sample(name="windlass_phase_seconds", value=3.0, tags=(("phase", "ahead/rollout"),)) in found
    assert Sample(name="windlass_queue_length", value=5.0, tags=(("queue", "shards"),)) in found
    assert sorted(one.value for one in found if one.name == "windlass_staleness") == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert not [one for one in found if one.name == "windlass_loss"], "a loss that is not finite is no number"
    assert counts(STEP, None, 0) == [Sample(name="windlass_groups_dropped", value=1.0, tags=(("reason", "stale"),))]
    for sample in found:
        assert [tag for tag, _ in sample.tags] == list(METRICS[sample.name].tags)


class Notes:
    """A fake of one of Ray's metrics: the last value by phase."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.last[tags.get("phase", "")] = value


def test_the_version_is_that_of_the_fleet() -> None:
    """Not that of the groups, which are older: by one, and by max_staleness."""
    require("ray")
    gauges, notes = RunGauges("mine"), Notes()
    gauges._metrics["windlass_weight_version"] = notes
    fleet: Any = SimpleNamespace(health=FleetHealth(start_deadline_s=1), losses=Counter())
    gauges.record(7, {"weight_version": 5}, fleet, 0)
    assert notes.last == {}, "no push so far"
    fleet.health.pushed({}, 7, 0.0)
    gauges.record(7, {"weight_version": 5}, fleet, 0)
    assert notes.last == {"": 7.0}


def test_a_phase_that_a_step_did_not_have_took_no_time() -> None:
    require("ray")
    gauges, notes = RunGauges("mine"), Notes()
    gauges._metrics["windlass_phase_seconds"] = notes
    for step, phases in enumerate(({"time/update": 2.0, "time/evaluate": 9.0}, {"time/update": 1.0})):
        gauges.record(step, phases, None, 0)
    assert notes.last == {"update": 1.0, "evaluate": 0.0}


def test_the_dashboard_shows_what_there_is() -> None:
    dashboard = json.loads((ROOT / "launch" / "templates" / "grafana.json").read_text())
    words = json.dumps(dashboard["panels"])
    shown = set(re.findall(r"ray_(windlass_\w+)", words))
    assert shown == {name + suffix(name) for name in METRICS}
    # And the labels by which it tells lines apart.
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    serves_own = [target for target in targets if "ray_serve_" in target["expr"]]
    assert [target["expr"] for target in serves_own] == ["increase(ray_serve_deployment_replica_starts_total[10m])"]
    for target in targets:
        if target not in serves_own:
            (name,) = {each for each in METRICS if re.search(rf"ray_{each}{suffix(each)}\b", target["expr"])}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) == {"run", *METRICS[name].tags}


@pytest.mark.long
def test_a_nodes_agent_offers_them() -> None:
    require("ray")
    import ray

    node = ray.init(address="local", num_cpus=1, include_dashboard=False, configure_logging=False)
    try:
        gauges = RunGauges("mine")
        gauges.record(1, STEP | rates(STEP) | {"loss": 1.0, "push/mib": 2.0}, None, 0)
        url = f"http://{node.address_info['node_ip_address']}:{node.address_info['metrics_export_port']}"
        wanted = {name for name in METRICS if name not in ("windlass_engines", "windlass_engine_restarts")}
        wanted -= {"windlass_engines_lost", "windlass_weight_version"}
        deadline = time.monotonic() + 60
        found: set[str] = set()
        while not found >= {f"ray_{name}{suffix(name)}" for name in wanted}:
            assert time.monotonic() < deadline, sorted({f"ray_{name}{suffix(name)}" for name in wanted} - found)
            time.sleep(1)
            text = urllib.request.urlopen(url, timeout=10).read().decode()
            found = {line.partition("{")[0] for line in text.splitlines() if 'run="mine"' in line}
    finally:
        ray.shutdown()
