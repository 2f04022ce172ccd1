"""Movers built on a process group of their own: gloo on CPU, NCCL on GPUs, by torch or by vLLM.

The group has the sender as rank 0 and the receivers behind it; a bucket is one broadcast. Rendezvous and the exchange
of errors go through a TCP store that the sender holds, so the default group of the process (the learner's, vLLM's)
stays out of it. Both NCCLs share everything here but the constructor of the group.
"""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from rollout.movers import (
    CARD_TO_CARD,
    BucketReceiver,
    BucketSender,
    Deadline,
    Endpoint,
    MoverError,
    MoverKind,
    MoverRequest,
    MoverTimeout,
    PeerError,
)

_TCPStore: Any = dist.TCPStore  # type: ignore[attr-defined]  # torch's stubs leave it out
_ERROR_KEY = "error"
_ERROR_POLL_S = 0.05
"""How often a waiting side asks the store for the other's error: one round trip on the wire."""


def _process_group(endpoint: Endpoint, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """The last call: a gloo or NCCL group outside torch's global registry, or vLLM's."""
    if endpoint.kind is MoverKind.GLOO:
        gloo: Any = dist.ProcessGroupGloo
        gloo_options = gloo._Options()
        gloo_options._timeout = timeout
        # By default gloo listens where this host's name leads, which on many systems is the loopback address.
        gloo_options._devices = [gloo.create_device(hostname=address_towards(endpoint.address.rpartition(":")[0]))]
        return gloo(store, rank, size, gloo_options)
    if endpoint.kind is MoverKind.VLLM_NCCL:
        from rollout.vllm_nccl import VllmNcclGroup

        return VllmNcclGroup(store, rank, size, torch.device("cuda", torch.cuda.current_device()))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


def address_towards(host: str) -> str:
    """The address by which this machine is seen from `host`."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        # Connecting a datagram socket sends nothing; it chooses the route.
        probe.connect(address)
        return str(probe.getsockname()[0])


class _Group:
    """A process group that is built late, waits with a deadline, and listens for the other side's error."""

    def __init__(self, endpoint: Endpoint, store: Any, rank: int) -> None:
        self._endpoint = endpoint
        self._store = store
        self._rank = rank
        self._group: Any = None
        self._asked = 0.0
        self._pending = False

    def raise_told(self) -> None:
        """Raise the error somebody has put into the store, at most one question per `_ERROR_POLL_S`."""
        now = time.monotonic()
        if now - self._asked < _ERROR_POLL_S:
            return
        self._asked = now
        try:
            told = self._store.get(_ERROR_KEY).decode() if self._store.check([_ERROR_KEY]) else ""
        except RuntimeError as error:
            raise PeerError("the sender closed the connection") from error
        if told:
            raise PeerError(told)

    def connect(self, deadline: Deadline) -> None:
        """Build the group once everybody is there; earlier, a missing peer would block inside the constructor."""
        if self._group is not None:
            return
        size = self._endpoint.receivers + 1
        self.post(f"joined-{self._rank}", "1")
        keys = [f"joined-{rank}" for rank in range(size)]

        def joined() -> bool:
            self.raise_told()
            try:
                return bool(self._store.check(keys))
            except RuntimeError as error:
                raise PeerError("the sender closed the connection") from error

        deadline.wait(joined, "connection of all sides")
        left = timedelta(seconds=max(deadline.left, 0.1))
        try:
            self._group = _process_group(self._endpoint, self._store, self._rank, size, left)
        except RuntimeError as error:
            self._asked = 0.0
            self.raise_told()
            raise MoverError(f"the {self._endpoint.kind.value} group could not be built: {error}") from error

    def broadcast(self, buffer: Tensor, deadline: Deadline, what: str) -> None:
        """One broadcast from rank 0, polled so that an error of the other side ends it at once."""
        self.connect(deadline)
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.timeout = timedelta(seconds=max(deadline.left, 0.1))
        options.asyncOp = True
        self._pending = True
        try:
            work = self._group.broadcast([buffer], options)

            def finished() -> bool:
                if work.is_completed():
                    return True
                self.raise_told()
                return False

            deadline.wait(finished, what)
            work.wait()
        except RuntimeError as error:
            # A peer that fails closes its sockets first and its words arrive through the store a little later.
            self._hear_out(deadline)
            if "imed out" in str(error):
                raise MoverTimeout(f"no {what}: {error}") from error
            raise MoverError(f"{what}: {error}") from error
        if buffer.is_cuda:
            torch.cuda.synchronize()
        self._pending = False

    def _hear_out(self, deadline: Deadline) -> None:
        patience = Deadline(min(1.0, deadline.left))
        while patience.left:
            self._asked = 0.0
            self.raise_told()
            time.sleep(0.02)

    def post(self, key: str, value: str) -> None:
        """Write into the store."""
        try:
            self._store.set(key, value)
        except RuntimeError as error:
            raise PeerError("the sender closed the connection") from error

    def tell(self, text: str) -> None:
        """Put an error where the others look; silent when the store is gone, for then they know."""
        try:
            if not self._store.check([_ERROR_KEY]):
                self._store.set(_ERROR_KEY, text)
        except RuntimeError:
            return

    def close(self) -> None:
        """End the group; pending operations of the others fail."""
        holder, self._group, self._store = [self._group], None, None
        if holder[0] is None:
            return
        kind = self._endpoint.kind
        # Torch's NCCL goes with its group, unless a broadcast hangs in it; vLLM's does not go by itself.
        if kind is MoverKind.VLLM_NCCL or (self._pending and kind in CARD_TO_CARD):
            holder[0].abort()
        if self._pending:
            # gloo cannot abandon an operation: its group waits for the operation's own timeout when it is freed.
            threading.Thread(target=holder.clear, name="windlass-gloo-end", daemon=True).start()


class CollectiveSender(BucketSender):
    """Rank 0 of the group; holds the store."""

    def __init__(self, request: MoverRequest) -> None:
        self._device = "cuda" if request.kind in CARD_TO_CARD else "cpu"
        store = _TCPStore(
            request.host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60), multi_tenant=False
        )
        self.endpoint = Endpoint(
            kind=request.kind,
            address=f"{request.host}:{store.port}",
            receivers=len(request.receivers),
            buffer_bytes=request.buffer_bytes,
            slots=request.slots,
        )
        self._store = store
        self._sent = 0
        self._group = _Group(self.endpoint, store, 0)
        self._closed = False

    def send(self, buffer: Tensor, deadline: Deadline) -> None:
        """See `BucketSender`."""
        self._group.broadcast(buffer.to(self._device), deadline, f"receiver that takes bucket {self._sent}")
        self._sent += 1

    def finish(self, deadline: Deadline) -> None:
        """See `BucketSender`. Over at rank 0, a broadcast may be under way elsewhere: hence counters."""
        for rank in range(self.endpoint.receivers):
            key = f"taken-{rank}"

            def taken(key: str = key) -> bool:
                self._group.raise_told()
                return bool(self._store.check([key])) and int(self._store.get(key)) >= self._sent

            if self._sent:
                deadline.wait(taken, f"receipt by receiver {rank}")

    def fail(self, error: str) -> None:
        """See `BucketSender`."""
        self._group.tell(error)

    def close(self) -> None:
        """See `BucketSender`."""
        if self._closed:
            return
        self._closed = True
        self._group.tell("the sender closed the connection")
        self._group.close()
        del self._store


class CollectiveReceiver(BucketReceiver):
    """One of the ranks behind the sender."""

    def __init__(self, endpoint: Endpoint, *, rank: int, device: str, deadline: Deadline) -> None:
        host, _, port = endpoint.address.rpartition(":")
        self._device = device if endpoint.kind in CARD_TO_CARD else "cpu"
        self._rank = rank
        self._taken = 0
        try:
            self._store: Any = _TCPStore(
                host, int(port), is_master=False, timeout=timedelta(seconds=max(deadline.left, 0.1))
            )
        except RuntimeError as error:
            raise MoverError(f"the sender at {endpoint.address} cannot be reached: {error}") from error
        self._group = _Group(endpoint, self._store, rank + 1)
        if self._store.add(f"members-{rank}", 1) > 1:
            # A group cannot take a restarted member in; joining it would hang until the deadline.
            told = f"receiver {rank} joined a second time: its engine was restarted"
            self._group.tell(told)
            raise MoverError(told)

    def receive(self, nbytes: int, deadline: Deadline) -> Tensor:
        """See `BucketReceiver`."""
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._group.broadcast(buffer, deadline, f"bucket {self._taken} from the sender")
        self._taken += 1
        self._group.post(f"taken-{self._rank}", str(self._taken))
        return buffer

    def fail(self, error: str) -> None:
        """See `BucketReceiver`."""
        self._group.tell(error)

    def close(self) -> None:
        """See `BucketReceiver`."""
        self._group.close()
        self._store = None
