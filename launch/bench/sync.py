"""`windlass bench sync`: a push of all weights to another process, by the movers of the weight channel.

The sender packs and seals buckets, the mover carries them, the receiver verifies them and loads them into a module, as
in a job; the probe is left out, because it computes. The link is a plain copy of as many bytes in memory: what shared
memory cannot beat, and four copies (pack, write, read, load) cannot reach.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import tyro
from torch import nn

from data.errors import RequestError
from launch.bench.child import Child, Functions
from launch.bench.frame import Local, Way, answer, paired
from launch.bench.models import BenchModel, bench_model
from launch.bench.settings import BenchSettings, Device
from rollout.buckets import HEADER_BYTES, as_bytes, checksum, plan_buckets
from rollout.channel import LOOPBACK, ChannelSettings
from rollout.movers import CARD_TO_CARD, ON_CARDS, MoverKind, MoverRequest
from rollout.receiving import ModuleInbox, PushMessage
from rollout.sending import ModuleSource

GPU_MOVERS: Final = tuple(kind for kind in ON_CARDS if kind not in CARD_TO_CARD)
"""Both processes are on one card, which NCCL refuses."""


class SyncBench(BenchSettings):
    """Arguments of `windlass bench sync`; the common ones about prompts and beams change nothing."""

    movers: str = ""
    """Comma-separated movers; the first is the one in the common fields. By default all of the device's."""
    weights: ChannelSettings = ChannelSettings()
    """Buckets and deadlines."""

    def chosen_movers(self) -> tuple[MoverKind, ...]:
        """The movers to time.

        Raises:
            RequestError: an unknown mover, or one of the other device.
        """
        gpu = self.device is Device.CUDA
        possible = GPU_MOVERS if gpu else tuple(kind for kind in MoverKind if kind not in ON_CARDS)
        named = [name.strip() for name in self.movers.split(",") if name.strip()]
        for name in named:
            if name not in [kind.value for kind in possible]:
                raise RequestError("--movers", name, ", ".join(possible))
        return tuple(MoverKind(name) for name in named) or possible


def sync_command(
    settings: Annotated[SyncBench, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Time a push of the model's weights into another process, beside a plain copy of as many bytes."""
    movers = settings.chosen_movers()
    torch.set_num_threads(settings.threads)
    with bench_model(settings) as model, ExitStack() as stack:
        module = load(model, settings)
        # The receiver starts with other weights, so that the check sees what was not loaded.
        with torch.no_grad():
            for tensor in module.state_dict().values():
                tensor.add_(1)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="windlass-push-"))
        pushes = {}
        for mover in movers:
            child = Child(receiver, model.hf_dir, settings.dtype.value, settings.device, environment={})
            stack.callback(child.close)
            pushes[mover.value] = Push(settings, mover, module, child, Path(folder))
            stack.callback(pushes[mover.value].close)
        nbytes = pushes[movers[0].value].nbytes
        link = Local(copier(nbytes, settings.device), settings.device)
        ways = {
            name: Way(time=push.time, settings=push.record(), peak_mib=push.peak_mib) for name, push in pushes.items()
        }
        ways["copy"] = Way(time=link.time, peak_mib=link.peak_mib, settings={"threads": settings.threads})
        seconds = paired(ways, settings.repeats)
        sent = digests(module)
        same = {name: push.child.call("digests") == sent for name, push in pushes.items()}
        filled = answer(
            settings, ways, seconds, checked=all(same.values()), ours=movers[0].value, check={"equal": same}
        )
    gb_per_s = {name: nbytes / way["seconds"]["median"] / 1e9 for name, way in filled["ways"].items()}
    ours = movers[0].value
    return {
        "bytes": nbytes,
        "gb_per_s": gb_per_s[ours],
        "link_gb_per_s": gb_per_s["copy"],
        "link_fraction": gb_per_s[ours] / gb_per_s["copy"],
        "calls": pushes[ours].calls,
        "tensors": pushes[ours].tensors,
        "movers": {
            name: {"gb_per_s": gb_per_s[name], "link_fraction": gb_per_s[name] / gb_per_s["copy"]} for name in pushes
        },
        **filled,
    }


def load(model: BenchModel, settings: SyncBench) -> nn.Module:
    """The model as a module on the device."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(model.hf_dir, dtype=getattr(torch, settings.dtype.value))
    moved: nn.Module = module.to(settings.device.value)
    return moved


class Push:
    """One mover between this process and another."""

    def __init__(self, settings: SyncBench, mover: MoverKind, module: nn.Module, child: Child, folder: Path) -> None:
        weights = settings.weights
        self.child = child
        self._deadline_s = weights.deadline_s
        self._source = ModuleSource(module)
        specs, aliases = self._source.describe_weights()
        self._layout = plan_buckets(specs, bucket_bytes=weights.bucket_bytes, aliases=aliases)
        self._request = MoverRequest(
            kind=mover,
            receivers=("receiver",),
            buffer_bytes=HEADER_BYTES + min(weights.bucket_bytes, self._layout.total_bytes),
            slots=weights.slots,
            host=weights.host or LOOPBACK,
            folder=str(folder),
        )
        self._version = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, tied ones once."""
        return self._layout.total_bytes

    @property
    def calls(self) -> int:
        """Transfers of a push: buckets, and the message."""
        return self._layout.buckets + 1

    @property
    def tensors(self) -> int:
        """Tensors that travel."""
        return len(self._layout.specs)

    def record(self) -> dict[str, Any]:
        """Settings for the answer."""
        return {"bucket_bytes": self._layout.bucket_bytes, "slots": self._request.slots}

    def time(self) -> float:
        """Seconds from opening the push to the receiver's receipt."""
        self._version += 1
        begin = time.perf_counter()
        message = PushMessage(
            version=self._version,
            layout=self._layout,
            endpoint=self._source.open_push(self._request),
            deadline_s=self._deadline_s,
        )
        with self.child.concurrently("receive", message):
            self._source.send_push(message)
        return time.perf_counter() - begin

    def peak_mib(self) -> float:
        """Peak memory of the receiver."""
        return float(self.child.call("peak_mib"))

    def close(self) -> None:
        """Free the sender."""
        self._source.close()


def receiver(hf_dir: Path, dtype: str, device: Device) -> Functions:
    """The other process: a module that takes pushes."""
    from transformers import AutoModelForCausalLM

    from launch.bench.frame import PeakMemory

    module = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=getattr(torch, dtype)).to(device.value)
    inbox = ModuleInbox(module)
    peak = PeakMemory(device)
    peak.start()

    def receive(message: PushMessage) -> None:
        inbox.receive(message, rank=0)

    return {"receive": receive, "digests": lambda: digests(module), "peak_mib": peak.mib, "close": inbox.close}


def digests(module: nn.Module) -> dict[str, int]:
    """Checksum of every tensor."""
    return {name: checksum(as_bytes(tensor)) for name, tensor in module.state_dict().items()}


def copier(nbytes: int, device: Device) -> Callable[[], object]:
    """A copy of as many bytes in the device's memory."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device.value)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)
