"""One scoring process of the reward service: a ranker, a thread that runs it, deadlines and counters.

Calls are scored one after another in a thread of their own, so that a slow ranker delays neither health checks nor
deadlines. A call that waited longer than its deadline is dropped before it starts.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Count
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from data.records import RewardFailure
from reward.batch_scoring import BatchScores, score_batch
from reward.http_api import build_app
from reward.ranker import Option, Ranker, load_ranker
from reward.wire import ScoreCall, ScoreReply


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """What a replica needs to know; plain values, because they travel to another process."""

    ranker: str
    ranker_options: dict[str, Option] = field(default_factory=dict)
    chunk: int = 64
    threads: int = 1
    deadline_s: float = 60.0
    max_body_bytes: int = 32 * 2**20
    token: str | None = None


class RewardReplica:
    """Scores calls that come through a handle (`score_call`) or over HTTP (`__serve_build_asgi_app__`)."""

    def __init__(self, options: ReplicaOptions, ranker: Ranker | None = None) -> None:
        """Load the ranker (or take the given one) and set the compute threads of this process.

        Raises:
            RequestError: the ranker cannot be loaded.
        """
        import torch

        torch.set_num_threads(options.threads)
        self.options = options
        self.ranker = load_ranker(options.ranker, options.ranker_options) if ranker is None else ranker
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ranker")
        self._busy_since: float | None = None
        self._registry = CollectorRegistry()
        self._calls = Counter("windlass_reward_calls", "Scoring calls", ["transport"], registry=self._registry)
        self._samples = Counter("windlass_reward_samples", "Samples by outcome", ["outcome"], registry=self._registry)
        self._seconds = Histogram(
            "windlass_reward_seconds", "Seconds per call, waiting included", registry=self._registry
        )

    async def score_call(self, call: ScoreCall) -> ScoreReply:
        """Score a call of the training loop (through a Serve handle)."""
        return ScoreReply.pack(await self._score(call, "handle"))

    def __serve_build_asgi_app__(self) -> Callable[..., Awaitable[None]]:
        """The HTTP face; Ray Serve asks for it after the constructor."""
        return build_app(
            score=lambda call: self._score(call, "http"),
            metrics=lambda: generate_latest(self._registry),
            ready=lambda: not self.hangs,
            token=self.options.token,
            max_body_bytes=self.options.max_body_bytes,
        )

    @property
    def hangs(self) -> bool:
        """True when the ranker has been at one call for longer than two deadlines."""
        since = self._busy_since
        return since is not None and time.monotonic() - since > 2 * self.options.deadline_s

    def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises.

        Raises:
            RuntimeError: the ranker hangs.
        """
        if self.hangs:
            raise RuntimeError("the ranker hangs")

    async def _score(self, call: ScoreCall, transport: str) -> BatchScores:
        start = time.monotonic()
        self._calls.labels(transport).inc()
        future = asyncio.get_running_loop().run_in_executor(self._thread, self._run, call)
        try:
            result = await asyncio.wait_for(future, self.options.deadline_s)
        except TimeoutError:
            result = BatchScores.failed(len(call), RewardFailure.TIMEOUT)
        for reason, count in Count(result.failure_N.tolist()).items():
            self._samples.labels(reason or "scored").inc(count)
        self._seconds.observe(time.monotonic() - start)
        return result

    def _run(self, call: ScoreCall) -> BatchScores:
        self._busy_since = time.monotonic()
        try:
            return score_batch(
                self.ranker, call.histories(), call.candidates(), chunk=self.options.chunk, needs=call.needs
            )
        finally:
            self._busy_since = None
