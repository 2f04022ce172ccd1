"""Callers of the reward service: a whole batch per call, a deadline per attempt, bounded retries, a reason per sample.

A call never raises because the service is down, slow or wrong; it comes back with a reason for every sample without
scores. What to do about that is `reward.failures`' decision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from data.records import FloatArray, IntArray, RewardFailure
from reward.batch_scoring import BatchScores, usable_variances
from reward.settings import RewardSettings
from reward.wire import ScoreCall, ScoreReply

TRANSIENT = frozenset({RewardFailure.TIMEOUT.value, RewardFailure.UNAVAILABLE.value, RewardFailure.ERROR.value})
"""Reasons after which the same call may succeed."""


class Attempt(Protocol):
    """One attempt at a call; failures that concern all samples come back as such, nothing is raised."""

    def __call__(self, call: ScoreCall, deadline_s: float) -> BatchScores:
        """Score the call within the deadline."""
        ...


class RewardClient:
    """Scores batches through a transport, with retries."""

    def __init__(
        self, attempt: Attempt, settings: RewardSettings, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.settings = settings
        self.requests = 0
        """Attempts made since the start."""
        self._attempt = attempt
        self._sleep = sleep

    def score(
        self, histories: Sequence[IntArray], candidates: Sequence[IntArray], needs: Sequence[str] | None = None
    ) -> BatchScores:
        """Scores of `candidates[i]` after `histories[i]` for `needs[i]`; the whole batch is one call.

        The call is repeated whole while any sample failed for a reason that may pass, at most `retries` times, and the
        last attempt counts: a sample's result never depends on which attempt scored its neighbours.
        """
        call = ScoreCall.pack(histories, candidates, needs)
        for attempt in range(self.settings.retries + 1):
            if attempt:
                self._sleep(self.settings.backoff_s * 2 ** (attempt - 1))
            self.requests += 1
            result = self._attempt(call, self.settings.deadline_s)
            if not np.isin(result.failure_N, list(TRANSIENT)).any():
                break
        return result


def checked(reply: BatchScores, call: ScoreCall) -> BatchScores:
    """A reply from a service that may be anybody's: as many scores as asked for, all finite, or a reason.

    Variances, where there are any, are as many as the scores, finite and above 0.
    """
    wanted = np.diff(call.candidate_offsets)
    variances = reply.variances
    if any(part is not None and len(part) != len(call) for part in (reply.scores, reply.failure_N, variances)):
        return BatchScores.failed(len(call), RewardFailure.ERROR)
    known = {reason.value for reason in RewardFailure}
    failure_N = np.array([str(reason) for reason in reply.failure_N], dtype="U16")
    for i, row in enumerate(reply.scores):
        counts = {len(row)} if variances is None else {len(row), len(variances[i])}
        if failure_N[i] not in known or (failure_N[i] == "" and counts != {wanted[i]}):
            failure_N[i] = RewardFailure.ERROR.value
        elif not np.isfinite(row).all() or (variances is not None and not usable_variances(variances[i])):
            failure_N[i] = RewardFailure.NON_FINITE.value
    return BatchScores(
        scores=_without_failed(reply.scores, failure_N),
        failure_N=failure_N,
        variances=None if variances is None else _without_failed(variances, failure_N),
    )


def _without_failed(rows: Sequence[FloatArray], failure_N: npt.NDArray[np.str_]) -> list[FloatArray]:
    empty = np.zeros(0, np.float32)
    return [empty if reason else row for row, reason in zip(rows, failure_N, strict=True)]


class HandleAttempt:
    """Calls through a Ray Serve handle; arrays travel through the object store."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __call__(self, call: ScoreCall, deadline_s: float) -> BatchScores:
        """See `Attempt`."""
        from ray.exceptions import RayActorError, RayError
        from ray.serve.exceptions import RayServeException

        response = self._handle.score_call.remote(call)
        try:
            reply: ScoreReply = response.result(timeout_s=deadline_s)
        except TimeoutError:
            response.cancel()
            return BatchScores.failed(len(call), RewardFailure.TIMEOUT)
        except (RayActorError, RayServeException):
            return BatchScores.failed(len(call), RewardFailure.UNAVAILABLE)
        except RayError:
            return BatchScores.failed(len(call), RewardFailure.ERROR)
        return checked(reply.unpack(), call)


class HttpAttempt:
    """Calls `POST /score`; any service that speaks the same JSON will do."""

    def __init__(self, url: str, token: str | None = None, *, transport: Any = None) -> None:
        """Connect lazily to `url`; `transport` is an httpx transport for tests."""
        import httpx

        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._client = httpx.Client(base_url=url, headers=headers, transport=transport, trust_env=False)

    def __call__(self, call: ScoreCall, deadline_s: float) -> BatchScores:
        """See `Attempt`."""
        import httpx

        body: dict[str, Any] = {
            "histories": [row.tolist() for row in call.histories()],
            "candidates": [row.tolist() for row in call.candidates()],
        }
        if call.needs is not None:
            body["needs"] = list(call.needs)
        end = time.monotonic() + deadline_s
        content = bytearray()
        try:
            with self._client.stream("POST", "/score", json=body, timeout=deadline_s) as response:
                for part in response.iter_bytes():
                    content += part
                    if time.monotonic() > end:
                        return BatchScores.failed(len(call), RewardFailure.TIMEOUT)
                status = response.status_code
        except httpx.TimeoutException:
            return BatchScores.failed(len(call), RewardFailure.TIMEOUT)
        except httpx.HTTPError:
            return BatchScores.failed(len(call), RewardFailure.UNAVAILABLE)
        return self._parse(call, status, bytes(content))

    @staticmethod
    def _parse(call: ScoreCall, status: int, content: bytes) -> BatchScores:
        if status != 200:
            by_status = {503: RewardFailure.UNAVAILABLE, 502: RewardFailure.UNAVAILABLE, 504: RewardFailure.TIMEOUT}
            default = RewardFailure.BAD_REQUEST if 400 <= status < 500 else RewardFailure.ERROR
            return BatchScores.failed(len(call), by_status.get(status, default))
        parsed = parse_response(content)
        return BatchScores.failed(len(call), RewardFailure.ERROR) if parsed is None else checked(parsed, call)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def parse_response(content: bytes) -> BatchScores | None:
    """A JSON body of `/score`, or None when it is not one."""
    import json

    try:
        body = json.loads(content)
        scores = _rows(body["scores"])
        failures = [str(reason) for reason in body["failures"]]
        variances = None if body.get("variances") is None else _rows(body["variances"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    if any(row.ndim != 1 for row in scores + (variances or [])):
        return None
    return BatchScores(scores=scores, failure_N=np.array(failures, dtype=np.str_), variances=variances)


def _rows(rows: Sequence[Sequence[float] | None]) -> list[FloatArray]:
    return [np.zeros(0, np.float32) if row is None else np.asarray(row, np.float32) for row in rows]
