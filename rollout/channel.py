"""The weight channel: takes the learner's weights to every engine, and shows a version only after two checks.

    describe → metadata message → packed buckets → check 1: checksums of what every engine received
                                                 → check 2: the probe → published on all engines, or on none
    an engine comes up later: what the last push left behind → both checks → published on this engine

Errors of any side come up here as `PushError` before the deadline. An engine that stopped half way holds a mixture of
two versions: it is marked failed and replaced, and the push is repeated, unless a check failed: then something is
wrong with the weights themselves and the run must stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import Field

from data.records import FloatArray
from data.settings import Settings
from rollout.buckets import ALIGNMENT, HEADER_BYTES, plan_buckets
from rollout.kept_push import KeptBuckets, kept_path
from rollout.movers import Deadline, Endpoint, MoverKind, MoverRequest
from rollout.peers import Peer
from rollout.probe import FLOAT32_GAP, Gap, GapAlarm, Probe, ProbeAnswer, check_gap, gap_limit, probe_gap
from rollout.push_failures import Blame, PushError, PushFailure, gather
from rollout.receiving import PushFault, PushMessage, Receipt

_PEER_SHARE = 0.8
"""Share of the deadline the two ends give themselves: their own words are better than our stopwatch."""
KEPT_SHARE = 0.25
"""Share of the float32 limit above which the noise of a push that is kept is measured."""
LOOPBACK = "127.0.0.1"


class KeepPush(StrEnum):
    """Whether the buckets of the last push stay, for engines that come up after it."""

    AUTO = "auto"
    """Where batches are collected ahead: the learners could not repeat the push."""
    ALWAYS = "always"
    NEVER = "never"


class ChannelSettings(Settings):
    """How new weights reach the rollout engines."""

    mover: MoverKind = MoverKind.SHARED_MEMORY
    """`shared_memory` (one host), `file` or `gloo` (CPU, several hosts), `nccl` or `vllm_nccl` (GPUs; the second by
    vLLM's communicator), `cuda_ipc` (GPUs, one host)."""
    bucket_mib: float = Field(32.0, gt=0, le=4096)
    """Size of the packed buckets; `slots` of them are in flight."""
    slots: int = Field(2, ge=1, le=16)
    """Buckets in flight."""
    deadline_s: float = Field(120.0, gt=0)
    """Seconds a push may take before it has failed."""
    probe_deadline_s: float = Field(60.0, gt=0)
    """Seconds the engines and the learner may take to score the probe."""
    replacements: int = Field(1, ge=0)
    """How often in one push failed engines are replaced and the push repeated."""
    folder: str = ""
    """Folder of the file mover, seen by all nodes."""
    keep: KeepPush = KeepPush.AUTO
    """Whether the last push stays in a file of the run directory, so that an engine that comes up later is brought to
    the version at once: auto (with max_staleness above 0), always or never. It has the size of the weights."""
    host: str | None = None
    """Address of the learner's first rank, seen by all engines (gloo and both nccl); none takes what Ray knows."""
    test_fault: PushFault = PushFault.NONE
    """Test-only: what goes wrong."""
    test_fault_version: int = Field(1, ge=0)
    """Test-only: the version whose push goes wrong."""
    test_blind: bool = False
    """Test-only: the faulty push runs without its checks, so that only the policy gap can notice."""

    @property
    def bucket_bytes(self) -> int:
        """Payload of a bucket."""
        return max(1, round(self.bucket_mib * 2**20 / ALIGNMENT)) * ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """A push that became visible."""

    version: int
    nbytes: int
    buckets: int
    gap: Mapping[str, Gap]
    """Probe gap by engine."""
    limit: Gap
    seconds: Mapping[str, float]
    """By phase: `transfer`, `probe`, `total`, and of the transfer `wake` where engines slept."""
    replaced: tuple[str, ...] = ()
    """Engines that were replaced on the way."""


@dataclass(frozen=True, kw_only=True)
class KeptPush:
    """A verified push that an engine can still be brought to."""

    message: PushMessage
    sent: Receipt
    answer: ProbeAnswer


@dataclass
class WeightChannel:
    """Pushes from one learner to the engines.

    The learner is a peer with the methods `describe_weights() -> (specs, aliases)`, `open_push(MoverRequest) ->
    Endpoint`, `send_push(PushMessage) -> Receipt`, `answer_probe(Probe) -> ProbeAnswer` and `probe_noise(Probe) ->
    Gap`; engines are peers with those of `rollout.receiving.ReceivingEngine` and `score(prompts, completions)`.
    """

    settings: ChannelSettings
    source: Peer
    engines: dict[str, Peer]
    probe: Probe
    dtype: str
    """Type the engines compute in: decides the limit of the probe."""
    replace: Callable[[str], Peer | None] | None = None
    """Starts a fresh engine in the place of a failed one; none where the push is to go on without it."""
    workers_per_engine: int = 1
    """Receivers behind one engine (tensor parallel workers)."""
    keep: Path | None = None
    """Folder, seen by all nodes, for the buckets of the last push; none keeps none."""
    version: int | None = None
    """Last version that became visible."""
    kept: KeptPush | None = None
    """What the last push left behind."""
    failed: dict[str, Blame] = field(default_factory=dict)
    """Engines that must be replaced before they may be used."""
    _generation: dict[str, int] = field(default_factory=dict)
    """How often each engine was replaced: another process needs another connection."""

    def push(self, version: int) -> PushReport:
        """Take the learner's present weights to all engines as `version`.

        Raises:
            PushError: it failed; engines in `failed` are unusable, and none shows the version.
        """
        if version < 0:
            raise ValueError(f"weight version {version} is negative")
        replaced: list[str] = []
        for attempt in range(self.settings.replacements + 1):
            self._replace_failed(replaced)
            try:
                return self._push_once(version, tuple(replaced))
            except PushError as error:
                self.failed.update({name: b for name, b in error.blames.items() if name in self.engines})
                helps = bool(self.failed) and self.replace is not None
                if error.alarm or not helps or attempt == self.settings.replacements:
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _replace_failed(self, replaced: list[str]) -> None:
        if self.failed and self.replace is None:
            raise PushError(-1 if self.version is None else self.version, self.failed)
        for name in sorted(self.failed):
            assert self.replace is not None
            peer = self.replace(name)
            if peer is None:
                self.leave(name)
            else:
                self.adopt(name, peer)
            replaced.append(name)

    def adopt(self, name: str, peer: Peer) -> None:
        """Use another process for an engine from now on: one that was restarted, by this channel or by its owner."""
        self.engines[name] = peer
        self._generation[name] = self._generation.get(name, 0) + 1
        self.failed.pop(name, None)

    def leave(self, name: str) -> None:
        """Send nothing more to an engine."""
        self.engines.pop(name, None)
        self.failed.pop(name, None)

    def _push_once(self, version: int, replaced: tuple[str, ...]) -> PushReport:
        begun = time.monotonic()
        deadline = Deadline(self.settings.deadline_s)
        faulty = version == self.settings.test_fault_version
        fault = self.settings.test_fault if faulty else PushFault.NONE
        blind = faulty and self.settings.test_blind and fault is not PushFault.NONE
        message = self._announce(version, fault, blind, deadline)
        sent: Receipt | None = None
        received: dict[str, Receipt] = {}
        if fault is not PushFault.WITHHOLD_PUSH:
            sent, received = self._transfer(message, deadline)
        moved = time.monotonic()
        limit, gaps, answer = Gap(mean=0.0, max=0.0), dict[str, Gap](), None
        if not blind:
            self._check_receipts(version, sent, received, self.engines)
            limit, gaps, answer = self._check_probe(version)
        publish = "publish_unchecked" if blind else "publish_weights"
        calls = {name: peer.submit(publish, version) for name, peer in self.engines.items()}
        gather(version, calls, Deadline(self.settings.probe_deadline_s))
        self.version = version
        self._remember(message, sent, answer)
        now = time.monotonic()
        seconds = {"transfer": moved - begun, "probe": now - moved, "total": now - begun}
        if waking_s := max((receipt.waking_s for receipt in received.values()), default=0.0):
            seconds["wake"] = waking_s
        return PushReport(
            version=version,
            nbytes=message.layout.total_bytes,
            buckets=message.layout.buckets,
            gap=gaps,
            limit=limit,
            seconds=seconds,
            replaced=replaced,
        )

    def _announce(self, version: int, fault: PushFault, blind: bool, deadline: Deadline) -> PushMessage:
        specs, aliases = self._ask_source(version, "describe_weights", deadline=deadline)
        layout = plan_buckets(specs, bucket_bytes=self.settings.bucket_bytes, aliases=aliases)
        request = MoverRequest(
            kind=self.settings.mover,
            receivers=tuple(
                f"{name}/{worker}@{self._generation.get(name, 0)}"
                for name in self.engines
                for worker in range(self.workers_per_engine)
            ),
            buffer_bytes=HEADER_BYTES + min(layout.bucket_bytes, layout.total_bytes),
            slots=self.settings.slots,
            host=self.settings.host or LOOPBACK,
            folder=self.settings.folder,
        )
        endpoint: Endpoint = self._ask_source(version, "open_push", request, deadline=deadline)
        return PushMessage(
            version=version,
            layout=layout,
            endpoint=endpoint,
            deadline_s=_PEER_SHARE * deadline.left,
            keep="" if self.keep is None else str(kept_path(self.keep, version)),
            fault=fault,
            blind=blind,
        )

    def _transfer(self, message: PushMessage, deadline: Deadline) -> tuple[Receipt, dict[str, Receipt]]:
        calls = {
            name: peer.submit("receive_weights", message, rank * self.workers_per_engine)
            for rank, (name, peer) in enumerate(self.engines.items())
        }
        calls[self.source.name] = self.source.submit("send_push", message)
        received = gather(message.version, calls, deadline)
        return received.pop(self.source.name), received

    def _remember(self, message: PushMessage, sent: Receipt | None, answer: ProbeAnswer | None) -> None:
        """What later engines can be brought to; the version before it is forgotten."""
        before, self.kept = self.kept, None
        if message.keep and sent is not None and answer is not None:
            endpoint = KeptBuckets(address=message.keep)
            self.kept = KeptPush(message=replace(message, endpoint=endpoint, keep=""), sent=sent, answer=answer)
        if before is not None and (self.kept is None or self.kept.message.endpoint != before.message.endpoint):
            Path(before.message.endpoint.address).unlink(missing_ok=True)

    def lost_kept(self) -> str:
        """Forget what the last push left behind where somebody took its file away; returns the path, else nothing."""
        if self.kept is None or Path(self.kept.message.endpoint.address).is_file():
            return ""
        path, self.kept = self.kept.message.endpoint.address, None
        return path

    def bring(self, name: str, peer: Peer) -> int:
        """Take the last version to an engine that has not got it, out of what the push left behind; returns it.

        The learner and the other engines have no part in it; the checks are those of a push.

        Raises:
            PushError: it failed; the engine is unusable.
            ValueError: nothing was kept.
        """
        if self.kept is None:
            raise ValueError("no push was kept")
        self.adopt(name, peer)
        kept, deadline = self.kept, Deadline(self.settings.deadline_s)
        version = kept.message.version
        message = replace(kept.message, deadline_s=_PEER_SHARE * deadline.left)
        received = gather(version, {name: peer.submit("receive_weights", message, 0)}, deadline)
        self._check_receipts(version, kept.sent, received, [name])
        deadline = Deadline(self.settings.probe_deadline_s)
        scores = gather(version, {name: self._ask_probe(peer)}, deadline)
        self._compare(version, scores, kept.answer)
        gather(version, {name: peer.submit("publish_weights", version)}, deadline)
        return version

    def _check_receipts(
        self, version: int, sent: Receipt | None, received: Mapping[str, Receipt], names: Iterable[str]
    ) -> None:
        """Check 1: these engines verified exactly the buckets that were sent."""
        blames = {}
        for name in names:
            receipt = received.get(name)
            if sent is None or receipt is None:
                text = f"no receipt for version {version}"
            elif (receipt.version, receipt.checksums) != (version, sent.checksums):
                text = f"received {len(receipt.checksums)} buckets of version {receipt.version} with other checksums"
            elif receipt.tensors != sent.tensors:
                text = f"loaded {receipt.tensors} of {sent.tensors} tensors"
            else:
                continue
            blames[name] = Blame(reason=PushFailure.CHECKSUM, text=text)
        if blames:
            raise PushError(version, blames)

    def _check_probe(self, version: int) -> tuple[Gap, dict[str, Gap], ProbeAnswer]:
        """Check 2: every engine computes what the learner computes."""
        deadline = Deadline(self.settings.probe_deadline_s)
        calls = {name: self._ask_probe(peer) for name, peer in self.engines.items()}
        calls[self.source.name] = self.source.submit("answer_probe", self.probe)
        scores = gather(version, calls, deadline)
        answer: ProbeAnswer = scores.pop(self.source.name)
        largest = max((probe_gap(logp, answer.logp).max for logp in scores.values()), default=0.0)
        # Who comes later is judged by the same answer, when the learner cannot be asked any more.
        unmeasured = FLOAT32_GAP if self.keep is None else KEPT_SHARE * FLOAT32_GAP
        if answer.noise is None and not largest <= unmeasured:
            deadline = Deadline(self.settings.probe_deadline_s)
            answer = replace(answer, noise=self._ask_source(version, "probe_noise", self.probe, deadline=deadline))
        return *self._compare(version, scores, answer), answer

    def _ask_probe(self, peer: Peer) -> Future[Any]:
        return peer.submit("score", list(self.probe.prompts), list(self.probe.completions))

    def _compare(
        self, version: int, scores: Mapping[str, Sequence[FloatArray]], answer: ProbeAnswer
    ) -> tuple[Gap, dict[str, Gap]]:
        """The limit, and every engine's gap to the learner's answer, which is within it."""
        limit = gap_limit(self.dtype, answer.noise)
        gaps: dict[str, Gap] = {}
        blames: dict[str, Blame] = {}
        for name, logp in scores.items():
            gaps[name] = probe_gap(logp, answer.logp)
            try:
                check_gap(gaps[name], limit, f"probe of version {version}")
            except GapAlarm as alarm:
                blames[name] = Blame(reason=PushFailure.PROBE, text=str(alarm))
        if blames:
            raise PushError(version, blames)
        return limit, gaps

    def _ask_source(self, version: int, method: str, *arguments: Any, deadline: Deadline) -> Any:
        name = self.source.name
        return gather(version, {name: self.source.submit(method, *arguments)}, deadline)[name]
