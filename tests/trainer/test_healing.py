"""Contract: before a push engines join and leave as was asked, dead ones are launched again or leave, and who is not up
yet takes no part; only who took part may be asked afterwards, and who then took what the push left behind.

Fleet and channel are stand-ins that keep books; the states are the real ones. Real engines: rollout/test_fleet.py,
launch/test_status.py, launch/test_kill.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from data.errors import RunError
from rollout.engine_calls import EngineFailure
from rollout.fleet_health import EngineState, FleetHealth, LossReason
from rollout.push_failures import Blame, PushError, PushFailure
from trainer.healing import Healing
from trainer.rank_group import LearnerLost
from trainer.run_settings import ClusterSettings


@dataclass
class BookFleet:
    """Engines that are up when a test says so."""

    room: int = 4
    health: FleetHealth = field(default_factory=lambda: FleetHealth(start_deadline_s=10))
    engines: dict[str, str] = field(default_factory=dict)
    joining: dict[str, str] = field(default_factory=dict)
    losses: Counter[LossReason] = field(default_factory=Counter)
    on_loss: Any = None
    rejoin: Any = None
    bring: Any = None
    arriving: set[str] = field(default_factory=set)
    """Who is up by the time somebody looks."""
    made: int = 0

    def add(self) -> str:
        if len(self.engines) >= self.room:
            raise RunError("no room")
        name = f"e-{self.made}"
        self.made += 1
        self.health.launched(name, 0.0)
        self.engines[name] = self.joining[name] = name
        return name

    def up(self, *names: str) -> None:
        for name in names:
            self.joining.pop(name, None)
            self.health.answered(name, self.health.engines[name].incarnation, 0.0)

    def remove(self, name: str) -> None:
        del self.engines[name]
        self.joining.pop(name, None)
        self.health.removed(name)

    def relaunch(self, name: str) -> None:
        self.health.died(name, self.incarnations()[name], LossReason.DIED, 0.0)
        self.health.launched(name, 0.0)
        self.joining[name] = name

    def take_in(self) -> None:
        self.up(*self.arriving & self.joining.keys())
        self.arriving.clear()

    def joined(self, name: str, version: int) -> None:
        self.health.joined(name, self.incarnations()[name], version, 0.0)

    def recover(self) -> list[str]:
        if self.joining and not self.health.named(EngineState.HEALTHY, EngineState.STALE):
            # Nobody is up: the real fleet waits for the first that joins.
            self.up(next(iter(self.joining)))
        return self.health.named(EngineState.DEAD)

    def incarnations(self) -> dict[str, int]:
        return {name: engine.incarnation for name, engine in self.health.engines.items()}

    def verified(self, incarnations: dict[str, int], version: int) -> None:
        self.health.pushed(incarnations, version, 0.0)

    def healthy(self) -> list[str]:
        return self.health.named(EngineState.HEALTHY)


@dataclass
class BookChannel:
    """Notes who gets a push."""

    engines: dict[str, Any] = field(default_factory=dict)
    version: int | None = None
    keeps: bool = False
    source: Any = field(default_factory=lambda: SimpleNamespace(name="learner"))
    blames: dict[str, Blame] = field(default_factory=dict)
    """Whom every push fails at."""
    replace: Any = None
    kept: Any = None
    brought: list[str] = field(default_factory=list)
    fails: dict[str, Blame] = field(default_factory=dict)
    """Engines that the next `bring` fails at."""
    gone: bool = False
    """Whether somebody took away what is kept."""

    def lost_kept(self) -> str:
        if self.kept is None or not self.gone:
            return ""
        self.kept = None
        return "version-000001.buckets"

    def bring(self, name: str, peer: Any) -> int:
        self.brought.append(name)
        if name in self.fails:
            raise PushError(self.kept.message.version, {name: self.fails.pop(name)})
        self.adopt(name, peer)
        return int(self.kept.message.version)

    def adopt(self, name: str, peer: Any) -> None:
        self.engines[name] = peer

    def leave(self, name: str) -> None:
        self.engines.pop(name, None)

    def push(self, version: int) -> int:
        if self.blames:
            raise PushError(version, self.blames)
        self.version = version
        self.kept = SimpleNamespace(message=SimpleNamespace(version=version)) if self.keeps else None
        return version


@dataclass
class World:
    """Two engines that are up and have version 0."""

    wanted: int | None = None
    learners_rest: bool = True
    restarts: int = 1
    said: list[str] = field(default_factory=list)
    fleet: BookFleet = field(default_factory=BookFleet)
    channel: BookChannel = field(default_factory=BookChannel)

    def __post_init__(self) -> None:
        names = [self.fleet.add(), self.fleet.add()]
        self.fleet.up(*names)
        self.channel.engines = dict.fromkeys(names)
        settings = ClusterSettings(engine_restarts=self.restarts)
        self.healing = Healing(
            settings,
            cast(Any, self.fleet),
            cast(Any, self.channel),
            learners_rest=self.learners_rest,
            say=self.said.append,
            wanted=lambda: self.wanted,
        )
        self.healing.push(0)


def test_engines_join_after_a_push_that_finds_them_up() -> None:
    world = World()
    world.wanted = 4
    world.healing.push(1)
    assert world.fleet.healthy() == ["e-0", "e-1"]
    assert set(world.channel.engines) == {"e-0", "e-1"}, "nobody waits for who is coming up"
    world.fleet.up("e-3")
    world.healing.push(2)
    assert world.fleet.healthy() == ["e-0", "e-1", "e-3"]
    world.fleet.up("e-2")
    assert world.fleet.healthy() == ["e-0", "e-1", "e-3"], "up is not verified"
    world.healing.push(3)
    assert world.fleet.healthy() == ["e-0", "e-1", "e-2", "e-3"]
    assert world.healing.metrics()["system/engines"] == 4
    world.wanted = 1
    world.healing.push(4)
    assert world.fleet.healthy() == list(world.channel.engines) == ["e-0"]
    assert world.healing.restarts == 0


def test_where_there_is_no_room_the_job_says_so_once() -> None:
    world = World(fleet=BookFleet(room=3))
    world.wanted = 9
    for version in (1, 2):
        world.healing.push(version)
    assert list(world.fleet.engines) == ["e-0", "e-1", "e-2"]
    assert world.said == [
        "scale: 2 engines, 9 are wanted",
        "scale: e-2 is coming up",
        "scale: stays at 3 engines: no room",
    ]


def test_dead_engines_come_back_or_leave() -> None:
    world = World()
    world.fleet.health.died("e-1", 0, LossReason.DIED, 0.0)
    world.healing.push(1)
    assert world.healing.restarts == 1
    assert world.fleet.healthy() == list(world.channel.engines) == ["e-0"], "no push waits for who comes up"
    world.fleet.up("e-1")
    world.healing.push(2)
    assert world.fleet.healthy() == list(world.channel.engines) == ["e-0", "e-1"]
    # A second restart within the window is one too many.
    world.fleet.health.died("e-1", 1, LossReason.DIED, 0.0)
    world.healing.push(3)
    assert world.healing.restarts == 1
    assert list(world.fleet.engines) == list(world.channel.engines) == ["e-0"]
    world.fleet.health.died("e-0", 0, LossReason.DIED, 0.0)
    with pytest.raises(EngineFailure, match="no engine is left"):
        world.healing.push(2)


def test_a_push_that_fails_at_an_engine_goes_on_without_it() -> None:
    world = World()
    assert world.channel.replace("e-1") is None
    assert (world.healing.restarts, list(world.channel.engines)) == (1, ["e-0"])
    assert world.fleet.losses == {LossReason.PUSH: 1}
    world.fleet.verified({"e-0": 0}, 1)
    assert world.fleet.healthy() == ["e-0"]


def test_the_last_engine_at_which_a_push_fails_is_waited_for() -> None:
    world = World()
    world.fleet.remove("e-1")
    world.channel.leave("e-1")
    peer = world.channel.replace("e-0")
    assert peer is world.channel.engines["e-0"]
    assert world.fleet.health.engines["e-0"].state is EngineState.STALE, "up, and to be pushed to"
    # The window allows one restart; the next failure leaves nobody.
    with pytest.raises(EngineFailure, match="no engine is left"):
        world.channel.replace("e-0")


@pytest.mark.parametrize("reason", [PushFailure.DIED, PushFailure.TIMEOUT, PushFailure.ERROR])
def test_learners_that_are_lost_are_named_also_in_the_midst_of_a_request(reason: PushFailure) -> None:
    world = World()
    world.channel.blames = {"learner": Blame(reason=reason, text="gone"), "e-0": Blame(reason=reason, text="waits")}
    expected = PushError if reason is PushFailure.ERROR else LearnerLost
    with pytest.raises(expected, match="gone"):
        world.healing.push(1)
    for name in ("e-0", "e-1"):
        world.fleet.health.died(name, 0, LossReason.DIED, 0.0)
    with pytest.raises(expected, match="gone"):
        world.fleet.rejoin(lost("e-1"))


def working(**more: Any) -> World:
    """A world whose learners are at work; what the last push left is kept."""
    return World(learners_rest=False, channel=BookChannel(keeps=True), **more)


def lost(name: str) -> EngineFailure:
    return EngineFailure(name, "died", LossReason.DIED)


def test_who_comes_up_between_pushes_takes_what_the_last_one_left() -> None:
    world = working()
    world.wanted = 4
    world.healing.push(1)
    world.fleet.arriving = {"e-2"}
    world.fleet.bring()
    assert world.fleet.healthy() == ["e-0", "e-1", "e-2"]
    assert world.fleet.health.may_serve("e-2", 1)
    world.fleet.arriving = {"e-3"}
    world.fleet.bring()
    assert world.channel.brought == ["e-2", "e-3"], "once each"
    world.healing.push(2)
    assert sorted(world.channel.engines) == world.fleet.healthy() == ["e-0", "e-1", "e-2", "e-3"]


def test_without_a_kept_push_newcomers_wait_for_the_next_one() -> None:
    world = World(learners_rest=False)
    world.wanted = 3
    world.healing.push(1)
    world.fleet.arriving = {"e-2"}
    world.fleet.bring()
    assert world.fleet.healthy() == ["e-0", "e-1"]
    for name in ("e-0", "e-1"):
        world.fleet.health.died(name, 0, LossReason.DIED, 0.0)
    with pytest.raises(EngineFailure, match="e-1: died"):
        world.fleet.rejoin(lost("e-1"))


def test_a_kept_push_that_somebody_took_away_costs_no_engine() -> None:
    world = working()
    world.wanted = 3
    world.healing.push(1)
    world.channel.gone = True
    world.fleet.arriving = {"e-2"}
    for _ in range(3):
        world.fleet.bring()
    assert world.said[-1] == "version-000001.buckets is gone: engines that come up wait for the next push"
    assert (world.channel.brought, world.healing.restarts) == ([], 0)
    for name in ("e-0", "e-1"):
        world.fleet.health.died(name, 0, LossReason.DIED, 0.0)
    with pytest.raises(EngineFailure, match="e-1: died"):
        world.fleet.rejoin(lost("e-1"))


def test_losing_the_last_engine_while_learners_work_does_not_end_the_run() -> None:
    world = working(restarts=4)
    world.healing.push(7)
    for name in ("e-0", "e-1"):
        world.fleet.health.died(name, 0, LossReason.DIED, 0.0)
    # The first one that comes up fails as well, for a reason of its own, and is launched once more.
    world.channel.fails = {"e-0": Blame(reason=PushFailure.DIED, text="gone")}
    world.fleet.rejoin(lost("e-1"))
    assert world.channel.version == 7, "the learners pushed nothing"
    assert world.channel.brought[0] == "e-0"
    assert world.fleet.healthy()
    assert all(world.fleet.health.may_serve(name, 7) for name in world.fleet.healthy())
    assert world.fleet.losses == {LossReason.PUSH: 1}


def test_weights_in_doubt_and_restarts_that_are_used_up_end_the_run() -> None:
    world = working()
    world.fleet.remove("e-1")
    world.channel.leave("e-1")
    world.fleet.health.died("e-0", 0, LossReason.DIED, 0.0)
    world.channel.fails = {"e-0": Blame(reason=PushFailure.CHECKSUM, text="other bytes")}
    with pytest.raises(PushError, match="other bytes"):
        world.fleet.rejoin(lost("e-0"))
    world = working()
    world.fleet.remove("e-1")
    world.channel.leave("e-1")
    world.fleet.health.died("e-0", 0, LossReason.DIED, 0.0)
    world.channel.fails = {"e-0": Blame(reason=PushFailure.ERROR, text="no file")}
    with pytest.raises(EngineFailure, match="no engine is left"):
        world.fleet.rejoin(lost("e-0"))
