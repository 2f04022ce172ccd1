"""Carries out what `trainer.failure_policy` decides about engines: restarts, and the way back through a verified push.

an engine dies       → decision → launched again at once, beside the others' work
before every push    → engines join and leave as `windlass scale` asks; who is still coming up joins a later push
                     → ask who is suspect; wait for the first that comes up where nobody is; who stays away is decided
                       about, or leaves
a push to it fails   → launched again or gone, and the push is repeated without it
the push is verified → its engines may be asked again, and nobody else
nobody is left       → the same at once: the push of the present version is repeated, if the learners are at rest; else
                       the engines take what it left behind (`weights.keep`), without the learners
before a request     → engines that came up since the last push take what it left behind
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from data.errors import RunError
from rollout.channel import PushReport, WeightChannel
from rollout.engine_calls import EngineFailure
from rollout.fleet import RolloutFleet
from rollout.fleet_health import EngineState, LossReason
from rollout.peers import Peer, RayPeer
from rollout.push_failures import PushError, PushFailure
from trainer.failure_policy import Action, Failure, Part, Situation, decide
from trainer.rank_group import LearnerLost
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
    wanted: Callable[[], int | None] = lambda: None
    """How many engines somebody asked for while the run is on; None while nobody did."""
    restarts: int = 0
    """Engines that were launched again."""
    _scaled_to: int | None = None
    _failures: list[Failure] = field(default_factory=list)
    _known: dict[str, int] = field(default_factory=dict)
    """Incarnations that the channel sends to."""

    def __post_init__(self) -> None:
        """Take over what happens to engines."""
        self._known = self._up()
        self.fleet.on_loss = self._lost
        self.channel.replace = self._replaced
        self.fleet.rejoin = self._rejoin
        self.fleet.bring = self._bring

    def push(self, version: int) -> PushReport:
        """Take the learners' weights to every engine that is up; those, and only those, may be asked then.

        Raises:
            PushError: see `WeightChannel.push`.
            LearnerLost: it failed because a learner died or fell silent.
            EngineFailure: no engine is left.
        """
        self._scale()
        self._settle()
        try:
            report = self.channel.push(version)
        except PushError as error:
            # Also when the fleet asks for a push in the midst of a request: the learners' loss is found out here.
            blame = error.blames.get(self.channel.source.name)
            if blame is not None and blame.reason in (PushFailure.DIED, PushFailure.TIMEOUT):
                raise LearnerLost(str(error)) from error
            raise
        self._known = self._up()
        self.fleet.verified({name: self._known[name] for name in self.channel.engines}, version)
        return report

    def metrics(self) -> dict[str, float]:
        """How the fleet is; below `system/`, because an undisturbed run has other numbers."""
        counts = self.fleet.health.counts()
        return {
            "system/engine_restarts": float(self.restarts),
            "system/engines_healthy": float(counts[EngineState.HEALTHY]),
            "system/engines": float(sum(counts.values())),
            **{f"system/engines_lost/{reason}": float(count) for reason, count in self.fleet.losses.items()},
        }

    def _lost(self, failure: EngineFailure) -> None:
        """A dead engine is launched again at once; one that may still answer is asked before the next push."""
        if failure.reason is LossReason.DIED:
            self._decide(failure)

    def _replaced(self, name: str) -> Peer | None:
        """An engine in which a push failed may hold a mixture of two versions: launched again, or it leaves.

        Others do not wait for it: the push goes on without it, unless nobody else is left.
        """
        self.fleet.losses[LossReason.PUSH] += 1
        self._decide(EngineFailure(name, "a push to it failed", LossReason.PUSH))
        self._settle()
        return self.channel.engines.get(name)

    def _decide(self, failure: EngineFailure) -> None:
        """Launch an engine again, or let it leave."""
        name = failure.engine_id
        now = Failure(part=Part.ENGINE, at=time.monotonic(), told=str(failure))
        others = set(self.fleet.health.named(EngineState.HEALTHY, EngineState.STALE)) - {name}
        # An engine can be launched without a checkpoint; only learners begin from one.
        situation = Situation(healthy_engines=len(others), has_manifest=False)
        decision = decide(now, self._failures, situation, self.settings)
        self._failures.append(now)
        self.say(f"{failure}: {decision.action.value} ({decision.reason})")
        if decision.action is Action.RESTART_ENGINE:
            self.restarts += 1
            self.fleet.relaunch(name)
        else:
            self._leave(name)

    def _settle(self) -> None:
        """Bring every engine to an end of its doubts: up, or gone."""
        # Ends, because the policy grants a bounded number of restarts and every other engine leaves.
        while dead := self.fleet.recover():
            for name in dead:
                reason = self.fleet.health.engines[name].reason or LossReason.NOT_UP
                self._decide(EngineFailure(name, f"did not come back ({reason.value})", reason))
        if not self.fleet.health.engines:
            raise EngineFailure("fleet", "no engine is left", LossReason.DIED)
        for name in set(self.channel.engines) & set(self.fleet.joining):
            self.channel.leave(name)
        for name, incarnation in self._up().items():
            if self._known.get(name) != incarnation:
                self.channel.adopt(name, RayPeer(name, [self.fleet.engines[name]]))
        self._known = self._up()

    def _up(self) -> dict[str, int]:
        """Incarnations of the engines that take part in a push: all but those that are still joining."""
        return {name: number for name, number in self.fleet.incarnations().items() if name not in self.fleet.joining}

    def _leave(self, name: str) -> None:
        self.fleet.remove(name)
        self.channel.leave(name)

    def _scale(self) -> None:
        """Begin to be as many engines as were asked for last: newcomers are launched, the newest leave first."""
        wanted = self.wanted()
        if wanted is None or wanted == self._scaled_to:
            return
        self._scaled_to = wanted
        names = list(self.fleet.health.engines)
        self.say(f"scale: {len(names)} engines, {wanted} are wanted")
        for name in names[wanted:]:
            self._leave(name)
        for _ in range(wanted - len(names)):
            try:
                name = self.fleet.add()
            except RunError as error:
                self.say(f"scale: stays at {len(self.fleet.health.engines)} engines: {error}")
                return
            self.say(f"scale: {name} is coming up")

    def _rejoin(self, failure: EngineFailure) -> None:
        if self.learners_rest and self.channel.version is not None:
            self.push(self.channel.version)
            return
        # Ends like `_settle`, which raises when no engine is left.
        while not self.fleet.health.named(EngineState.HEALTHY):
            if not self._keeps():
                raise failure
            self._settle()
            self._bring()

    def _keeps(self) -> bool:
        """Whether engines can be brought to the version; a file that is gone is no fault of theirs."""
        if lost := self.channel.lost_kept():
            self.say(f"{lost} is gone: engines that come up wait for the next push")
        return self.channel.kept is not None

    def _bring(self) -> None:
        """Verify the engines that came up since the last push, out of what it left behind.

        Raises:
            PushError: a check failed: the weights are in doubt.
        """
        if not self._keeps():
            return
        self.fleet.take_in()
        for name in self.fleet.health.named(EngineState.STALE):
            try:
                version = self.channel.bring(name, RayPeer(name, [self.fleet.engines[name]]))
            except PushError as error:
                if error.alarm:
                    raise
                self.fleet.losses[LossReason.PUSH] += 1
                self._decide(EngineFailure(name, f"did not take what the last push left: {error}", LossReason.PUSH))
            else:
                self._known[name] = self.fleet.incarnations()[name]
                self.fleet.joined(name, version)
