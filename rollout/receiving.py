"""An engine's half of a push: the metadata message, the receipt, and the states a version goes through.

    push begins → IN_TRANSIT → buckets verified and loaded → (probe) → published: `weight_version` is the new one

While a push is under way, or after one that failed, the engine has no version that anybody could record with a group,
so it must not generate. An engine that sleeps (`rollout.sleeping`) takes memory for weights before the first bucket
and for caches after the last one. Nothing here needs vLLM; the vLLM worker's part is `rollout.weight_transfer`.
"""

from __future__ import annotations

import contextlib
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from data.errors import RunError
from rollout.buckets import HEADER_BYTES, BucketError, Layout, Unpacker
from rollout.kept_push import KeptBuckets, KeptReceiver
from rollout.movers import BucketReceiver, Deadline, Endpoint, open_receiver
from rollout.sleeping import Memory, SleepingEngine

IN_TRANSIT = -1
"""Version of an engine whose weights are being replaced, or whose last push failed."""


class PushFault(StrEnum):
    """Test-only: what a push does wrong, so that tests can show that the checks notice."""

    NONE = "none"
    WITHHOLD_PUSH = "withhold_push"
    """Nothing is sent, and nobody says so."""
    WITHHOLD_BUCKET = "withhold_bucket"
    """The tensors that the middle bucket completes are not loaded."""
    WITHHOLD_HEAD = "withhold_head"
    """The head keeps its old weights, as vLLM's CPU head does after its layerwise reload."""
    CORRUPT_BUCKET = "corrupt_bucket"
    """One bit of the middle bucket flips on the way."""
    FAIL_HALF_WAY = "fail_half_way"
    """The engine fails at the middle bucket."""
    STALL = "stall"
    """The engine falls silent at the middle bucket, for twice the deadline."""


@dataclass(frozen=True, kw_only=True)
class PushMessage:
    """The one metadata message of a push; everything else is buckets."""

    version: int
    layout: Layout
    endpoint: Endpoint | KeptBuckets
    """The sender; or what an earlier push left behind, for an engine that missed it."""
    deadline_s: float
    """Seconds each side gives itself, from when it reads the message."""
    keep: str = ""
    """File that the sender writes the buckets down in; none keeps none."""
    fault: PushFault = PushFault.NONE
    """Test-only."""
    blind: bool = False
    """Test-only: the engine does not complain about tensors that did not come."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What one side of a push handled."""

    version: int
    checksums: tuple[int, ...]
    """Of the buckets, in order."""
    tensors: int
    """Tensors handed to the model."""
    nbytes: int
    seconds: float
    waking_s: float = 0.0
    """Of them, until an engine that slept had its memory again."""


LoadTensors = Callable[[list[tuple[str, Tensor]]], None]


class Inbox:
    """Keeps the connection to the sender over the pushes of one endpoint, and runs the receiving loop."""

    def __init__(self) -> None:
        self._receiver: BucketReceiver | None = None
        self._address = ""

    def receive(self, message: PushMessage, *, rank: int, device: str, load: LoadTensors) -> Receipt:
        """Receive, verify and load every bucket of a push.

        Args:
            message: the metadata.
            rank: which receiver of the endpoint this is.
            device: where the model lives.
            load: takes the tensors of a bucket; may keep them.

        Raises:
            BucketError: a bucket is not the one the sender packed.
            MoverError: the sender failed, or fell silent until the deadline.
        """
        begun = time.monotonic()
        deadline = Deadline(message.deadline_s)
        try:
            receiver = self._connect(message.endpoint, rank, device, deadline)
            layout = message.layout
            unpacker = Unpacker(layout, version=message.version)
            middle, tensors = layout.buckets // 2, 0
            for index in range(layout.buckets):
                buffer = receiver.receive(HEADER_BYTES + layout.payload_bytes(index), deadline)
                if index == middle:
                    _inject(message, buffer)
                completed = unpacker.feed(buffer)
                if index == middle and message.fault is PushFault.WITHHOLD_BUCKET:
                    continue
                load(completed)
                tensors += len(completed)
            if tensors != len(layout.specs) and not message.blind:
                raise BucketError(f"{tensors} of {len(layout.specs)} tensors of version {message.version} were loaded")
            if isinstance(message.endpoint, KeptBuckets):
                self.close()
        except BaseException as error:
            self.fail(f"{type(error).__name__}: {error}")
            raise
        return Receipt(
            version=message.version,
            checksums=tuple(unpacker.checksums),
            tensors=tensors,
            nbytes=layout.total_bytes,
            seconds=time.monotonic() - begun,
        )

    def _connect(self, endpoint: Endpoint | KeptBuckets, rank: int, device: str, deadline: Deadline) -> BucketReceiver:
        if isinstance(endpoint, KeptBuckets):
            self.close()
            self._receiver, self._address = KeptReceiver(endpoint), endpoint.address
        elif self._receiver is None or self._address != endpoint.address:
            self.close()
            self._receiver = open_receiver(endpoint, rank=rank, device=device, deadline=deadline)
            self._address = endpoint.address
        return self._receiver

    def fail(self, error: str) -> None:
        """Tell the sender, and drop the connection."""
        if self._receiver is not None:
            self._receiver.fail(error)
        self.close()

    def close(self) -> None:
        """Drop the connection."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None


def refuse(message: PushMessage, rank: int, error: BaseException) -> None:
    """Tell the sender that this engine takes nothing, so that it does not wait for it until the deadline."""
    if isinstance(message.endpoint, KeptBuckets):
        return
    # Where the sender cannot be reached, it knows; the engine's own error is the one to raise.
    with contextlib.suppress(RunError, RuntimeError, OSError):
        deadline = Deadline(message.deadline_s)
        receiver = open_receiver(message.endpoint, rank=rank, device="cpu", deadline=deadline)
        receiver.fail(f"{type(error).__name__}: {error}")
        receiver.close()


def _inject(message: PushMessage, buffer: Tensor) -> None:
    """Test-only: the faults of the middle bucket."""
    if message.fault is PushFault.CORRUPT_BUCKET:
        buffer[-1] ^= 1
    elif message.fault is PushFault.FAIL_HALF_WAY:
        raise RunError(f"fault {message.fault.value}: injected by a test")
    elif message.fault is PushFault.STALL:
        time.sleep(2 * message.deadline_s)


class ReceivingEngine(SleepingEngine):
    """Mixin of the engines: the weight channel's methods, and who may see which version.

    An engine implements `_take_push`; it must refuse to generate while `weight_version` is `IN_TRANSIT`.
    """

    weight_version: int
    """Version that new groups are recorded with; `IN_TRANSIT` during a push."""
    _loaded: Receipt | None = None

    @abstractmethod
    def _take_push(self, message: PushMessage, rank: int) -> Receipt:
        """Receive the buckets and load them."""

    def receive_weights(self, message: PushMessage, rank: int) -> Receipt:
        """Take one push; the version stays hidden until `publish_weights`.

        Raises:
            BucketError: a bucket or a tensor is missing or wrong; the engine must be replaced.
            MoverError: the sender failed or fell silent; the engine must be replaced.
        """
        self.weight_version = IN_TRANSIT
        self._loaded = None
        try:
            waking_s = self._wake(Memory.WEIGHTS)
        except BaseException as error:
            refuse(message, rank, error)
            raise
        receipt = self._take_push(message, rank)
        waking_s += self._wake(Memory.CACHES)
        self._loaded = replace(receipt, seconds=receipt.seconds + waking_s, waking_s=waking_s)
        return self._loaded

    def fall_asleep(self) -> float:
        """See `SleepingEngine`; no version may be asked for before the next one is published."""
        self.weight_version = IN_TRANSIT
        self._loaded = None
        return super().fall_asleep()

    def publish_weights(self, version: int) -> None:
        """Make the version that was loaded and probed visible.

        Raises:
            RunError: another version, or none, was loaded.
        """
        if self._loaded is None or self._loaded.version != version:
            loaded = "none" if self._loaded is None else self._loaded.version
            raise RunError(f"version {version} cannot become visible: loaded is {loaded}")
        self.weight_version = version

    def publish_unchecked(self, version: int) -> None:
        """Test-only: what a channel without checks would do, to show that the policy gap notices by itself."""
        self.weight_version = version

    def require_visible(self) -> None:
        """Raise RunError while there is no version to generate with."""
        self.require_awake()
        if self.weight_version == IN_TRANSIT:
            raise RunError("the engine's weights are in transit or its last push failed: it must not generate")


class ModuleInbox:
    """Receives pushes into a plain torch module (the reference engine): by name, in place."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._inbox = Inbox()

    def receive(self, message: PushMessage, *, rank: int) -> Receipt:
        """See `Inbox.receive`.

        Raises:
            BucketError: the message names a tensor the module lacks, or leaves one of its tensors out.
        """
        targets = self._module.state_dict(keep_vars=True)
        device = next(iter(targets.values())).device
        loaded: set[int] = set()
        head = {id(t) for n, t in targets.items() if n.endswith("lm_head.weight")}

        @torch.no_grad()
        def load(tensors: list[tuple[str, Tensor]]) -> None:
            for name, tensor in tensors:
                target = targets.get(name)
                if target is None or target.shape != tensor.shape:
                    found = "no such tensor" if target is None else f"shape {tuple(target.shape)} in the engine"
                    raise BucketError(f"weight {name} of shape {tuple(tensor.shape)}: {found}")
                loaded.add(id(target))
                if message.fault is PushFault.WITHHOLD_HEAD and id(target) in head:
                    continue
                target.copy_(tensor.to(target.dtype))

        receipt = self._inbox.receive(message, rank=rank, device=str(device), load=load)
        missing = sorted(name for name, target in targets.items() if id(target) not in loaded)
        if missing and not message.blind:
            raise BucketError(f"the push of version {message.version} did not load {', '.join(missing)}")
        return receipt

    def close(self) -> None:
        """Drop the connection."""
        self._inbox.close()
