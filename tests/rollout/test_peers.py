"""Contract: a peer's calls run in order and in its own thread or process, and its exceptions come up as it raised them;
a dead actor comes up as `PeerDied`; a call to several actors is done when all are.

Not covered: actors on other nodes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rollout.buckets import BucketError
from rollout.peers import LocalPeer, PeerDied, RayPeer
from rollout.push_failures import PushFailure, blame
from tests.requirements import require


class Target:
    """What a peer may do."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.calls: list[int] = []

    def note(self, number: int) -> int:
        time.sleep(0.01 * (number == 0))
        self.calls.append(number)
        return self.rank

    def listed(self) -> list[int]:
        return self.calls

    def refuse(self) -> None:
        raise BucketError("bucket 3: checksum")

    def refuse_on(self, rank: int) -> int:
        if rank == self.rank:
            raise BucketError(f"rank {rank}")
        return self.rank

    def die(self) -> None:
        os._exit(1)


def test_a_local_peer_keeps_order_and_raises_what_was_raised() -> None:
    peer = LocalPeer("engine", Target())
    calls = [peer.submit("note", n) for n in range(5)]
    assert peer.submit("listed").result(10) == [0, 1, 2, 3, 4]
    assert all(call.result(10) == 0 for call in calls)
    with pytest.raises(BucketError, match="bucket 3"):
        peer.submit("refuse").result(10)
    with pytest.raises(AttributeError, match="missing_method"):
        peer.submit("missing_method").result(10)
    peer.close()
    for _ in range(100):
        if "peer-engine" not in {thread.name for thread in threading.enumerate()}:
            return
        time.sleep(0.02)
    pytest.fail("the peer's thread lives on")


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    require("ray")
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(
            address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20
        )
    yield ray
    if started:
        ray.shutdown()


def test_ray_peers_answer_raise_and_die_as_they_should(ray_cluster: Any) -> None:
    actors = [ray_cluster.remote(Target).options(num_cpus=0.1).remote(rank) for rank in range(2)]
    group = RayPeer("learner", actors)
    assert group.submit("note", 1).result(60) == 0
    assert group.submit("refuse_on", 5).result(60) == 0
    with pytest.raises(BucketError, match="rank 1"):
        group.submit("refuse_on", 1).result(60)
    error = RayPeer("engine", actors[1:]).submit("die").exception(60)
    assert isinstance(error, PeerDied)
    assert blame(error).reason is PushFailure.DIED
    with pytest.raises(PeerDied, match="learner"):
        group.submit("note", 1).result(60)
