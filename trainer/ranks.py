"""How a learner rank meets the others and starts DeepSpeed."""

from __future__ import annotations

import contextlib
import datetime
import gc
import io
import logging
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from data.errors import RunError
from rollout.channel import LOOPBACK
from rollout.collective_movers import address_towards
from trainer.heap import keep_freed_memory
from trainer.optimisation import deepspeed_config
from trainer.settings import Device, LearnerSettings


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Which rank this is, and where the ranks meet."""

    rank: int = 0
    ranks: int = 1
    host: str = LOOPBACK
    port: int = 0
    """0 only where there is one rank."""
    local_rank: int = 0


def uses_cuda(settings: LearnerSettings) -> bool:
    """Whether the learner computes on CUDA here."""
    return settings.device is Device.CUDA or (settings.device is Device.AUTO and torch.cuda.is_available())


def prepare_cpu(settings: LearnerSettings, ranks: int) -> None:
    """Set torch's threads, on whose number results depend to the last bit, and keep freed memory; not with CUDA."""
    if not uses_cuda(settings):
        keep_freed_memory()
        torch.set_num_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) // ranks))


def join_ranks(settings: LearnerSettings, place: RankPlace) -> None:
    """Bring up the process group (gloo on CPU, NCCL on CUDA), unless this process has one."""
    cuda = uses_cuda(settings)
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.update(RANK=str(place.rank), LOCAL_RANK=str(place.local_rank))
    os.environ.update(WORLD_SIZE=str(place.ranks), LOCAL_SIZE=str(place.ranks))
    os.environ.update(MASTER_ADDR=place.host, MASTER_PORT=str(place.port))
    import deepspeed
    import deepspeed.comm
    import deepspeed.ops

    # Only DeepSpeed's inference uses this operator; leaving it out spares every new machine a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not cuda and place.host != LOOPBACK:
        # By default gloo listens where this host's name leads, which on many systems is the loopback address.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(address_towards(place.host)))
    timeout = datetime.timedelta(seconds=settings.timeout_s)
    backend = "nccl" if cuda else "gloo"
    if not torch.distributed.is_initialized():
        meeting: dict[str, Any] = {"init_method": f"tcp://{place.host}:{place.port}"}
        if place.ranks == 1:
            meeting = {"store": torch.distributed.HashStore()}  # type: ignore[attr-defined]
        torch.distributed.init_process_group(
            backend, rank=place.rank, world_size=place.ranks, timeout=timeout, **meeting
        )
        # Where someone else in this process destroyed the groups (vLLM's engine does when it ends), DeepSpeed still
        # holds the old ones.
        deepspeed.utils.groups._release_process_group_references()
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def interface_of(address: str) -> str:
    """The network interface that has an address.

    Raises:
        RunError: none has.
    """
    for name, found in psutil.net_if_addrs().items():
        if any(one.address == address for one in found):
            return str(name)
    raise RunError(f"no network interface of this machine has the address {address}")


def start_engine(module: nn.Module, optimiser: torch.optim.AdamW, settings: LearnerSettings, ranks: int) -> Any:
    """A DeepSpeed engine around `module`."""
    import deepspeed

    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    config = deepspeed_config(settings, ranks, trained)
    gc.freeze()  # DeepSpeed collects garbage a dozen times while it starts, to print its memory use
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return deepspeed.initialize(model=module, optimizer=optimiser, config=config)[0]
    finally:
        gc.unfreeze()


def take_part(gathers: Iterator[object]) -> None:
    """Run through gathers for the sake of the other ranks, which need this one in each."""
    deque(gathers, maxlen=0)
