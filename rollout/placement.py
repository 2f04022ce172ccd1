"""Where actors go: placement groups, reserved within a deadline, so that nobody waits for room that never comes.

Every engine has a group of its own, so that engines can join and leave a running job; the ranks of a learner share one.
Colocated, one group has a bundle for each pair of an engine and a rank.

| waits     | for                              | unblocked by                                       |
|-----------|----------------------------------|----------------------------------------------------|
| `reserve` | room for every bundle at once    | Ray, or `deadline_s`: a RunError with what is free |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.errors import RunError

SLIVER = 0.001
"""Of the resource that marks a node: enough to be sent there, for a thousand actors of each unit."""


@dataclass(kw_only=True)
class Placement:
    """Room for the engines of a fleet, or for the ranks of a learner."""

    node: str | None = None
    """Ray resource that the nodes must have; None takes any node."""
    deadline_s: float = 60.0
    """Seconds until there must be room."""
    shared: Any = None
    """Group of pairs; None reserves groups of one's own."""
    _own: dict[str, Any] = field(default_factory=dict)
    _pair: dict[str, int] = field(default_factory=dict)
    """Bundle of each actor that has a place in `shared`."""

    def bundle(self, *, cpus: float, gpus: float) -> dict[str, float]:
        """What Ray sets aside for one actor."""
        return bundle(cpus=cpus, gpus=gpus, node=self.node)

    def reserve(self, name: str, bundles: Sequence[Mapping[str, float]]) -> Any:
        """The group of `name`, which stays reserved until `release`; the pairs' group where there is one.

        Raises:
            RunError: there is no room within the deadline.
        """
        if self.shared is not None:
            return self.shared
        if name not in self._own:
            self._own[name] = reserve(name, bundles, deadline_s=self.deadline_s)
        return self._own[name]

    def bundle_of(self, name: str) -> int:
        """Number of the bundle of `name` in its group: its own among the pairs, which it keeps until `release`.

        Raises:
            RunError: every pair is taken.
        """
        if self.shared is None:
            return 0
        if name not in self._pair:
            free = [index for index in range(self.shared.bundle_count) if index not in self._pair.values()]
            if not free:
                raise RunError(f"{name}: no room beside a learner rank, colocated: each of them has its engine")
            self._pair[name] = free[0]
        return self._pair[name]

    def release(self, name: str | None = None) -> None:
        """Give back the room of `name`, or all that was reserved here."""
        for each in [name] if name is not None else list(self._pair):
            self._pair.pop(each, None)
        for each in [name] if name is not None else list(self._own):
            group = self._own.pop(each, None)
            if group is not None:
                remove(group)


def bundle(*, cpus: float, gpus: float, node: str | None) -> dict[str, float]:
    """What Ray sets aside for one actor, on a node with the resource `node`."""
    wanted = {"CPU": cpus, "GPU": gpus, **({} if node is None else {node: SLIVER})}
    return {name: amount for name, amount in wanted.items() if amount}


def reserve(name: str, bundles: Sequence[Mapping[str, float]], *, deadline_s: float) -> Any:
    """A placement group, ready; near each other where they fit.

    Raises:
        RunError: there is no room within the deadline.
    """
    import ray
    from ray.util import placement_group

    group = placement_group([dict(each) for each in bundles], strategy="PACK")
    if group.wait(deadline_s):
        return group
    remove(group)
    free = {kind: amount for kind, amount in sorted(ray.available_resources().items()) if kind in ("CPU", "GPU")}
    asked = ", ".join(f"{kind} {amount:g}" for kind, amount in bundles[0].items())
    raise RunError(
        f"{name}: no room for {len(bundles)} x ({asked}) within {deadline_s:g} s; free in the whole cluster: "
        f"{', '.join(f'{kind} {amount:g}' for kind, amount in free.items()) or 'nothing'}"
    )


def pairs(count: int, *, gpus: float, node: str | None, deadline_s: float) -> Any:
    """A group with room for `count` pairs of an engine and a learner rank, which share `gpus` GPUs.

    Raises:
        RunError: there is no room within the deadline.
    """
    return reserve("cluster.colocated", [bundle(cpus=2, gpus=gpus, node=node)] * count, deadline_s=deadline_s)


def remove(group: Any) -> None:
    """Give back the room of a group; its actors end."""
    from ray.util import remove_placement_group

    remove_placement_group(group)


def strategy(group: Any, index: int) -> Any:
    """Ray's name for bundle `index` of a group."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
