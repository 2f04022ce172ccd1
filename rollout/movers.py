"""Byte movers: how the buckets of a push get from the learner to the engines.

A mover carries opaque buffers of known size, in order, from one sender to every receiver. It knows nothing of tensors
or checksums, so all movers pass one contract test, and the ones that need a GPU differ from a tested one in the last
call only: CUDA IPC from shared memory in where a slot lies (`rollout.ring_movers`), NCCL, torch's or vLLM's, from gloo
in the process group (`rollout.collective_movers`).

The contract: every call ends before its deadline, with the data or with an exception; an error told by `fail` comes
up at the other side as `PeerError` with its text; a side that falls silent comes up as `MoverTimeout`; nothing is left
in memory or on disk after `close`, or after a kill except for the file mover, which leaves its folder. One gap: both
NCCLs build their communicator without a deadline, so a peer that dies in that moment is noticed by the push's own.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from data.errors import RequestError, RunError


class MoverKind(StrEnum):
    """Which byte mover a push uses."""

    SHARED_MEMORY = "shared_memory"
    """Anonymous memory shared by the processes of one host and user."""
    FILE = "file"
    """Files in a folder that both sides see; slow, works everywhere."""
    GLOO = "gloo"
    """TCP between hosts, CPU tensors."""
    NCCL = "nccl"
    """Between GPUs of one or several hosts."""
    VLLM_NCCL = "vllm_nccl"
    """The same by the communicator of vLLM's own weight transfer."""
    CUDA_IPC = "cuda_ipc"
    """Between processes that share one GPU, or GPUs of one host with peer access."""


COLLECTIVES = (MoverKind.GLOO, MoverKind.NCCL, MoverKind.VLLM_NCCL)
"""Built on a process group."""
CARD_TO_CARD = (MoverKind.NCCL, MoverKind.VLLM_NCCL)
"""Need a card of its own for every process."""
ON_CARDS = (*CARD_TO_CARD, MoverKind.CUDA_IPC)
"""Need CUDA on both sides."""


class MoverError(RunError):
    """A bucket could not be moved."""


class MoverTimeout(MoverError):
    """The other side fell silent."""


class PeerError(MoverError):
    """The other side failed and said why."""


@dataclass(frozen=True, kw_only=True)
class MoverRequest:
    """What a sender has to open a mover for."""

    kind: MoverKind
    receivers: tuple[str, ...]
    """Names of the receivers; the position is the rank. A changed tuple means a new connection."""
    buffer_bytes: int
    """Largest buffer, header included."""
    slots: int = 2
    """Buckets in flight; two overlap packing with loading."""
    host: str = "127.0.0.1"
    """Address of the sender that the receivers can reach (collectives)."""
    folder: str = ""
    """Folder of the file mover."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where the receivers find the sender; part of the metadata message."""

    kind: MoverKind
    address: str
    receivers: int
    buffer_bytes: int
    slots: int
    handles: bytes = b""
    """Exported GPU memory (cuda_ipc)."""


class Deadline:
    """A point in time, and the waiting for it."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._seconds = seconds

    @property
    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - time.monotonic())

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Poll `ready` (which may raise) until it is true.

        Raises:
            MoverTimeout: the time is over.
        """
        pause = 2e-5
        while not ready():
            if not self.left:
                raise MoverTimeout(f"no {what} within {self._seconds:g} s")
            time.sleep(min(pause, self.left))
            pause = min(pause * 1.5, 5e-3)


class BucketSender(ABC):
    """The learner's end of a mover."""

    endpoint: Endpoint

    @abstractmethod
    def send(self, buffer: Tensor, deadline: Deadline) -> None:
        """Send a uint8 buffer to every receiver; the caller may overwrite it afterwards."""

    @abstractmethod
    def finish(self, deadline: Deadline) -> None:
        """Wait until every receiver has taken every buffer sent so far."""

    @abstractmethod
    def fail(self, error: str) -> None:
        """Tell the receivers that nothing will follow, and why."""

    @abstractmethod
    def close(self) -> None:
        """Free everything; receivers that still wait get an error."""


class BucketReceiver(ABC):
    """An engine's end of a mover."""

    @abstractmethod
    def receive(self, nbytes: int, deadline: Deadline) -> Tensor:
        """The next buffer, uint8 `[nbytes]`, owned by the caller."""

    @abstractmethod
    def fail(self, error: str) -> None:
        """Tell the sender (and through it the other receivers) that this one failed, and why."""

    @abstractmethod
    def close(self) -> None:
        """Free everything."""


def open_sender(request: MoverRequest) -> BucketSender:
    """Open the sending end, in the process that holds the weights. Does not wait for receivers.

    Raises:
        RequestError: no receivers, or a mover that needs CUDA where there is none.
    """
    if not request.receivers:
        raise RequestError("receivers of a weight push", "none", "at least one engine")
    if request.kind in ON_CARDS and not torch.cuda.is_available():
        raise RequestError("weights.mover", request.kind.value, "shared_memory, file or gloo where there is no CUDA")
    if request.kind in COLLECTIVES:
        from rollout.collective_movers import CollectiveSender

        return CollectiveSender(request)
    from rollout.ring_movers import open_ring_sender

    return open_ring_sender(request)


def open_receiver(endpoint: Endpoint, *, rank: int, device: str, deadline: Deadline) -> BucketReceiver:
    """Connect receiver `rank` (0-based) to a sender that is open.

    Raises:
        MoverError: the sender cannot be reached.
    """
    if not 0 <= rank < endpoint.receivers:
        raise RequestError("rank of a receiver", rank, f"0 to {endpoint.receivers - 1}")
    if endpoint.kind in COLLECTIVES:
        from rollout.collective_movers import CollectiveReceiver

        return CollectiveReceiver(endpoint, rank=rank, device=device, deadline=deadline)
    from rollout.ring_movers import open_ring_receiver

    return open_ring_receiver(endpoint, rank=rank, device=device)


def mover_folder(root: str) -> Path:
    """Checked folder of the file mover."""
    path = Path(root)
    if not root or not path.is_dir():
        raise RequestError("folder of the file mover", root or "none", "an existing folder that all nodes share")
    return path
