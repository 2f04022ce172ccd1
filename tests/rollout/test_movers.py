"""Contract of every CPU mover: buffers arrive in order and unchanged at all receivers, whatever their sizes and number;
an error told by one side comes up at the others; silence ends at the deadline; nothing is left behind.

Not covered: the last calls of both NCCLs and of CUDA IPC (they need a GPU); several hosts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.errors import RequestError
from rollout import vllm_internals
from rollout.collective_movers import _Group
from rollout.movers import (
    ON_CARDS,
    BucketReceiver,
    BucketSender,
    Deadline,
    Endpoint,
    MoverError,
    MoverKind,
    MoverRequest,
    MoverTimeout,
    PeerError,
    open_receiver,
    open_sender,
)
from rollout.vllm_nccl import VllmNcclGroup
from tests.requirements import require

CPU_MOVERS = (MoverKind.SHARED_MEMORY, MoverKind.FILE, MoverKind.GLOO)
BUFFER = 1 << 12


@pytest.fixture(params=CPU_MOVERS, ids=lambda kind: kind.value)
def request_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], MoverRequest]:
    return lambda receivers: MoverRequest(
        kind=request.param,
        receivers=tuple(f"engine-{i}" for i in range(receivers)),
        buffer_bytes=BUFFER,
        folder=str(tmp_path),
    )


@contextlib.contextmanager
def opened(request: MoverRequest) -> Iterator[BucketSender]:
    sender = open_sender(request)
    try:
        yield sender
    finally:
        sender.close()


def buffers(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [
        torch.randint(0, 256, (BUFFER if i % 3 else 1 + 37 * i,), generator=generator, dtype=torch.uint8)
        for i in range(count)
    ]


def in_thread(call: Callable[[], Any]) -> Future[Any]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future


def take(endpoint: Endpoint, rank: int, sizes: list[int], seconds: float = 20) -> list[torch.Tensor]:
    deadline = Deadline(seconds)
    receiver = open_receiver(endpoint, rank=rank, device="cpu", deadline=deadline)
    try:
        return [receiver.receive(size, deadline) for size in sizes]
    finally:
        receiver.close()


def send_many(sender: BucketSender, count: int, deadline: Deadline) -> None:
    for _ in range(count):
        sender.send(torch.zeros(BUFFER, dtype=torch.uint8), deadline)
    sender.finish(deadline)


@pytest.mark.parametrize("kind", ON_CARDS)
def test_movers_of_cards_are_refused_without_cuda(kind: MoverKind) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    with pytest.raises(RequestError, match=rf"weights\.mover: {kind.value}; legal: shared_memory, file or gloo where"):
        open_sender(MoverRequest(kind=kind, receivers=("engine",), buffer_bytes=BUFFER))


class FakeCommunicator:
    """vLLM's communicator without a card: keeps what it was made of and what it was asked for."""

    def __init__(self, *made_of: Any) -> None:
        self.made_of = made_of
        self.asked: list[Any] = []

    def broadcast(self, tensor: torch.Tensor, *, src: int, stream: Any) -> None:
        self.asked.append((tensor, src, stream))

    def destroy(self) -> None:
        self.asked.append("destroy")


class FakeStream:
    """A stream that keeps what it waited for."""

    def __init__(self, _: object = None) -> None:
        self.waited: list[str] = []

    def wait_stream(self, other: str) -> None:
        self.waited.append(other)

    def record_event(self) -> Any:
        return SimpleNamespace(query=lambda: True, synchronize=lambda: None)


def test_vllms_communicator_gets_one_id_and_waits_for_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = iter([bytes(range(128))])
    monkeypatch.setattr(vllm_internals, "nccl_unique_id", lambda: next(ids))
    monkeypatch.setattr(vllm_internals, "nccl_communicator", FakeCommunicator)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "present")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    theirs = torch.distributed.TCPStore("127.0.0.1", store.port, is_master=False)
    device = torch.device("cpu")
    late = in_thread(lambda: VllmNcclGroup(theirs, 1, 2, device))
    groups: list[Any] = [VllmNcclGroup(store, 0, 2, device), late.result(20)]
    made_of = [group._communicator.made_of for group in groups]
    assert made_of == [(bytes(range(128)), rank, 2, device) for rank in (0, 1)]
    buffer = torch.zeros(4, dtype=torch.uint8)
    work = groups[0].broadcast([buffer], SimpleNamespace(rootRank=0))
    assert work.is_completed()
    work.wait()
    groups[0].abort()
    stream = groups[0]._stream
    assert stream.waited == ["present"]
    assert groups[0]._communicator.asked == [(buffer, 0, stream), "destroy"]


@pytest.mark.parametrize(
    ("kind", "pending", "ended"),
    [
        (MoverKind.VLLM_NCCL, False, True),
        (MoverKind.VLLM_NCCL, True, True),
        (MoverKind.NCCL, False, False),
        (MoverKind.NCCL, True, True),
        (MoverKind.GLOO, True, False),
    ],
)
def test_a_communicator_that_nobody_frees_is_ended(kind: MoverKind, pending: bool, ended: bool) -> None:
    """Engines come and go, so that a run has many connections; vLLM's communicator outlives its last reference."""
    asked: list[str] = []
    group = _Group(Endpoint(kind=kind, address="h:1", receivers=1, buffer_bytes=BUFFER, slots=2), None, 0)
    group.close()
    group._group = SimpleNamespace(abort=lambda: asked.append("abort"))
    group._pending = pending
    group.close()
    group.close()
    assert asked == ["abort"] * ended


def test_a_communicator_that_is_switched_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own: it takes broadcasts without a word and moves nothing."""
    require("vllm")
    from vllm import envs

    # Not in the environment: vLLM has read it where an engine was started in this process.
    monkeypatch.setitem(vars(envs), "VLLM_DISABLE_PYNCCL", True)
    monkeypatch.setattr(vllm_internals, "nccl_unique_id", lambda: bytes(128))
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(RequestError, match=r"weights\.mover: vllm_nccl, which vLLM has switched off; legal: nccl"):
        VllmNcclGroup(store, 0, 2, torch.device("cpu"))


@pytest.mark.parametrize("receivers", [1, 3])
def test_buffers_arrive_in_order_and_unchanged(request_of: Callable[[int], MoverRequest], receivers: int) -> None:
    sent = buffers(9)
    with opened(request_of(receivers)) as sender:
        takers = [
            in_thread(lambda r=rank: take(sender.endpoint, r, [b.numel() for b in sent])) for rank in range(receivers)
        ]
        deadline, scratch = Deadline(20), torch.empty(BUFFER, dtype=torch.uint8)
        for buffer in sent:
            # The sender may overwrite its buffer as soon as `send` returns.
            scratch[: buffer.numel()] = buffer
            sender.send(scratch[: buffer.numel()], deadline)
            scratch.fill_(7)
        sender.finish(deadline)
        for taker in takers:
            assert all(torch.equal(a, b) for a, b in zip(taker.result(20), sent, strict=True))


def test_one_connection_serves_many_pushes(request_of: Callable[[int], MoverRequest]) -> None:
    with opened(request_of(1)) as sender:
        receiver: BucketReceiver | None = None
        connect = in_thread(lambda: open_receiver(sender.endpoint, rank=0, device="cpu", deadline=Deadline(20)))
        receiver = connect.result(20)
        for push in range(3):
            sent = buffers(push + 2)
            taker = in_thread(lambda s=sent: [receiver.receive(b.numel(), Deadline(20)) for b in s])
            for buffer in sent:
                sender.send(buffer, Deadline(20))
            sender.finish(Deadline(20))
            assert all(torch.equal(a, b) for a, b in zip(taker.result(20), sent, strict=True))
        receiver.close()


def test_a_restarted_receiver_is_served_or_told_at_once(request_of: Callable[[int], MoverRequest]) -> None:
    with opened(request_of(1)) as sender:
        for attempt in range(2):
            taker = in_thread(lambda: take(sender.endpoint, 0, [BUFFER] * 3))
            begun = time.monotonic()
            if attempt and sender.endpoint.kind is MoverKind.GLOO:
                with pytest.raises(MoverError):
                    send_many(sender, 3, Deadline(20))
                with pytest.raises(MoverError, match="restarted"):
                    taker.result(20)
            else:
                send_many(sender, 3, Deadline(20))
                assert len(taker.result(20)) == 3
            assert time.monotonic() - begun < 10


def test_the_receivers_error_comes_up_at_the_sender(request_of: Callable[[int], MoverRequest]) -> None:
    def fail_after_one() -> None:
        receiver = open_receiver(sender.endpoint, rank=0, device="cpu", deadline=Deadline(20))
        receiver.receive(BUFFER, Deadline(20))
        receiver.fail("out of memory at layer 3")
        receiver.close()

    with opened(request_of(2)) as sender:
        failing = in_thread(fail_after_one)
        other = in_thread(lambda: take(sender.endpoint, 1, [BUFFER] * 50))
        begun, deadline = time.monotonic(), Deadline(20)
        with pytest.raises(PeerError, match="out of memory at layer 3"):
            send_many(sender, 50, deadline)
        failing.result(20)
        with pytest.raises(MoverError, match=r"out of memory|closed"):
            other.result(20)
        assert time.monotonic() - begun < 10


def test_the_senders_error_comes_up_at_the_receiver(request_of: Callable[[int], MoverRequest]) -> None:
    with opened(request_of(1)) as sender:
        taker = in_thread(lambda: take(sender.endpoint, 0, [BUFFER, BUFFER]))
        sender.send(torch.zeros(BUFFER, dtype=torch.uint8), Deadline(20))
        sender.fail("gathering layer 5 failed")
        begun = time.monotonic()
        with pytest.raises(PeerError, match="gathering layer 5 failed"):
            taker.result(20)
        assert time.monotonic() - begun < 5


def test_a_sender_that_closes_early_comes_up_at_the_receiver(request_of: Callable[[int], MoverRequest]) -> None:
    with opened(request_of(1)) as sender:
        taker = in_thread(lambda: take(sender.endpoint, 0, [BUFFER, BUFFER]))
        sender.send(torch.zeros(BUFFER, dtype=torch.uint8), Deadline(20))
        sender.finish(Deadline(20))
    with pytest.raises(MoverError):
        taker.result(10)


def test_silence_ends_at_the_deadline_on_both_sides(request_of: Callable[[int], MoverRequest]) -> None:
    with opened(request_of(1)) as sender:
        begun = time.monotonic()
        with pytest.raises(MoverTimeout):
            send_many(sender, 10, Deadline(0.5))
        assert time.monotonic() - begun < 8
    with opened(request_of(1)) as sender:
        begun = time.monotonic()
        with pytest.raises(MoverTimeout):
            take(sender.endpoint, 0, [BUFFER], seconds=0.5)
        assert time.monotonic() - begun < 8


def test_a_dead_sender_is_an_error_not_a_hang(request_of: Callable[[int], MoverRequest]) -> None:
    with opened(request_of(1)) as sender:
        endpoint = sender.endpoint
    begun = time.monotonic()
    with pytest.raises(MoverError):
        take(endpoint, 0, [BUFFER], seconds=2)
    assert time.monotonic() - begun < 10


def test_nothing_is_left_behind(request_of: Callable[[int], MoverRequest], tmp_path: Path) -> None:
    before, threads = set(os.listdir("/dev/shm")), threading.active_count()
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with opened(request_of(1)) as sender:
            taker = in_thread(lambda s=sender: take(s.endpoint, 0, [BUFFER]))
            sender.send(torch.zeros(BUFFER, dtype=torch.uint8), Deadline(20))
            sender.finish(Deadline(20))
            taker.result(20)
    del taker, sender
    assert set(os.listdir("/dev/shm")) <= before
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 8
    assert threading.active_count() <= threads + 1


def test_another_process_receives(request_of: Callable[[int], MoverRequest]) -> None:
    """The receiver in a process of its own, as an engine is."""
    script = (
        "import sys, json, torch\n"
        "from rollout.movers import *\n"
        "e = json.loads(sys.argv[1]); e['kind'] = MoverKind(e['kind']); e['handles'] = b''\n"
        "d = Deadline(60)\n"
        "r = open_receiver(Endpoint(**e), rank=0, device='cpu', deadline=d)\n"
        "print(sum(int(r.receive(4096, d).long().sum()) for _ in range(5)))\n"
        "r.close()\n"
    )
    import json

    with opened(request_of(1)) as sender:
        fields = {**dataclasses.asdict(sender.endpoint), "handles": ""}
        root = Path(__file__).resolve().parents[2]
        child = subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(fields)], cwd=root, stdout=subprocess.PIPE, text=True
        )
        deadline = Deadline(60)
        for value in range(5):
            sender.send(torch.full((BUFFER,), value, dtype=torch.uint8), deadline)
        sender.finish(deadline)
        out, _ = child.communicate(timeout=60)
    assert int(out) == BUFFER * (0 + 1 + 2 + 3 + 4)


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="at least one engine"):
        open_sender(MoverRequest(kind=MoverKind.SHARED_MEMORY, receivers=(), buffer_bytes=64))
    with pytest.raises(RequestError, match="existing folder"):
        open_sender(
            MoverRequest(kind=MoverKind.FILE, receivers=("a",), buffer_bytes=64, folder=str(tmp_path / "missing"))
        )
    with opened(MoverRequest(kind=MoverKind.SHARED_MEMORY, receivers=("a",), buffer_bytes=64)) as sender:
        with pytest.raises(RequestError, match="rank"):
            open_receiver(sender.endpoint, rank=1, device="cpu", deadline=Deadline(1))
        with pytest.raises(MoverError, match="slots of 64"):
            sender.send(torch.zeros(65, dtype=torch.uint8), Deadline(1))
