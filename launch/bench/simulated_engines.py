"""Simulated engines for `windlass bench orchestrator`: real Ray actors and payloads, a fixed latency for a model.

Hundreds of processes would not fit a small machine, so a process hosts many engines, each of which works on one shard
at a time. The fleet sees a handle per engine and cannot tell the difference.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.catalogue import Catalogue
from data.prompt_shard import PromptShard
from data.records import DecodeSpec, Finish, Groups
from rollout.fleet import RolloutFleet
from rollout.fleet_health import EngineState
from rollout.placement import Placement
from rollout.settings import RolloutSettings
from rollout.violations import ViolationCounter

ENGINES_PER_PROCESS = 64
BODIES = 16
"""Different groups of random items that a process answers with."""


class EngineHost:
    """An asynchronous actor with many engines."""

    def __init__(self, latency_s: float, catalogue: Catalogue, seed: int) -> None:
        self._latency_s = latency_s
        self._catalogue = catalogue
        self._random = np.random.default_rng(seed)
        self._bodies: dict[int, list[Groups]] = {}
        self._version = 0
        self._worked: list[tuple[float, float]] = []
        self._at_work: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def generate(
        self, engine_id: str, shard: PromptShard, spec: DecodeSpec, *, exclude: bool | None = None
    ) -> Groups:
        """Groups of random items after the latency, which counts from when the shard is there and the engine free."""
        async with self._at_work[engine_id]:
            begun = time.monotonic()
            version = self._version
            groups = self._groups(shard, spec, engine_id=engine_id, version=version)
            await asyncio.sleep(max(0.0, begun + self._latency_s - time.monotonic()))
            self._worked.append((begun, time.monotonic()))
        return groups

    def _groups(self, shard: PromptShard, spec: DecodeSpec, *, engine_id: str, version: int) -> Groups:
        """Groups out of a few random ones: many engines share a core here, which would be busy with making them."""
        rows = len(shard)
        if rows not in self._bodies:
            self._bodies[rows] = [random_groups(rows, spec, self._catalogue, self._random) for _ in range(BODIES)]
        return dataclasses.replace(
            self._bodies[rows][len(self._worked) % BODIES],
            spec=spec,
            prompt_id_P=shard.prompt_id_P,
            weight_version_P=np.full(rows, version, np.int64),
            engine_id_P=np.full(rows, engine_id),
        )

    async def describe(self) -> dict[str, str]:
        """See `rollout.engine.Engine`."""
        return {"name": "simulated", "version": "0"}

    async def publish(self, version: int) -> None:
        """All engines hold a version from now on."""
        self._version = version

    async def busy_seconds(self, begin: float, end: float) -> float:
        """Seconds that the engines worked between two times of the machine's monotonic clock, added up."""
        return sum(max(0.0, min(end, until) - max(begin, since)) for since, until in self._worked)

    async def forget(self, before: float) -> None:
        """Drop what was done before a time."""
        self._worked = [one for one in self._worked if one[1] >= before]


def random_groups(rows: int, spec: DecodeSpec, catalogue: Catalogue, random: np.random.Generator) -> Groups:
    """Groups as an engine returns them: distinct legal items, with log-probabilities."""
    width = spec.width
    # Distinct within a group: a random start and a stride without common divisor.
    start_P1 = random.integers(0, catalogue.n_items, (rows, 1))
    item_PG = ((start_P1 + np.arange(width)) % catalogue.n_items).astype(np.int32)
    token_PGT, length_PG = catalogue.padded_tokens(item_PG)
    valid_PG = np.ones((rows, width), np.bool_)
    return Groups(
        prompt_id_P=np.zeros(rows, np.int64),
        valid_PG=valid_PG,
        token_PGT=token_PGT,
        length_PG=length_PG,
        item_PG=item_PG,
        logp_PGT=np.where(token_PGT >= 0, -1.0, 0.0).astype(np.float32),
        finish_PG=np.full((rows, width), Finish.ITEM.value),
        weight_version_P=np.zeros(rows, np.int64),
        engine_id_P=np.full(rows, ""),
        spec=spec,
        constraint="item_trie",
        catalogue_digest=catalogue.digest,
    )


@dataclass(frozen=True)
class _Method:
    call: Callable[..., Any]

    def remote(self, *arguments: Any, **named: Any) -> Any:
        return self.call(*arguments, **named)


@dataclass(frozen=True)
class EngineHandle:
    """What the fleet holds of one simulated engine; calls its host."""

    host: Any
    engine_id: str

    @property
    def generate(self) -> _Method:
        """See `rollout.engine.Engine`."""
        return _Method(lambda *a, **n: self.host.generate.remote(self.engine_id, *a, **n))

    @property
    def describe(self) -> _Method:
        """See `rollout.engine.Engine`."""
        return _Method(lambda: self.host.describe.remote())


@dataclass
class SimulatedFleet(RolloutFleet):
    """The real fleet (dispatch, states, records, object store) over simulated engines."""

    hosts: list[Any] = field(default_factory=list)

    @staticmethod
    def of(settings: RolloutSettings, catalogue: Catalogue, latency_s: float) -> SimulatedFleet:
        """Start the hosts and launch every engine."""
        import ray

        fleet = SimulatedFleet(settings, settings_folder(), {}, ViolationCounter(catalogue), Placement())
        actor = ray.remote(EngineHost)
        count = -(-settings.engines // ENGINES_PER_PROCESS)
        shared = ray.put(catalogue)
        fleet.hosts = [
            actor.options(num_cpus=0, max_concurrency=4 * ENGINES_PER_PROCESS).remote(latency_s, shared, seed)
            for seed in range(count)
        ]
        for _ in range(settings.engines):
            engine_id = fleet._next_name()
            fleet.engines[engine_id] = fleet._launch(engine_id)
        fleet._await_start(list(fleet.engines))
        return fleet

    def _launch(self, engine_id: str) -> Any:
        self.health.launched(engine_id, time.monotonic())
        return EngineHandle(self.hosts[int(engine_id.rpartition("-")[2]) // ENGINES_PER_PROCESS], engine_id)

    def publish(self, version: int) -> None:
        """In place of a push: every engine holds the version, and the states know it."""
        import ray

        ray.get([host.publish.remote(version) for host in self.hosts])
        self.verified(self.incarnations(), version)

    def busy_seconds(self, begin: float, end: float) -> float:
        """See `EngineHost.busy_seconds`; over all hosts."""
        import ray

        return float(sum(ray.get([host.busy_seconds.remote(begin, end) for host in self.hosts])))

    def healthy(self) -> int:
        """Engines that may be asked."""
        return len(self.health.named(EngineState.HEALTHY))

    def close(self) -> None:
        """End the hosts."""
        import ray

        for host in self.hosts:
            ray.kill(host)
        self.engines.clear()


def settings_folder() -> Any:
    """No model: simulated engines load none."""
    from pathlib import Path

    return Path("/nonexistent")
