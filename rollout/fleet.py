"""The fleet: engines as Ray actors, requests cut into shards, and one answer in the order of the request.

A shard is a fixed run of `shard_size` prompts, handed to whichever engine is free or soon will be. What comes back does
not depend on the engine (see `rollout.decoding`), so neither does the answer: the shard of an engine that dies, raises
or falls silent goes to another one. Who may be asked is decided by `rollout.fleet_health`. Nothing waits for ever.

| waits                    | for                         | unblocked by                                     |
|--------------------------|-----------------------------|--------------------------------------------------|
| a request                | see `rollout.dispatch`; who | its checks, or `weights.deadline_s` and          |
|                          | is up takes what was kept   | `weights.probe_deadline_s` for each engine       |
| `recover`, before a push | who is suspect              | an answer, or `PING_S` and the seconds of a call |
|                          |                             | that it may have had ahead                       |
| `recover`, nobody is up  | the first engine that joins | an answer, or `rollout.start_deadline_s`         |
| nobody                   | an engine that joins        | the first push that finds it up; or, before the  |
|                          |                             | next request, what the last push left (`bring`)  |
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.catalogue import Catalogue
from data.errors import RequestError, RunError
from data.prompt_shard import PromptShard
from data.records import DecodeSpec, FloatArray, Groups, IntArray, Prompt
from rollout.dispatch import Call, Dispatch
from rollout.engine import engine_class, longest_sequence
from rollout.engine_calls import EngineFailure, engine_result
from rollout.fleet_health import EngineState, FleetHealth, LossReason
from rollout.group_decoder import has_exclusions
from rollout.list_violations import ListViolation
from rollout.placement import Placement, strategy
from rollout.settings import EngineKind, RolloutSettings
from rollout.violations import Violation, ViolationCounter

PING_S = 30.0
"""Seconds a suspect engine gets to answer before it counts as dead."""


@dataclass
class RolloutFleet:
    """Engine actors under Ray. Make one with `start`."""

    settings: RolloutSettings
    hf_dir: Path
    engines: dict[str, Any]
    """Actor handles by engine id; their methods are those of `rollout.engine.Engine`."""
    _violations: ViolationCounter
    placement: Placement
    """Where the engines go."""
    violations: Counter[Violation | ListViolation] = field(default_factory=Counter)
    """`constraint.violations`: over all requests so far, by reason; must stay 0."""
    shards: Counter[str] = field(default_factory=Counter)
    """Shards answered, by engine."""
    call_seconds: dict[str, float] = field(default_factory=dict)
    """What the last call took, by engine; not of one that has answered none."""
    losses: Counter[LossReason] = field(default_factory=Counter)
    """Engines lost so far, by reason."""
    health: FleetHealth = field(init=False)
    on_loss: Callable[[EngineFailure], None] | None = None
    """Told of every lost engine while others carry on; may `relaunch` it."""
    bring: Callable[[], None] | None = None
    """Asked before a request while engines are joining: verifies those that came up since the last push."""
    rejoin: Callable[[EngineFailure], None] | None = None
    """Brings lost engines back, verified, when nobody is left to ask; raises when it will not."""
    meanwhile: Callable[[], None] | None = None
    """Called in every request once the engines have work: what may be done until they answer."""
    joining: dict[str, Any] = field(default_factory=dict)
    """Engines that come up while others carry on and have not answered yet → their first answer."""
    asleep: bool = False
    """Whether the engines gave their memory back and wait for a push."""
    most_waiting: int = 0
    """Most shards of a request that waited for an engine since somebody set this to 0."""
    _numbered: int = 0
    """Engines that have had a number so far."""
    _pushed: bool = False
    """Whether a push has taken the place of the weights of `hf_dir`."""

    def __post_init__(self) -> None:
        """Nobody is known yet."""
        self.health = FleetHealth(start_deadline_s=self.settings.start_deadline_s)

    @staticmethod
    def start(
        settings: RolloutSettings,
        hf_dir: Path,
        catalogue: Catalogue,
        *,
        placement: Placement | None = None,
    ) -> RolloutFleet:
        """Start the engines side by side; Ray must be initialised.

        Args:
            settings: the engines.
            hf_dir: folder with model, tokenizer and `catalogue/`, seen by every node.
            catalogue: what returned items are checked against, by independent code.
            placement: where the engines go; by default on any node.

        Raises:
            RequestError: a setting that the model or the cluster cannot meet.
            RunError: there is no room for an engine.
            EngineFailure: an engine did not come up in time.
        """
        longest_sequence(settings, Path(hf_dir))
        _check_resources(settings)
        fleet = RolloutFleet(settings, Path(hf_dir), {}, ViolationCounter(catalogue), placement or Placement())
        try:
            for _ in range(settings.engines):
                engine_id = fleet._next_name()
                fleet.engines[engine_id] = fleet._launch(engine_id)
            fleet._await_start(list(fleet.engines))
        except BaseException:
            fleet.close()
            raise
        return fleet

    def _next_name(self) -> str:
        self._numbered += 1
        return f"{self.settings.engine.value}-{self._numbered - 1}"

    def _launch(self, engine_id: str) -> Any:
        import ray

        self.call_seconds.pop(engine_id, None)
        settings, place = self.settings, self.placement
        room = place.reserve(engine_id, [place.bundle(cpus=1, gpus=settings.gpus)])
        options = {
            "num_cpus": 1,
            "num_gpus": settings.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": settings.process_environment()},
            "scheduling_strategy": strategy(room, place.bundle_of(engine_id)),
        }
        self.health.launched(engine_id, time.monotonic())
        actor = ray.remote(engine_class(settings)).options(**options)
        return actor.remote(settings, self.hf_dir.absolute(), engine_id=engine_id)

    def _await_start(self, engine_ids: Sequence[str]) -> None:
        deadline = time.monotonic() + self.settings.start_deadline_s
        for engine_id in engine_ids:
            ready = self.engines[engine_id].describe.remote()
            engine_result(engine_id, ready, max(0.0, deadline - time.monotonic()), "coming up")
            self.health.answered(engine_id, self.incarnations()[engine_id], time.monotonic())
        if not self._pushed:
            # Until the first push the folder's weights are the fleet's version, and who has loaded them holds it.
            holders = self.health.named(EngineState.HEALTHY, EngineState.STALE)
            self.health.pushed({name: self.incarnations()[name] for name in holders}, 0, time.monotonic())

    def incarnations(self) -> dict[str, int]:
        """How often each engine was launched before; together with the name it tells a process."""
        return {name: engine.incarnation for name, engine in self.health.engines.items()}

    def verified(self, incarnations: dict[str, int], version: int) -> None:
        """A push to these processes became visible after its checks: they may be asked, all others may not."""
        self._pushed, self.asleep = True, False
        self.health.pushed(incarnations, version, time.monotonic())

    def joined(self, engine_id: str, version: int) -> None:
        """What the last push left behind was verified on an engine that came up after it."""
        self.health.joined(engine_id, self.incarnations()[engine_id], version, time.monotonic())

    def generate(self, prompts: Sequence[Prompt], spec: DecodeSpec) -> Groups:
        """Complete every prompt; see `rollout.engine.Engine.generate`.

        Raises:
            RequestError: the prompts or the spec cannot be decoded.
            EngineFailure: an engine died, raised or fell silent.
            RunError: an engine's weights are broken or in transit, or engines hold different versions.
        """
        if not prompts:
            raise RequestError("prompts", "none", "at least one")
        size = self.settings.shard_size
        exclude = has_exclusions(prompts)
        shards = [PromptShard(prompts[start : start + size]) for start in range(0, len(prompts), size)]

        def check(index: int, part: Groups) -> None:
            self.violations.update(self._violations.count(shards[index], part))

        parts = self._dispatch([("generate", (shard, spec), {"exclude": exclude}) for shard in shards], check)
        groups = Groups.concat(parts)
        if len(set(groups.weight_version_P.tolist())) > 1:
            found = sorted(set(groups.weight_version_P.tolist()))
            raise RunError(f"the engines answered with weight versions {found}; one request needs one version")
        return groups

    def score(self, prompts: Sequence[IntArray], completions: Sequence[IntArray]) -> list[FloatArray]:
        """Full-vocabulary log-probabilities of each completion token; see `rollout.engine.Engine.score`."""
        size = self.settings.shard_size
        calls: list[Call] = [
            ("score", (list(prompts[start : start + size]), list(completions[start : start + size])), {})
            for start in range(0, len(prompts), size)
        ]
        return [logp for part in self._dispatch(calls) for logp in part]

    def _dispatch(self, calls: Sequence[Call], check: Callable[[int, Any], None] | None = None) -> list[Any]:
        """Results of the calls, in their order; see `rollout.dispatch`."""
        if self.asleep:
            raise RunError("the engines are asleep until the next push: the learners have their memory")
        if self.joining and self.bring is not None:
            self.bring()
        able = len(self.health.named(EngineState.HEALTHY))
        self.most_waiting = max(self.most_waiting, len(calls) - able)
        return Dispatch(
            calls=calls,
            engines=self.engines,
            health=self.health,
            deadline_s=self.settings.deadline_s,
            shards=self.shards,
            seconds=self.call_seconds,
            blame=self._blame,
            bring_back=self.rejoin,
            meanwhile=self.meanwhile,
            check=check,
        ).run()

    def _blame(self, failure: EngineFailure) -> None:
        """The engine is lost: it gets no work before a verified push."""
        name, incarnation = failure.engine_id, self.incarnations()[failure.engine_id]
        event = self.health.died if failure.reason is LossReason.DIED else self.health.suspected
        event(name, incarnation, failure.reason, time.monotonic())
        self.losses[failure.reason] += 1
        if self.on_loss is not None:
            self.on_loss(failure)

    def sleep(self) -> float:
        """Every engine that is up gives its memory back until the next push; returns seconds, 0 where they sleep.

        Only while no request is under way. An engine that fails is lost, as in a request. Who is suspect is ended: it
        may still compute, and the learners are about to fill its card.
        """
        import ray

        if self.asleep:
            return 0.0
        begun, self.asleep = time.monotonic(), True
        up = self.health.named(EngineState.HEALTHY, EngineState.STALE)
        for name, call in [(name, self.engines[name].fall_asleep.remote()) for name in up]:
            left = begun + self.settings.deadline_s - time.monotonic()
            try:
                engine_result(name, call, max(0.0, left), "falling asleep")
            except EngineFailure as failure:
                self._blame(failure)
        for name in self.health.named(EngineState.SUSPECT):
            ray.kill(self.engines[name])
            engine = self.health.engines[name]
            self.health.died(name, engine.incarnation, engine.reason or LossReason.SILENT, time.monotonic())
        self.health.slept(time.monotonic())
        return time.monotonic() - begun

    def relaunch(self, engine_id: str) -> None:
        """Start a fresh process in the place of an engine that is not to be asked; does not wait for it.

        It joins like a newcomer, so that no push waits for a node that may not come back.
        """
        import ray

        ray.kill(self.engines[engine_id])
        now, incarnation = time.monotonic(), self.incarnations()[engine_id]
        self.health.died(engine_id, incarnation, LossReason.DIED, now)
        self.engines[engine_id] = self._launch(engine_id)
        self.joining[engine_id] = self.engines[engine_id].describe.remote()

    def add(self) -> str:
        """Launch one engine more; does not wait for it. It is asked after the first push that finds it up.

        Only while no request is under way.

        Raises:
            RunError: there is no room for it.
        """
        engine_id = self._next_name()
        engine = self._launch(engine_id)
        self.engines[engine_id] = engine
        self.joining[engine_id] = engine.describe.remote()
        return engine_id

    def remove(self, engine_id: str) -> None:
        """End an engine for good, dead or alive; only while no request is under way."""
        import ray

        ray.kill(self.engines.pop(engine_id))
        self.joining.pop(engine_id, None)
        self.call_seconds.pop(engine_id, None)
        self.health.removed(engine_id)
        self.placement.release(engine_id)

    def take_in(self) -> None:
        """Take in who has joined and is up by now; the others join a later push, or are dead at their deadline."""
        import ray

        for engine_id, ready in list(self.joining.items()):
            if not ray.wait([ready], timeout=0)[0]:
                continue
            del self.joining[engine_id]
            engine, now = self.health.engines[engine_id], time.monotonic()
            try:
                engine_result(engine_id, ready, 0.0, "joining")
            except EngineFailure as failure:
                self.health.died(engine_id, engine.incarnation, failure.reason, now)
                self.losses[failure.reason] += 1
            else:
                self.health.answered(engine_id, engine.incarnation, now)
        for engine_id in self.health.tick(time.monotonic()):
            if self.joining.pop(engine_id, None) is not None:
                self.losses[LossReason.NOT_UP] += 1

    def recover(self) -> list[str]:
        """Before a push: ask who is under suspicion, take in who is up; returns who is dead for good.

        The others are STALE or HEALTHY and take part in the push, but for those that are still joining. Where nobody
        else is left, the first one that joins is waited for.
        """
        import ray

        self.take_in()
        for engine_id in self.health.named(EngineState.SUSPECT):
            incarnation = self.incarnations()[engine_id]
            patience = PING_S + self.call_seconds.get(engine_id, 0.0)
            try:
                engine_result(engine_id, self.engines[engine_id].describe.remote(), patience, "coming back")
            except EngineFailure as failure:
                self.health.died(engine_id, incarnation, failure.reason, time.monotonic())
                self.losses[failure.reason] += 1
            else:
                self.health.answered(engine_id, incarnation, time.monotonic())
        while self.joining and not self.health.named(EngineState.HEALTHY, EngineState.STALE):
            launched = min(self.health.engines[name].since for name in self.joining)
            patience = launched + self.health.start_deadline_s - time.monotonic()
            ray.wait(list(self.joining.values()), timeout=max(0.0, patience))
            self.take_in()
        return self.health.named(EngineState.DEAD)

    def restart(self, engine_id: str) -> Any:
        """Kill an engine and start a fresh one in its place, with the weights of `hf_dir`; returns its handle."""
        self.relaunch(engine_id)
        self.joining.pop(engine_id, None)
        self._await_start([engine_id])
        return self.engines[engine_id]

    def describe(self) -> dict[str, str | int]:
        """Name, version and number of the engines."""
        engine_id = next(iter(self.health.named(EngineState.HEALTHY, EngineState.STALE)), next(iter(self.engines)))
        engine = self.engines[engine_id]
        told = engine_result(engine_id, engine.describe.remote(), self.settings.deadline_s, "describing itself")
        return {**told, "count": len(self.engines)}

    def close(self) -> None:
        """End the engines."""
        import ray

        for engine in self.engines.values():
            ray.kill(engine)
        self.engines.clear()
        self.placement.release()


def _check_resources(settings: RolloutSettings) -> None:
    """Refuse what the cluster can never give, instead of waiting for it."""
    import ray

    total = ray.cluster_resources()
    if total.get("CPU", 0) < settings.engines:
        raise RequestError(
            "rollout.engines", settings.engines, f"at most {int(total.get('CPU', 0))}, the cluster's CPUs"
        )
    if total.get("GPU", 0) < settings.gpus * settings.engines:
        raise RequestError("rollout.gpus", settings.gpus, f"{total.get('GPU', 0)} GPUs in the cluster in all")
    if settings.engine is EngineKind.VLLM and settings.gpus == 0 and settings.block_size % 32:
        raise RequestError("rollout.block_size", settings.block_size, "a multiple of 32 on CPU")
