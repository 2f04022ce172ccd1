"""Movers built on a ring of slots and a board of counters: shared memory, files, CUDA IPC.

The sender writes buffer n into slot n mod S and then raises its counter to n + 1; a receiver copies the slot out and
raises its own. The sender reuses a slot when every receiver has taken it, so the memory is S buffers whatever the size
of the model. Counters only grow, over all pushes of a connection.
"""

from __future__ import annotations

import os
import pickle
import secrets
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rollout.boards import Board, FileBoard, MemoryBoard, Segment
from rollout.movers import (
    BucketReceiver,
    BucketSender,
    Deadline,
    Endpoint,
    MoverError,
    MoverKind,
    MoverRequest,
    PeerError,
    mover_folder,
)


class Slots(ABC):
    """Where the bytes lie."""

    @abstractmethod
    def write(self, slot: int, buffer: Tensor) -> None:
        """Copy a uint8 buffer into a slot."""

    @abstractmethod
    def read(self, slot: int, nbytes: int) -> Tensor:
        """Copy of the first bytes of a slot."""

    @abstractmethod
    def close(self) -> None:
        """Free."""


class RingSender(BucketSender):
    """Sends through slots."""

    def __init__(self, endpoint: Endpoint, board: Board, slots: Slots) -> None:
        self.endpoint = endpoint
        self._board = board
        self._slots = slots
        self._sent = 0

    def _taken_up_to(self, count: int) -> bool:
        error = self._board.error()
        if error:
            raise PeerError(error)
        return all(self._board.taken(rank) >= count for rank in range(self.endpoint.receivers))

    def send(self, buffer: Tensor, deadline: Deadline) -> None:
        """See `BucketSender`."""
        if buffer.numel() > self.endpoint.buffer_bytes:
            raise MoverError(f"a buffer of {buffer.numel()} bytes in slots of {self.endpoint.buffer_bytes}")
        oldest = self._sent + 1 - self.endpoint.slots
        deadline.wait(lambda: self._taken_up_to(oldest), f"receiver that takes bucket {oldest}")
        self._slots.write(self._sent % self.endpoint.slots, buffer)
        self._sent += 1
        self._board.post_sent(self._sent)

    def finish(self, deadline: Deadline) -> None:
        """See `BucketSender`."""
        deadline.wait(lambda: self._taken_up_to(self._sent), "receipt by all receivers")

    def fail(self, error: str) -> None:
        """See `BucketSender`."""
        self._board.post_error(error)

    def close(self) -> None:
        """See `BucketSender`."""
        self._board.post_error("the sender closed the connection")
        self._slots.close()
        self._board.close()


class RingReceiver(BucketReceiver):
    """Takes from slots."""

    def __init__(self, endpoint: Endpoint, board: Board, slots: Slots, *, rank: int) -> None:
        self._endpoint = endpoint
        self._board = board
        self._slots = slots
        self._rank = rank
        # Behind all that went before, should this be a restarted engine that comes to an old connection.
        self._taken = board.taken(rank)

    def _arrived(self) -> bool:
        if self._board.sent() > self._taken:
            return True
        error = self._board.error()
        if error:
            raise PeerError(error)
        return False

    def receive(self, nbytes: int, deadline: Deadline) -> Tensor:
        """See `BucketReceiver`."""
        if nbytes > self._endpoint.buffer_bytes:
            raise MoverError(f"{nbytes} bytes announced for slots of {self._endpoint.buffer_bytes}")
        deadline.wait(self._arrived, f"bucket {self._taken} from the sender")
        buffer = self._slots.read(self._taken % self._endpoint.slots, nbytes)
        self._taken += 1
        self._board.post_taken(self._rank, self._taken)
        return buffer

    def fail(self, error: str) -> None:
        """See `BucketReceiver`."""
        self._board.post_error(error)

    def close(self) -> None:
        """See `BucketReceiver`."""
        self._slots.close()
        self._board.close()


class MemorySlots(Slots):
    """Slots in a segment, behind the board."""

    def __init__(self, segment: Segment, first: int, buffer_bytes: int) -> None:
        self._segment = segment
        self._first = first
        self._size = buffer_bytes

    def _view(self, slot: int, nbytes: int) -> np.ndarray:
        if self._segment.bytes is None:
            raise MoverError("the connection is closed")
        start = self._first + slot * self._size
        return self._segment.bytes[start : start + nbytes]

    def write(self, slot: int, buffer: Tensor) -> None:
        """See `Slots`."""
        self._view(slot, buffer.numel())[:] = buffer.cpu().numpy()

    def read(self, slot: int, nbytes: int) -> Tensor:
        """See `Slots`."""
        return torch.from_numpy(self._view(slot, nbytes).copy())

    def close(self) -> None:
        """The segment is the board's to close."""


class CudaSlots(Slots):
    """Slots in GPU memory of the sender, opened by the receivers through CUDA IPC handles.

    Shares everything else with `MemorySlots`. Not covered by a test without a GPU.
    """

    def __init__(self, slots: list[Tensor]) -> None:
        self._slots = slots

    @staticmethod
    def allocate(count: int, nbytes: int) -> tuple[CudaSlots, bytes]:
        """Slots on the current device, and their handles."""
        from torch.multiprocessing.reductions import reduce_tensor

        slots = [torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(count)]
        return CudaSlots(slots), pickle.dumps([reduce_tensor(slot) for slot in slots])  # type: ignore[no-untyped-call]

    @staticmethod
    def open(handles: bytes, device: str) -> CudaSlots:
        """Slots of the sender, seen from `device`."""
        index = torch.device(device).index or 0
        opened = []
        for rebuild, arguments in pickle.loads(handles):
            # Position 6 is the device index of the exporting process, which numbers the devices its own way.
            opened.append(rebuild(*arguments[:6], index, *arguments[7:]))
        return CudaSlots(opened)

    def write(self, slot: int, buffer: Tensor) -> None:
        """See `Slots`."""
        self._slots[slot][: buffer.numel()].copy_(buffer)
        torch.cuda.synchronize()

    def read(self, slot: int, nbytes: int) -> Tensor:
        """See `Slots`."""
        copy = self._slots[slot][:nbytes].clone()
        torch.cuda.synchronize()
        return copy

    def close(self) -> None:
        """See `Slots`."""
        self._slots = []


class FileSlots(Slots):
    """Slots as files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, slot: int, buffer: Tensor) -> None:
        """See `Slots`."""
        temporary = self._folder / f".slot-{slot}"
        buffer.cpu().numpy().tofile(temporary)
        temporary.rename(self._folder / f"slot-{slot}")

    def read(self, slot: int, nbytes: int) -> Tensor:
        """See `Slots`."""
        try:
            data = np.fromfile(self._folder / f"slot-{slot}", dtype=np.uint8, count=nbytes)
        except FileNotFoundError as error:
            raise PeerError("the sender closed the connection") from error
        if len(data) != nbytes:
            raise MoverError(f"slot file of {len(data)} bytes where {nbytes} were announced")
        return torch.from_numpy(data)

    def close(self) -> None:
        """The folder is the board's to remove."""


def open_ring_sender(request: MoverRequest) -> RingSender:
    """Sending end of the shared-memory, file or CUDA IPC mover."""
    receivers, slots_bytes = len(request.receivers), request.slots * request.buffer_bytes
    handles, address = b"", ""
    board: Board
    slots: Slots
    if request.kind is MoverKind.FILE:
        folder = mover_folder(request.folder) / f"push-{os.getpid()}-{secrets.token_hex(4)}"
        folder.mkdir(mode=0o700)
        address, board, slots = str(folder), FileBoard(folder, owner=True), FileSlots(folder)
    else:
        first = MemoryBoard.size(receivers)
        on_host = request.kind is MoverKind.SHARED_MEMORY
        segment = Segment(first + (slots_bytes if on_host else 0))
        address, board = segment.address, MemoryBoard(segment, receivers)
        if on_host:
            slots = MemorySlots(segment, first, request.buffer_bytes)
        else:
            slots, handles = CudaSlots.allocate(request.slots, request.buffer_bytes)
    endpoint = Endpoint(
        kind=request.kind,
        address=address,
        receivers=receivers,
        buffer_bytes=request.buffer_bytes,
        slots=request.slots,
        handles=handles,
    )
    return RingSender(endpoint, board, slots)


def open_ring_receiver(endpoint: Endpoint, *, rank: int, device: str) -> RingReceiver:
    """Receiving end of the shared-memory, file or CUDA IPC mover."""
    board: Board
    slots: Slots
    if endpoint.kind is MoverKind.FILE:
        folder = Path(endpoint.address)
        if not folder.is_dir():
            raise MoverError(f"{folder}: the sender's folder does not exist here")
        board, slots = FileBoard(folder, owner=False), FileSlots(folder)
    else:
        first = MemoryBoard.size(endpoint.receivers)
        on_host = endpoint.kind is MoverKind.SHARED_MEMORY
        segment = Segment(first + (endpoint.slots * endpoint.buffer_bytes if on_host else 0), endpoint.address)
        board = MemoryBoard(segment, endpoint.receivers)
        slots = (
            MemorySlots(segment, first, endpoint.buffer_bytes) if on_host else CudaSlots.open(endpoint.handles, device)
        )
    return RingReceiver(endpoint, board, slots, rank=rank)
