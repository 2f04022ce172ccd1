"""Callers of the reward service: a whole batch per call, a deadline per attempt, bounded retries, a reason per sample.

A call never raises because the service is down, slow or wrong; it comes back with a reason for every sample without
scores. What to do about that is `reward.failures`' decision.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

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


class Reply(Protocol):
    """What an attempt brings back, whatever was asked."""

    @property
    def failure_N(self) -> npt.NDArray[np.str_]: ...


R = TypeVar("R", bound=Reply)
A = TypeVar("A")


class RetryingClient(Generic[A]):
    """Repeats a call whole while any sample failed for a reason that may pass, at most `retries` times.

    The last attempt counts: a sample's result never depends on which attempt answered its neighbours.
    """

    def __init__(self, attempt: A, settings: RewardSettings, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """
        Args:
            attempt: one attempt at a call, through a transport.
        """
        self.settings = settings
        self.requests = 0
        """Attempts made since the start."""
        self._attempt = attempt
        self._sleep = sleep

    def _repeated(self, attempt: Callable[[float], R]) -> R:
        """The reply of the last attempt; each is given its deadline in seconds."""
        for number in range(self.settings.retries + 1):
            if number:
                self._sleep(self.settings.backoff_s * 2 ** (number - 1))
            self.requests += 1
            reply = attempt(self.settings.deadline_s)
            if not np.isin(reply.failure_N, list(TRANSIENT)).any():
                break
        return reply


class RewardClient(RetryingClient[Attempt]):
    """Scores batches through a transport, with retries."""

    def score(
        self, histories: Sequence[IntArray], candidates: Sequence[IntArray], needs: Sequence[str] | None = None
    ) -> BatchScores:
        """Scores of `candidates[i]` after `histories[i]` for `needs[i]`; the whole batch is one call."""
        call = ScoreCall.pack(histories, candidates, needs)
        return self._repeated(lambda deadline_s: self._attempt(call, deadline_s))


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
        reply: ScoreReply | RewardFailure = call_handle(self._handle.score_call, call, deadline_s)
        if isinstance(reply, RewardFailure):
            return BatchScores.failed(len(call), reply)
        return checked(reply.unpack(), call)


def call_handle(method: Any, call: Any, deadline_s: float) -> Any:
    """The reply of a method of a Ray Serve handle, or the `RewardFailure` of the whole call."""
    from ray.exceptions import RayActorError, RayError
    from ray.serve.exceptions import RayServeException

    response = method.remote(call)
    try:
        return response.result(timeout_s=deadline_s)
    except TimeoutError:
        response.cancel()
        return RewardFailure.TIMEOUT
    except (RayActorError, RayServeException):
        return RewardFailure.UNAVAILABLE
    except RayError:
        return RewardFailure.ERROR


class HttpAttempt:
    """Calls `POST /score`; any service that speaks the same JSON will do."""

    def __init__(self, url: str, token: str | None = None, *, transport: Any = None) -> None:
        """Connect lazily to `url`; `transport` is an httpx transport for tests."""
        self._http = HttpPost(url, token, transport=transport)

    def __call__(self, call: ScoreCall, deadline_s: float) -> BatchScores:
        """See `Attempt`."""
        body: dict[str, Any] = {
            "histories": [row.tolist() for row in call.histories()],
            "candidates": [row.tolist() for row in call.candidates()],
        }
        if call.needs is not None:
            body["needs"] = list(call.needs)
        content = self._http.post("/score", body, deadline_s)
        if isinstance(content, RewardFailure):
            return BatchScores.failed(len(call), content)
        parsed = parse_response(content)
        return BatchScores.failed(len(call), RewardFailure.ERROR) if parsed is None else checked(parsed, call)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


class HttpPost:
    """JSON to a service that may be anybody's, within a deadline for the whole answer."""

    def __init__(self, url: str, token: str | None = None, *, transport: Any = None) -> None:
        """Connect lazily to `url`; `transport` is an httpx transport for tests."""
        import httpx

        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._client = httpx.Client(base_url=url, headers=headers, transport=transport, trust_env=False)

    def post(self, path: str, body: dict[str, Any], deadline_s: float) -> bytes | RewardFailure:
        """The body of the answer, or why there is none."""
        import httpx

        end = time.monotonic() + deadline_s
        content = bytearray()
        try:
            with self._client.stream("POST", path, json=body, timeout=deadline_s) as response:
                for part in response.iter_bytes():
                    content += part
                    if time.monotonic() > end:
                        return RewardFailure.TIMEOUT
                status = response.status_code
        except httpx.TimeoutException:
            return RewardFailure.TIMEOUT
        except httpx.HTTPError:
            return RewardFailure.UNAVAILABLE
        if status == 200:
            return bytes(content)
        by_status = {503: RewardFailure.UNAVAILABLE, 502: RewardFailure.UNAVAILABLE, 504: RewardFailure.TIMEOUT}
        return by_status.get(status, RewardFailure.BAD_REQUEST if 400 <= status < 500 else RewardFailure.ERROR)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def parse_response(content: bytes) -> BatchScores | None:
    """A JSON body of `/score`, or None when it is not one."""
    import json

    try:
        body = json.loads(content)
        scores = rows_of(body["scores"])
        failures = [str(reason) for reason in body["failures"]]
        variances = None if body.get("variances") is None else rows_of(body["variances"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    if any(row.ndim != 1 for row in scores + (variances or [])):
        return None
    return BatchScores(scores=scores, failure_N=np.array(failures, dtype=np.str_), variances=variances)


def rows_of(rows: Sequence[Sequence[float] | None]) -> list[FloatArray]:
    return [np.zeros(0, np.float32) if row is None else np.asarray(row, np.float32) for row in rows]
