"""Ranks as the driver sees them: one object, whatever their number.

Ranks are Ray actors (`RankGroup.start_ranks`), or one object inside this process. Every call goes to all ranks with the
same arguments. The first rank that fails ends the call: the others may wait for it in a collective until their own
deadline, so a group that failed is closed.
"""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

from data.errors import RequestError, RunError
from rollout.channel import LOOPBACK
from rollout.engine_calls import cause_of_death
from rollout.placement import Placement, strategy
from trainer.ranks import RankPlace
from trainer.settings import Device, LearnerSettings


class LearnerLost(RunError):
    """A rank died or fell silent; the group cannot go on, but may begin again from a checkpoint."""


class RankActor(ABC):
    """A rank in a process of its own; a subclass says what it is a rank of."""

    def __init__(self) -> None:
        self._rank: Any = None

    @abstractmethod
    def make(self, arguments: dict[str, Any], place: RankPlace) -> Any:
        """The rank; returns when all ranks have met."""

    def address(self) -> tuple[str, str, int]:
        """(node id, address of the node, a free port)."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        return str(ray.get_runtime_context().get_node_id()), str(ray.util.get_node_ip_address()), port

    def build(self, arguments: dict[str, Any], place: RankPlace) -> None:
        """Start the rank; returns when all ranks have met."""
        self._rank = self.make(arguments, place)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the rank."""
        if self._rank is None:
            raise RunError("the learner rank was not started")
        return getattr(self._rank, method)(*arguments)


class RankGroup:
    """All ranks of something."""

    def __init__(
        self, settings: LearnerSettings, local: Any, actors: list[Any], placement: Placement | None = None
    ) -> None:
        self.settings = settings
        self._placement = placement
        self.host = LOOPBACK
        """Address of the first rank: the loopback one where the whole cluster is one machine."""
        self._local = local
        self._actors = actors

    @classmethod
    def start_ranks(
        cls,
        settings: LearnerSettings,
        kind: type[RankActor],
        arguments: dict[str, Any],
        placement: Placement | None = None,
    ) -> Self:
        """Start the ranks as Ray actors; Ray is initialised.

        Args:
            settings: how many ranks, where they compute, and how long they may take.
            kind: of the actors.
            arguments: of every rank.
            placement: where the ranks go; by default near each other on any node.

        Raises:
            RequestError: the cluster can never give the ranks, or they refuse their arguments.
            RunError: there is no room, a rank failed, or the ranks did not meet in time.
        """
        import ray

        check_resources(settings)
        actor = ray.remote(kind)
        placement = placement or Placement()
        gpus = settings.gpus if _gpus(settings) else 0.0
        room = placement.reserve("learner.ranks", [placement.bundle(cpus=1, gpus=gpus)] * settings.ranks)
        options: dict[str, Any] = {
            "num_cpus": 1,
            "num_gpus": gpus,
            "max_restarts": 0,
            "runtime_env": {"env_vars": _environment(settings)},
        }
        actors = [
            actor.options(**options, scheduling_strategy=strategy(room, rank)).remote()
            for rank in range(settings.ranks)
        ]
        group = cls(settings, None, actors, placement)
        try:
            group._meet(arguments)
        except BaseException:
            # Whoever begins again from a checkpoint needs the room.
            group.close()
            raise
        return group

    def _meet(self, arguments: dict[str, Any]) -> None:
        """Build the ranks, which find each other at the first one's address."""
        import ray

        ranks = len(self._actors)
        addresses = self._wait([actor.address.remote() for actor in self._actors])
        one_node = len({node for node, _, _ in addresses}) == 1
        host, port = LOOPBACK if one_node else addresses[0][1], addresses[0][2]
        self.host = addresses[0][1] if len({n["NodeManagerAddress"] for n in ray.nodes()}) > 1 else LOOPBACK
        shared = ray.put(arguments)
        places = [RankPlace(rank=rank, ranks=ranks, host=host, port=port) for rank in range(ranks)]
        self._wait([actor.build.remote(shared, place) for actor, place in zip(self._actors, places, strict=True)])

    # -- calls

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        if self._local is not None:
            return [getattr(self._local, method)(*arguments)]
        import ray

        shared = [ray.put(argument) for argument in arguments]
        return self._wait([actor.call.remote(method, *shared) for actor in self._actors])

    def _wait(self, calls: list[Any]) -> list[Any]:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        waiting = list(calls)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=self.settings.timeout_s)
            if not ready:
                raise LearnerLost(f"{len(waiting)} learner ranks gave no answer within {self.settings.timeout_s:g} s")
            try:
                ray.get(ready)
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, Exception) else error) from error
            except RayActorError as error:
                rank = calls.index(ready[0])
                raise LearnerLost(f"learner rank {rank} died: {cause_of_death(error)}") from error
        return list(ray.get(calls))

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return int(self._all("steps_taken")[0])

    def save(self, folder: Path) -> None:
        """Write the state of all ranks into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._all("save", Path(folder))

    def load(self, folder: Path) -> None:
        """Continue from a state, of any number of ranks and any ZeRO stage.

        Raises:
            RequestError: the state is missing or of another model.
        """
        self._all("load", Path(folder))

    def close(self) -> None:
        """End the ranks."""
        if self._local is not None:
            self._local.close()
        if self._actors:
            import ray

            for actor in self._actors:
                ray.kill(actor)
            self._actors = []
        if self._placement is not None:
            self._placement.release()


def check_resources(settings: LearnerSettings) -> None:
    """Refuse what the cluster can never give, instead of waiting for it.

    Raises:
        RequestError: more ranks than CPUs, or CUDA without as many GPUs.
    """
    import ray

    total = ray.cluster_resources()
    if total.get("CPU", 0) < settings.ranks:
        raise RequestError("learner.ranks", settings.ranks, f"at most {int(total.get('CPU', 0))}, the cluster's CPUs")
    gpus = int(total.get("GPU", 0))
    if settings.device is Device.CUDA and gpus < settings.ranks * settings.gpus:
        raise RequestError("learner.device", "cuda", f"auto or cpu: {settings.ranks} ranks and {gpus} GPUs here")


def _gpus(settings: LearnerSettings) -> bool:
    if settings.device is Device.CPU:
        return False
    import ray

    return settings.device is Device.CUDA or ray.cluster_resources().get("GPU", 0) >= settings.ranks * settings.gpus


def _environment(settings: LearnerSettings) -> dict[str, str]:
    """Threads of a rank. They wait passively: spinning threads of one process starve the others of a small machine."""
    threads = settings.threads or max(1, len(os.sched_getaffinity(0)) // settings.ranks)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "GOMP_SPINCOUNT": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not _gpus(settings):
        environment["DS_ACCELERATOR"] = "cpu"
    return environment
