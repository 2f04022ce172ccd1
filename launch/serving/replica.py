"""The process that answers: requests gather into calls of the engines, and what they show is logged before it leaves.

| who | does | waits for whom |
|---|---|---|
| event loop | HTTP, gathers requests and responses into batches | for the two threads below |
| engine thread | one batch after the other: prompts, engines, propensities | for the engines |
| disk thread | one batch after the other: exposures, responses | for the disk |
| watch thread | follows `current`, closes days | for engines that start; nobody waits for it |

While the disk takes one batch the engines work on the next. A new version starts its engines beside the old ones; a
batch is answered by the version that was there when its turn came, and the old engines end behind the last such batch.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from ray import serve

from data.errors import RequestError, RunError, WindlassError
from data.feedback import PropensityKind
from data.records import NO_ITEM, Prompt
from launch.continual.lock import writing
from launch.serving.exposure import ExposureSettings, has_legal_item, propensity_kind, show
from launch.serving.exposure_log import FOLDER, ExposureLog, Response, outcomes_by_kind
from launch.serving.http_app import FeedbackRequest, RecommendRequest, build_app
from launch.serving.metrics import ServiceMetrics
from launch.serving.refusals import Refusal, Refused
from launch.serving.request_ids import RequestIds
from launch.serving.served import Context, ServedVersion, current_number, hides_more, open_registry, prompt_of
from launch.serving.settings import ServeSettings
from rollout.settings import RolloutSettings

LOCK_S: Final = 30.0
"""How long a start waits for the process before it to let go of the log."""
_TICK_S: Final = 0.05


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """What the process needs to know."""

    registry: Path
    log: Path
    settings: ServeSettings
    rollout: RolloutSettings
    token: str | None


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A request whose context is known."""

    request: RecommendRequest
    request_id: str
    timestamp: int
    context: Context
    prompt: Prompt


class ServingReplica:
    """Answers over HTTP (`__serve_build_asgi_app__`)."""

    def __init__(self, options: ReplicaOptions) -> None:
        """Take the log up, start the engines of the served version.

        Raises:
            RequestError: another process writes the log, or a version that cannot be served.
            RunError: engines that do not come up.
        """
        self.options = options
        self.settings = settings = options.settings
        self.metrics = ServiceMetrics()
        self._held = ExitStack()
        _hold(self._held, options.log / FOLDER)
        self._log = ExposureLog(
            options.log, window_s=settings.response_window_s, clock=lambda: time.time() + settings.test_clock_s
        )
        seed = secrets.randbelow(2**31) if settings.draw_seed is None else settings.draw_seed
        self._seed = seed
        self._ids = RequestIds(int(time.time() * 1000), seed)
        self._registry = open_registry(options.registry)
        self._served = ServedVersion.start(self._registry, current_number(self._registry), options.rollout)
        self.metrics.serves(self._served.name)
        self._engine_thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._disk_thread = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._waiting = 0
        self._draining = False
        self._stop = threading.Event()
        self._refused_version: int | None = None
        gather = {"max_batch_size": settings.max_batch, "batch_wait_timeout_s": settings.batch_wait_ms / 1000}
        # While the disk takes one batch the engines work on the next.
        self._answered = serve.batch(self._answer, max_concurrent_batches=2, **gather)
        self._taken = serve.batch(self._take, **gather)
        self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._watcher.start()

    def __serve_build_asgi_app__(self) -> Callable[..., Awaitable[None]]:
        """The HTTP face; Ray Serve asks for it after the constructor."""
        return build_app(
            self.settings,
            recommend=self.recommend,
            feedback=self.feedback,
            health=self.health,
            metrics=self.metrics,
            token=self.options.token,
        )

    # --- requests, on the event loop ---

    async def recommend(self, request: RecommendRequest) -> dict[str, Any]:
        """Answer one request.

        Raises:
            Refused: with the reason.
        """
        return await self._counted(self._answered, request)

    async def feedback(self, request: FeedbackRequest) -> dict[str, Any]:
        """Join responses.

        Raises:
            Refused: with the reason.
        """
        return await self._counted(self._taken, request)

    def health(self) -> Mapping[str, Any]:
        """What answers.

        Raises:
            Refused: the service is being stopped.
        """
        if self._draining:
            raise Refused(Refusal.DRAINING, "the service is being stopped")
        return {
            "status": "ok",
            "policy_version": self._served.name,
            "catalogue_digest": self._served.catalogue.digest,
            "serve": self.settings.serve.value,
            "draw_seed": self._seed,
            "process": os.getpid(),
            "open_requests": self._log.open_requests,
        }

    async def _counted(self, gathered: Callable[[Any], Awaitable[Any]], request: Any) -> dict[str, Any]:
        """Put a request into the next batch, unless too many wait."""
        if self._draining:
            raise Refused(Refusal.DRAINING, "the service is being stopped")
        if self._waiting >= self.settings.max_waiting:
            raise Refused(Refusal.OVERLOADED, f"{self._waiting} requests wait already")
        self._waiting += 1
        self.metrics.waiting.set(self._waiting)
        try:
            answer: dict[str, Any] | Refused = await gathered(request)
        finally:
            self._waiting -= 1
            self.metrics.waiting.set(self._waiting)
        if isinstance(answer, Refused):
            raise answer
        return answer

    async def _answer(self, requests: list[RecommendRequest]) -> list[dict[str, Any] | Refused]:
        loop = asyncio.get_running_loop()
        self.metrics.batch.observe(len(requests))
        try:
            decided = await loop.run_in_executor(self._engine_thread, self._decide, requests)
        except WindlassError as error:
            return [Refused(Refusal.ENGINE, " ".join(str(error).split()))] * len(requests)
        rows = [row for _, row in decided if row is not None]
        try:
            if rows:
                await loop.run_in_executor(self._disk_thread, self._keep, rows)
        except RunError as error:
            return [answer if row is None else Refused(Refusal.DISK, str(error)) for answer, row in decided]
        return [answer for answer, _ in decided]

    async def _take(self, requests: list[FeedbackRequest]) -> list[dict[str, Any] | Refused]:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._disk_thread, self._join, requests)
        except RunError as error:
            return [Refused(Refusal.DISK, str(error))] * len(requests)

    # --- engine thread ---

    def _decide(
        self, requests: Sequence[RecommendRequest]
    ) -> list[tuple[dict[str, Any] | Refused, dict[str, Any] | None]]:
        """An answer and a row of the log for each request; no row where there is nothing to show."""
        begin = time.monotonic()
        served = self._served
        asked = [self._ask(served, request) for request in requests]
        decided: list[tuple[dict[str, Any] | Refused, dict[str, Any] | None]] = [
            (Refused(Refusal.NOTHING_LEGAL, "every item is retired, seen or excluded"), None) for _ in asked
        ]
        for items in sorted({one.request.k for one in asked}):
            places = [
                place
                for place, one in enumerate(asked)
                if one.request.k == items and has_legal_item(one.prompt, served.catalogue)
            ]
            if not places:
                continue
            width = min(items, served.catalogue.n_items)
            shown = show(served, [asked[place].prompt for place in places], self.settings, seed=self._seed, items=width)
            for row, place in enumerate(places):
                filled = shown.item_PK[row] != NO_ITEM
                decided[place] = recorded(
                    served,
                    asked[place],
                    self.settings,
                    items=shown.item_PK[row][filled].tolist(),
                    scores=shown.logp_PK[row][filled].tolist(),
                    logp0=shown.logp0_PK[row][filled].astype(np.float32).tolist(),
                    decode=str(shown.decode_P[row]),
                )
        self.metrics.unknown_items.inc(sum(one.context.unknown for one in asked))
        self.metrics.engine_seconds.inc(time.monotonic() - begin)
        return decided

    def _ask(self, served: ServedVersion, request: RecommendRequest) -> _Asked:
        timestamp = self._log.now()
        request_id, number = self._ids.take(timestamp)
        context = served.index.context(request.history, request.exclude)
        return _Asked(
            request=request,
            request_id=request_id,
            timestamp=timestamp,
            context=context,
            prompt=prompt_of(served.builder, context, number),
        )

    # --- disk thread ---

    def _keep(self, rows: Sequence[dict[str, Any]]) -> None:
        begin = time.monotonic()
        self._log.append(rows)
        self.metrics.disk_seconds.inc(time.monotonic() - begin)
        for row in rows:
            self.metrics.exposures.labels(row["policy_version"]).inc()
        self.metrics.open_requests.set(self._log.open_requests)

    def _join(self, requests: Sequence[FeedbackRequest]) -> list[dict[str, Any] | Refused]:
        find = self._served.index.find
        each = [
            [
                # An item that nobody knows is none that was shown.
                Response(
                    request_id=event.request_id,
                    item=None if event.item is None else (NO_ITEM if (item := find(event.item)) is None else item),
                    value=event.response,
                )
                for event in request.responses
            ]
            for request in requests
        ]
        outcomes = iter(self._log.join([response for some in each for response in some]))
        answers: list[dict[str, Any] | Refused] = []
        for some in each:
            mine = [next(outcomes) for _ in some]
            counts = outcomes_by_kind(mine)
            self.metrics.joined(counts)
            answers.append({"outcomes": [one.value for one in mine], "counts": counts})
        return answers

    # --- watch thread ---

    def _watch(self) -> None:
        while not self._stop.wait(self.settings.poll_s):
            self._follow()
            self._close_days()

    def _follow(self) -> None:
        """Serve what the registry serves; a version that cannot be served is told, and the present one stays."""
        try:
            number = current_number(self._registry)
            if number == self._served.number or number == self._refused_version:
                return
            fresh = ServedVersion.start(self._registry, number, self.options.rollout)
        except (WindlassError, OSError) as error:
            print(f"windlass serve: stays with {self._served.name}: {error}", flush=True)
            self.metrics.switches.labels("failed").inc()
            # A wrong version stays wrong; an engine that did not come up may the next time.
            self._refused_version = number if isinstance(error, RequestError) else None
            return
        before, self._served = self._served, fresh
        self._refused_version = None
        self.metrics.serves(fresh.name)
        self.metrics.switches.labels("done").inc()
        print(f"windlass serve: {fresh.name} answers, after {before.name}", flush=True)
        # Behind the batches that the old version is to answer.
        self._engine_thread.submit(before.close)

    def _close_days(self) -> None:
        try:
            for day, rows in self._log.close_days().items():
                self.metrics.days.inc()
                print(f"windlass serve: closed {day}, {rows} requests", flush=True)
        except RunError as error:
            self.metrics.day_errors.inc()
            print(f"windlass serve: {error}", flush=True)
        self.metrics.open_requests.set(self._log.open_requests)

    # --- the end ---

    async def drain(self) -> dict[str, int]:
        """Refuse what is new, answer what is under way, and let go of everything.

        Returns:
            Requests that were still under way when the time was over, and open ones that stay in the log.
        """
        self._draining = True
        end = time.monotonic() + self.settings.drain_s
        while self._waiting and time.monotonic() < end:
            await asyncio.sleep(_TICK_S)
        self._stop.set()
        await asyncio.get_running_loop().run_in_executor(None, self._let_go)
        return {"unanswered": self._waiting, "open_requests": self._log.open_requests}

    def _let_go(self) -> None:
        self._watcher.join(self.settings.drain_s)
        self._engine_thread.shutdown(wait=True)
        self._disk_thread.shutdown(wait=True)
        self._served.close()
        self._log.close()
        self._held.close()


def recorded(
    served: ServedVersion,
    asked: _Asked,
    settings: ExposureSettings,
    *,
    items: list[int],
    scores: list[float],
    logp0: list[float],
    decode: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answer to a request and its row of the log."""
    kind = propensity_kind(settings)
    if hides_more(asked.prompt, asked.context, served.builder.exclude_seen):
        kind = PropensityKind.NONE
    answer = {
        "request_id": asked.request_id,
        "items": items,
        "keys": [served.catalogue.item_keys[item] for item in items],
        "scores": scores,
        "log_propensities": None if propensity_kind(settings) is PropensityKind.NONE else logp0,
        "policy_version": served.name,
        "decode": decode,
        "unknown_items": asked.context.unknown,
    }
    row = {
        "request_id": asked.request_id,
        "user_id": asked.request.user,
        "timestamp": asked.timestamp,
        "history": asked.context.history.tolist(),
        "need": None,
        "candidates": None,
        "exposed": items,
        "logp0": logp0,
        "propensity_kind": kind.value,
        "policy_version": served.name,
        "decode": decode,
        "temperature": settings.temperature,
        "catalogue_digest": served.catalogue.digest,
    }
    return answer, row


def _hold(held: ExitStack, folder: Path) -> None:
    """Hold the log; a process that was just killed lets go of it within moments.

    Raises:
        RequestError: another process keeps holding it.
    """
    end = time.monotonic() + LOCK_S
    while True:
        try:
            held.enter_context(writing(folder))
            return
        except RequestError:
            if time.monotonic() > end:
                raise
        time.sleep(0.2)
