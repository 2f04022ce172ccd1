"""Carries out what `trainer.failure_policy` decides about engines: restarts, and the way back through a verified push.

an engine dies       → decision → launched again at once, beside the others' work
before every push    → wait for who is starting, ask who is suspect; who stays away is decided about, or leaves
the push is verified → its engines may be asked again, and nobody else
nobody is left       → the same at once: the push of the present version is repeated, if the learners are at rest
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rollout.channel import PushReport, WeightChannel
from rollout.fleet import EngineFailure, RolloutFleet
from rollout.fleet_health import EngineState, LossReason
from rollout.peers import RayPeer
from trainer.failure_policy import Action, Failure, Part, Situation, decide
from trainer.run_settings import ClusterSettings


@dataclass
class Healing:
    """The engines of a run that pushes weights."""

    settings: ClusterSettings
    fleet: RolloutFleet
    channel: WeightChannel
    learners_rest: bool
    """Whether the learners rest, with the weights of the last push, whenever the fleet works."""
    say: Callable[[str], None]
    restarts: int = 0
    """Engines that were launched again."""
    _failures: list[Failure] = field(default_factory=list)
    _known: dict[str, int] = field(default_factory=dict)
    """Incarnations that the channel sends to."""

    def __post_init__(self) -> None:
        """Take over what happens to engines."""
        self._known = self.fleet.incarnations()
        self.fleet.on_loss = self._lost
        self.fleet.rejoin = self._rejoin

    def push(self, version: int) -> PushReport:
        """Take the learners' weights to every engine that is up; those, and only those, may be asked then.

        Raises:
            PushError: see `WeightChannel.push`.
            EngineFailure: no engine is left.
        """
        self._settle()
        report = self.channel.push(version)
        self._known = self.fleet.incarnations()
        self.fleet.verified({name: self._known[name] for name in self.channel.engines}, version)
        return report

    def metrics(self) -> dict[str, float]:
        """How the fleet is; below `system/`, because an undisturbed run has other numbers."""
        counts = self.fleet.health.counts()
        return {
            "system/engine_restarts": float(self.restarts),
            "system/engines_healthy": float(counts[EngineState.HEALTHY]),
            **{f"system/engines_lost/{reason}": float(count) for reason, count in self.fleet.losses.items()},
        }

    def _lost(self, failure: EngineFailure) -> None:
        """A dead engine is launched again at once; one that may still answer is asked before the next push."""
        if failure.reason is LossReason.DIED:
            self._decide(failure)

    def _decide(self, failure: EngineFailure) -> None:
        """Launch an engine again, or let it leave."""
        name = failure.engine_id
        now = Failure(part=Part.ENGINE, at=time.monotonic(), told=str(failure))
        healthy = len(self.fleet.health.named(EngineState.HEALTHY))
        # An engine can be launched without a checkpoint; only learners begin from one.
        decision = decide(now, self._failures, Situation(healthy_engines=healthy, has_manifest=False), self.settings)
        self._failures.append(now)
        self.say(f"{failure}: {decision.action.value} ({decision.reason})")
        if decision.action is Action.RESTART_ENGINE:
            self.restarts += 1
            self.fleet.relaunch(name)
        else:
            self.fleet.health.removed(name)
            self.channel.leave(name)

    def _settle(self) -> None:
        """Bring every engine to an end of its doubts: up, or gone."""
        # Ends, because the policy grants a bounded number of restarts and every other engine leaves.
        while dead := self.fleet.recover():
            for name in dead:
                reason = self.fleet.health.engines[name].reason or LossReason.NOT_UP
                self._decide(EngineFailure(name, f"did not come back ({reason.value})", reason))
        if not self.fleet.health.engines:
            raise EngineFailure("fleet", "no engine is left", LossReason.DIED)
        for name, incarnation in self.fleet.incarnations().items():
            if self._known.get(name) != incarnation:
                self.channel.adopt(name, RayPeer(name, [self.fleet.engines[name]]))
        self._known = self.fleet.incarnations()

    def _rejoin(self, failure: EngineFailure) -> None:
        if not self.learners_rest or self.channel.version is None:
            raise failure
        self.push(self.channel.version)
