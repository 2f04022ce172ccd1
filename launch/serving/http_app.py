"""The HTTP face of the service, as an ASGI application around two functions.

`POST /recommend`, `POST /feedback`, `GET /health`, `GET /metrics` (Prometheus text), `/openapi.json`. An error is
`{"error": {"reason": ..., "message": ...}}`, with a reason of `launch.serving.refusals`. With a token every path but
`/health` wants `Authorization: Bearer TOKEN`; nothing of a body is read before the token is.
"""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from launch.serving.metrics import ServiceMetrics
from launch.serving.refusals import STATUS, Refusal, Refused
from launch.serving.settings import ServeSettings
from reward.http_api import BodyLimit

App = Callable[..., Awaitable[None]]
Item = Annotated[int, Field(ge=0, lt=2**31, strict=True)] | Annotated[str, Field(min_length=1, max_length=1000)]
MOST_RESPONSES = 10_000
_SHOWN_INPUT = 80
_ROUTES = ("/recommend", "/feedback", "/health", "/metrics", "/openapi.json")


class RecommendRequest(BaseModel):
    """Who is recommended to."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    user: Annotated[int, Field(ge=0, lt=2**31, strict=True)]
    """Number of the user in the log."""
    history: list[Item]
    """The whole history, oldest first: item ids, or keys as text. Items that the catalogue does not have are left out
    and counted."""
    k: Annotated[int, Field(ge=1, strict=True)] = 1
    """Items to show."""
    exclude: list[Item] = []
    """Further items that may not be shown. Such a request has no propensity in the log, because readers could not know
    over which items it is."""


class RecommendResponse(BaseModel):
    """What was shown, and logged."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    request_id: str
    """Names the request in the feedback."""
    items: list[int]
    """Item ids, at most `k`."""
    keys: list[str]
    """Their keys."""
    scores: list[float]
    """Log-probability of each item under the policy."""
    log_propensities: list[float] | None
    """Log-probability of each slot under how it was shown, given the slots before it; null where beams decided."""
    policy_version: str
    """The version that answered."""
    decode: str
    """sample, sample_without_replacement or beam."""
    unknown_items: int
    """Items of the request that the catalogue does not have."""


class ResponseEvent(BaseModel):
    """What somebody did with a shown item."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    request_id: Annotated[str, Field(min_length=1, max_length=200)]
    """Of the answer that showed it."""
    item: Item | None = None
    """The item, by id or key; may be left out where one item was shown."""
    response: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    """0 to 1; of several the largest counts."""


class FeedbackRequest(BaseModel):
    """Responses, in any order; one that is sent again changes nothing."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    responses: Annotated[list[ResponseEvent], Field(min_length=1, max_length=MOST_RESPONSES)]
    """At most 10,000."""


class FeedbackResponse(BaseModel):
    """What became of them."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    outcomes: list[str]
    """One per response: joined, unchanged, late, unknown_request, unknown_item."""
    counts: dict[str, int]
    """How often each."""


def build_app(
    settings: ServeSettings,
    *,
    recommend: Callable[[RecommendRequest], Awaitable[dict[str, Any]]],
    feedback: Callable[[FeedbackRequest], Awaitable[dict[str, Any]]],
    health: Callable[[], Mapping[str, Any]],
    metrics: ServiceMetrics,
    token: str | None,
) -> Callable[..., Awaitable[None]]:
    """The ASGI application.

    Args:
        settings: limits.
        recommend: answers a request; raises `Refused`.
        feedback: joins responses; raises `Refused`.
        health: says what answers; raises `Refused` when nothing does.
        metrics: counts.
        token: bearer token that is required, or None.
    """
    app = FastAPI(title="windlass", version="1", docs_url=None, redoc_url=None)

    def refuse(reason: Refusal, text: str, status: int = 0) -> Response:
        metrics.errors.labels(reason.value).inc()
        return error_response(reason, text, status)

    @app.exception_handler(Refused)
    async def _refused(_: Request, error: Refused) -> Response:
        return refuse(error.reason, error.text)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        return refuse(Refusal.BAD_REQUEST, told(error))

    @app.exception_handler(HTTPException)
    async def _no_route(request: Request, error: HTTPException) -> Response:
        found = f"{request.method} {request.url.path[:80]}"
        return refuse(Refusal.NO_ROUTE, f"{found}; legal: {', '.join(_ROUTES)}", error.status_code)

    @app.exception_handler(Exception)
    async def _internal(_: Request, error: Exception) -> Response:
        return refuse(Refusal.INTERNAL, type(error).__name__)

    @app.post("/recommend", response_model=RecommendResponse)
    async def _recommend(request: RecommendRequest) -> JSONResponse:
        for name, found, most in (
            ("k", request.k, settings.max_items),
            ("history", len(request.history), settings.max_history),
            ("exclude", len(request.exclude), settings.max_history),
        ):
            if found > most:
                raise Refused(Refusal.BAD_REQUEST, f"{name}: {found}; legal: at most {most}")
        return JSONResponse(await recommend(request))

    @app.post("/feedback", response_model=FeedbackResponse)
    async def _feedback(request: FeedbackRequest) -> JSONResponse:
        return JSONResponse(await feedback(request))

    @app.get("/health")
    async def _health() -> dict[str, Any]:
        return dict(health())

    @app.get("/metrics", response_class=PlainTextResponse)
    async def _metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    limited = Limit(app, int(settings.max_body_mib * 2**20), refuse)
    return Observed(Token(limited, token, refuse), metrics)


def error_response(reason: Refusal, text: str, status: int = 0) -> Response:
    """An error as every route tells it."""
    headers = {"retry-after": "1"} if STATUS[reason] == 503 else {}
    headers |= {"www-authenticate": "Bearer"} if reason is Refusal.UNAUTHORIZED else {}
    content = {"error": {"reason": reason.value, "message": text}}
    return JSONResponse(content, status_code=status or STATUS[reason], headers=headers)


class Token:
    """ASGI middleware: the bearer token, apart from /health."""

    def __init__(self, app: App, token: str | None, refuse: Callable[[Refusal, str], Response]) -> None:
        self._app = app
        self._wanted = None if token is None else b"Bearer " + token.encode()
        self._refuse = refuse

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """ASGI entry."""
        if scope["type"] == "http" and self._wanted is not None and not scope["path"].endswith("/health"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):
                await self._refuse(Refusal.UNAUTHORIZED, "a bearer token is required")(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Limit(BodyLimit):
    """ASGI middleware: the largest body, refused in the form of all errors."""

    def __init__(self, app: App, limit: int, refuse: Callable[[Refusal, str], Response]) -> None:
        super().__init__(app, limit)
        self._refuse = refuse

    async def _too_large(self, send: Any) -> None:
        answer = self._refuse(Refusal.TOO_LARGE, f"the body is larger than {self.limit} bytes")
        await answer({"type": "http", "method": "POST", "headers": []}, _nothing, send)


async def _nothing() -> dict[str, Any]:
    return {"type": "http.disconnect"}


class Observed:
    """ASGI middleware: counts requests and errors, and says every error in the same form."""

    def __init__(self, app: Callable[..., Awaitable[None]], metrics: ServiceMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.monotonic()
        status = 0

        async def watched(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = next((name for name in _ROUTES if scope["path"].endswith(name)), "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - begin)


def told(error: RequestValidationError) -> str:
    """The first problem of a body as one line: where, what was found, what is legal."""
    problem = error.errors()[0]
    # Names of the alternatives of a field (an id or a key) are nobody's concern.
    place = ".".join(
        str(part) for part in problem["loc"] if part != "body" and not str(part).startswith("constrained-")
    )
    found = json.dumps(problem.get("input"), default=str)
    shown = found if len(found) <= _SHOWN_INPUT else found[:_SHOWN_INPUT] + "..."
    return f"{place or 'body'}: {shown}; {problem['msg']}"
