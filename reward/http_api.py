"""The HTTP face of the reward service, as an ASGI application around a scoring function.

`POST /score {histories, candidates, needs} → {scores, failures, variances}`,
`POST /swaps {histories, lists, form, swaps, seed} → {credits, failures, counts}`, `GET /healthz`, `/metrics`
(Prometheus text), `/openapi.json`. With a token every path but `/healthz` wants `Authorization: Bearer TOKEN`. A body
beyond the limit is refused with 413 before it is read whole.
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

from data.records import FloatArray, IntArray
from reward.batch_scoring import BatchScores
from reward.swap_calls import SwapCall, SwapReply
from reward.swap_credit import SwapForm
from reward.swap_evaluation import SWAPPED, SwapSampling
from reward.wire import ScoreCall

ItemId = Annotated[int, Field(ge=-(2**31), lt=2**31, strict=True)]
Score = Callable[[ScoreCall], Awaitable[BatchScores]]
Credit = Callable[[SwapCall], Awaitable[SwapReply]]
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


class SwapRequest(BaseModel):
    """Lists whose positions are to be credited by swaps."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    histories: list[list[ItemId]]
    """Item ids per list, oldest first; may be empty."""
    lists: list[list[ItemId]]
    """Item ids, best first; as many lists as histories."""
    form: SwapForm = SwapForm.CAUSAL
    """causal (each position against the later ones) or all_pairs."""
    swaps: int = Field(SwapSampling().swaps, ge=1, le=4096)
    """Swaps per position, drawn without replacement."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the drawn swaps."""

    @model_validator(mode="after")
    def _sound(self) -> SwapRequest:
        if len(self.histories) != len(self.lists):
            raise ValueError(f"{len(self.histories)} histories but {len(self.lists)} lists")
        if self.form not in SWAPPED:
            raise ValueError(f"form is {self.form.value}; legal: {' | '.join(form.value for form in SWAPPED)}")
        return self


class SwapResponse(BaseModel):
    """Credits and failures, list by list."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    credits: list[list[float] | None]
    """One per position; null where the list failed."""
    failures: list[str]
    """As those of /score."""
    counts: dict[str, float]
    """Lists asked for (the lists and their swaps), duplicates among them, found in the cache, scored, and evicted."""


def build_app(
    *,
    score: Score,
    credit: Credit,
    metrics: Callable[[], bytes],
    ready: Callable[[], bool],
    token: str | None,
    max_body_bytes: int,
) -> Callable[..., Awaitable[None]]:
    """The ASGI application.

    Args:
        score: scores a call; never raises for bad samples.
        credit: credits the lists of a call; never raises for bad lists.
        metrics: current metrics in the Prometheus text format.
        ready: True when the replica can score.
        token: bearer token that is required, or None.
        max_body_bytes: largest request body.
    """
    app = FastAPI(title="windlass reward service", version="1", docs_url=None, redoc_url=None)

    @app.post("/score", response_model_exclude_none=True)
    async def _score(request: ScoreRequest) -> ScoreResponse:
        call = ScoreCall.pack(_arrays(request.histories), _arrays(request.candidates), request.needs)
        result = await score(call)
        failures = [str(reason) for reason in result.failure_N]
        variances = None if result.variances is None else _rows(result.variances, failures)
        return ScoreResponse(scores=_rows(result.scores, failures), failures=failures, variances=variances)

    @app.post("/swaps")
    async def _swaps(request: SwapRequest) -> SwapResponse:
        call = SwapCall.pack(
            _arrays(request.histories),
            _arrays(request.lists),
            form=request.form,
            swaps=request.swaps,
            seed=request.seed,
        )
        result = await credit(call)
        failures = [str(reason) for reason in result.failure_N]
        return SwapResponse(credits=_rows(result.credits, failures), failures=failures, counts=dict(result.counts))

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


def _arrays(rows: list[list[int]]) -> list[IntArray]:
    return [np.asarray(row, np.int32) for row in rows]


def _rows(values: list[FloatArray], failures: list[str]) -> list[list[float] | None]:
    return [None if failure else row.tolist() for row, failure in zip(values, failures, strict=True)]


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
