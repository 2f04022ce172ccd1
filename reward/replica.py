"""One scoring process of the reward service: its rankers, a thread that runs them, deadlines and counters.

A ranker scores items, a list-wise ranker credits the positions of lists by swaps; a replica has one of them or both.
What is asked of one that it has not fails as a bad request.

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
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from data.records import RewardFailure
from reward.batch_scoring import BatchScores, score_batch
from reward.http_api import build_app
from reward.list_ranker import load_list_ranker
from reward.ranker import Option, Ranker, load_ranker
from reward.swap_calls import SwapCall, SwapReply, SwapScorer
from reward.swap_evaluation import ListRanker
from reward.wire import ScoreCall, ScoreReply


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """What a replica needs to know; plain values, because they travel to another process."""

    ranker: str | None = None
    ranker_options: dict[str, Option] = field(default_factory=dict)
    list_ranker: str | None = None
    list_ranker_options: dict[str, Option] = field(default_factory=dict)
    cache_lists: int = 1_000_000
    chunk: int = 64
    threads: int = 1
    deadline_s: float = 60.0
    max_body_bytes: int = 32 * 2**20
    token: str | None = None


C = TypeVar("C", ScoreCall, SwapCall)
R = TypeVar("R", BatchScores, SwapReply)


class RewardReplica:
    """Answers calls that come through a handle (`score_call`, `swap_call`) or HTTP (`__serve_build_asgi_app__`)."""

    def __init__(
        self, options: ReplicaOptions, ranker: Ranker | None = None, list_ranker: ListRanker | None = None
    ) -> None:
        """Load the rankers (or take the given ones) and set the compute threads of this process.

        Raises:
            RequestError: a ranker cannot be loaded.
        """
        import torch

        torch.set_num_threads(options.threads)
        self.options = options
        if ranker is None and options.ranker is not None:
            ranker = load_ranker(options.ranker, options.ranker_options)
        if list_ranker is None and options.list_ranker is not None:
            list_ranker = load_list_ranker(options.list_ranker, options.list_ranker_options)
        self.ranker = ranker
        self._swaps = None if list_ranker is None else SwapScorer(list_ranker, options.cache_lists)
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

    async def swap_call(self, call: SwapCall) -> SwapReply:
        """Credit the lists of a step of the training loop (through a Serve handle)."""
        return await self._credit(call, "handle")

    def __serve_build_asgi_app__(self) -> Callable[..., Awaitable[None]]:
        """The HTTP face; Ray Serve asks for it after the constructor."""
        return build_app(
            score=lambda call: self._score(call, "http"),
            credit=lambda call: self._credit(call, "http"),
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
        return await self._answer(call, transport, self._run_scores, BatchScores.failed)

    async def _credit(self, call: SwapCall, transport: str) -> SwapReply:
        return await self._answer(call, transport, self._run_swaps, SwapReply.failed)

    async def _answer(
        self, call: C, transport: str, run: Callable[[C], R], failed: Callable[[int, RewardFailure], R]
    ) -> R:
        start = time.monotonic()
        self._calls.labels(transport).inc()
        future = asyncio.get_running_loop().run_in_executor(self._thread, self._timed, run, call)
        try:
            result = await asyncio.wait_for(future, self.options.deadline_s)
        except TimeoutError:
            result = failed(len(call), RewardFailure.TIMEOUT)
        for reason, count in Count(result.failure_N.tolist()).items():
            self._samples.labels(reason or "scored").inc(count)
        self._seconds.observe(time.monotonic() - start)
        return result

    def _timed(self, run: Callable[[C], R], call: C) -> R:
        self._busy_since = time.monotonic()
        try:
            return run(call)
        finally:
            self._busy_since = None

    def _run_scores(self, call: ScoreCall) -> BatchScores:
        if self.ranker is None:
            return BatchScores.failed(len(call), RewardFailure.BAD_REQUEST)
        return score_batch(self.ranker, call.histories(), call.candidates(), chunk=self.options.chunk, needs=call.needs)

    def _run_swaps(self, call: SwapCall) -> SwapReply:
        if self._swaps is None:
            return SwapReply.failed(len(call), RewardFailure.BAD_REQUEST)
        return self._swaps.credit(call)
