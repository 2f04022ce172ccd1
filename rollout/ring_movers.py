"""Movers built on a ring of slots and a board of counters: shared memory, files, CUDA IPC.

The sender writes buffer n into slot n mod S and then raises its counter to n + 1; a receiver copies the slot out and
raises its own. The sender reuses a slot when every receiver has taken it, so the memory is S buffers whatever the size
of the model. Counters only grow, over all pushes of a connection.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

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

_ERROR_BYTES = 2048
_PAGE = 4096


class Board(ABC):
    """Counters and an error text that both sides see."""

    @abstractmethod
    def sent(self) -> int:
        """Buffers sent."""

    @abstractmethod
    def post_sent(self, count: int) -> None:
        """Set the sender's counter; everything written before is visible to who reads the new value."""

    @abstractmethod
    def taken(self, rank: int) -> int:
        """Buffers receiver `rank` has taken."""

    @abstractmethod
    def post_taken(self, rank: int, count: int) -> None:
        """Set the counter of a receiver."""

    @abstractmethod
    def error(self) -> str:
        """What failed on either side; empty while all is well."""

    @abstractmethod
    def post_error(self, text: str) -> None:
        """Tell both sides; the first text stays."""

    @abstractmethod
    def close(self) -> None:
        """Free."""


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


class Segment:
    """Anonymous shared memory (memfd): it has no name to leak, and no /dev/shm limit of a container applies.

    Other processes of the same user on the same host open it through /proc. A kill of all sides frees it.
    """

    def __init__(self, size: int, address: str = "") -> None:
        if address:
            self.address = address
            pid, descriptor, token = address.split(":")
            path = f"/proc/{pid}/fd/{descriptor}"
            try:
                self._descriptor = os.open(path, os.O_RDWR)
            except OSError as error:
                raise MoverError(
                    f"shared memory of process {pid} cannot be opened ({error.strerror}): it ended, or runs on another "
                    "host, in another container or as another user; there, use the file or gloo mover"
                ) from error
            if os.fstat(self._descriptor).st_size != size:
                os.close(self._descriptor)
                raise MoverError(f"{path} is not the shared memory that was announced")
        else:
            self._descriptor = os.memfd_create("windlass-push")
            os.ftruncate(self._descriptor, size)
            token = secrets.token_hex(7)
            self.address = f"{os.getpid()}:{self._descriptor}:{token}"
        self._map = mmap.mmap(self._descriptor, size)
        self.bytes: np.ndarray | None = np.frombuffer(self._map, dtype=np.uint8)
        self.words = self.bytes[: _PAGE * (size // _PAGE)].view(np.int64)
        if not address:
            self.words[0] = int(token, 16)
        elif self.words[0] != int(token, 16):
            self.close()
            raise MoverError(f"/proc/{pid}/fd/{descriptor} belongs to another push")

    def close(self) -> None:
        """Unmap; views that live on keep the mapping until they go."""
        if self.bytes is None:
            return
        self.bytes = None
        self.words = np.zeros(0, dtype=np.int64)
        os.close(self._descriptor)
        # Somebody else's view: the mapping goes with it.
        with contextlib.suppress(BufferError):
            self._map.close()


class MemoryBoard(Board):
    """A board in the first bytes of a segment: token, sent, error length, taken per receiver, error text."""

    def __init__(self, segment: Segment, receivers: int) -> None:
        self._segment = segment
        self._words: np.ndarray | None = segment.words[: 3 + receivers]
        self._error_at = 8 * (3 + receivers)

    @staticmethod
    def size(receivers: int) -> int:
        """Bytes of the board, whole pages."""
        return -(-(8 * (3 + receivers) + _ERROR_BYTES) // _PAGE) * _PAGE

    @property
    def _open(self) -> np.ndarray:
        if self._words is None:
            raise MoverError("the connection is closed")
        return self._words

    def sent(self) -> int:
        """See `Board`."""
        return int(self._open[1])

    def post_sent(self, count: int) -> None:
        """See `Board`."""
        # Gives the interpreter lock up and takes it again; its atomics order the payload before the counter also on
        # machines that reorder stores.
        time.sleep(0)
        self._open[1] = count

    def taken(self, rank: int) -> int:
        """See `Board`."""
        return int(self._open[3 + rank])

    def post_taken(self, rank: int, count: int) -> None:
        """See `Board`."""
        time.sleep(0)
        self._open[3 + rank] = count

    def error(self) -> str:
        """See `Board`."""
        length = int(self._open[2])
        if not length or self._segment.bytes is None:
            return ""
        return bytes(self._segment.bytes[self._error_at : self._error_at + length]).decode(errors="replace")

    def post_error(self, text: str) -> None:
        """See `Board`."""
        if self._words is None or self._words[2] or self._segment.bytes is None:
            return
        data = text.encode()[:_ERROR_BYTES]
        self._segment.bytes[self._error_at : self._error_at + len(data)] = np.frombuffer(data, dtype=np.uint8)
        time.sleep(0)
        self._words[2] = len(data)

    def close(self) -> None:
        """See `Board`."""
        self._words = None
        self._segment.close()


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


class FileBoard(Board):
    """A board of small files, each replaced whole by a rename."""

    def __init__(self, folder: Path, *, owner: bool) -> None:
        self._folder = folder
        self._owner = owner

    def _read(self, name: str) -> str:
        try:
            return (self._folder / name).read_text()
        except FileNotFoundError as error:
            if not self._folder.is_dir():
                raise PeerError("the sender closed the connection") from error
            return ""

    def _write(self, name: str, text: str) -> None:
        temporary = self._folder / f".{name}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            temporary.write_text(text)
            temporary.rename(self._folder / name)
        except FileNotFoundError as error:
            raise PeerError("the sender closed the connection") from error

    def sent(self) -> int:
        """See `Board`."""
        return int(self._read("sent") or 0)

    def post_sent(self, count: int) -> None:
        """See `Board`."""
        self._write("sent", str(count))

    def taken(self, rank: int) -> int:
        """See `Board`."""
        return int(self._read(f"taken-{rank}") or 0)

    def post_taken(self, rank: int, count: int) -> None:
        """See `Board`."""
        self._write(f"taken-{rank}", str(count))

    def error(self) -> str:
        """See `Board`."""
        return self._read("error")

    def post_error(self, text: str) -> None:
        """See `Board`."""
        if self._folder.is_dir() and not (self._folder / "error").exists():
            self._write("error", text[:_ERROR_BYTES])

    def close(self) -> None:
        """See `Board`."""
        if self._owner:
            shutil.rmtree(self._folder, ignore_errors=True)


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
