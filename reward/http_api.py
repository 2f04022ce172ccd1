"""The HTTP face of the reward service, as an ASGI application around a scoring function.

`POST /score {histories, candidates, needs} → {scores, failures, variances}`, `GET /healthz`, `/metrics` (Prometheus
text), `/openapi.json`. With a token every path but `/healthz` wants `Authorization: Bearer TOKEN`. A body beyond the
limit is refused with 413 before it is read whole.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from data.records import FloatArray
from reward.batch_scoring import BatchScores
from reward.wire import ScoreCall

ItemId = Annotated[int, Field(ge=-(2**31), lt=2**31, strict=True)]
Score = Callable[[ScoreCall], Awaitable[BatchScores]]
Message = dict[str, Any]


class ScoreRequest(BaseModel):
    """Samples to score."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    histories: list[list[ItemId]]
    """Item ids per sample, oldest first; may be empty."""
    candidates: list[list[ItemId]]
    """Items to score per sample, as many lists as histories."""
    needs: list[str] | None = None
    """Need per sample, as many as histories; a ranker that knows no needs ignores them. None: the ranker's own."""

    @model_validator(mode="after")
    def _as_many(self) -> ScoreRequest:
        if len(self.histories) != len(self.candidates):
            raise ValueError(f"{len(self.histories)} histories but {len(self.candidates)} candidate lists")
        if self.needs is not None and len(self.needs) != len(self.histories):
            raise ValueError(f"{len(self.histories)} histories but {len(self.needs)} needs")
        return self


class ScoreResponse(BaseModel):
    """Scores and failures, sample by sample."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    scores: list[list[float] | None]
    """Scores in the order of the candidates; null where the sample failed."""
    failures: list[str]
    """Why a sample has no scores (timeout, unavailable, non_finite, bad_request, error); empty when it has."""
    variances: list[list[float] | None] | None = None
    """Variances of the scores, null where the sample failed; absent from a ranker that has none."""


def build_app(
    *, score: Score, metrics: Callable[[], bytes], ready: Callable[[], bool], token: str | None, max_body_bytes: int
) -> Callable[..., Awaitable[None]]:
    """The ASGI application.

    Args:
        score: scores a call; never raises for bad samples.
        metrics: current metrics in the Prometheus text format.
        ready: True when the replica can score.
        token: bearer token that is required, or None.
        max_body_bytes: largest request body.
    """
    app = FastAPI(title="windlass reward service", version="1", docs_url=None, redoc_url=None)

    @app.post("/score", response_model_exclude_none=True)
    async def _score(request: ScoreRequest) -> ScoreResponse:
        call = ScoreCall.pack(
            [np.asarray(row, np.int32) for row in request.histories],
            [np.asarray(row, np.int32) for row in request.candidates],
            request.needs,
        )
        result = await score(call)
        failures = [str(reason) for reason in result.failure_N]

        def rows(values: list[FloatArray]) -> list[list[float] | None]:
            return [None if bad else row.tolist() for row, bad in zip(values, failures, strict=True)]

        variances = None if result.variances is None else rows(result.variances)
        return ScoreResponse(scores=rows(result.scores), failures=failures, variances=variances)

    @app.get("/healthz", response_class=PlainTextResponse)
    async def _healthz() -> str:
        if not ready():
            raise HTTPException(503, "a scoring call hangs")
        return "ok"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def _metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics(), media_type="text/plain; version=0.0.4")

    # Who has no token gets no memory either: nothing of the body is read before the token is.
    return BearerToken(BodyLimit(app, max_body_bytes), token)


class BearerToken:
    """ASGI middleware: 401 without the right token, apart from /healthz."""

    def __init__(self, app: Callable[..., Awaitable[None]], token: str | None) -> None:
        self.app = app
        self.token = token

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """ASGI entry."""
        if scope["type"] == "http" and self.token is not None and not scope["path"].endswith("/healthz"):
            headers = dict(scope["headers"])
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.token.encode()):
                await _refuse(send, 401, "a bearer token is required", [(b"www-authenticate", b"Bearer")])
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """ASGI middleware: 413 for a body beyond the limit, by its declared length or as it arrives."""

    def __init__(self, app: Callable[..., Awaitable[None]], limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            await self._too_large(send)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > self.limit:
                await self._too_large(send)
                return
            if not message.get("more_body", False):
                break
        pending = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            received: Message = pending.pop() if pending else await receive()
            return received

        await self.app(scope, replay, send)

    async def _too_large(self, send: Any) -> None:
        await _refuse(send, 413, f"the body is larger than {self.limit} bytes", [])


async def _refuse(send: Any, status: int, reason: str, headers: list[tuple[bytes, bytes]]) -> None:
    body = json.dumps({"detail": reason}).encode()
    kinds = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": kinds + headers})
    await send({"type": "http.response.body", "body": body})
