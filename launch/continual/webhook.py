"""Telling others of promotions and rejections: an HTTP request per decision, signed, with a deadline.

A decision is made before anybody is told of it, and stays whatever becomes of the telling.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Final

from pydantic import Field

from data.errors import RequestError
from data.settings import Settings

SIGNATURE: Final = "X-Windlass-Signature"
_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 10.0


class WebhookSettings(Settings):
    """Who is told of promotions and rejections."""

    url: str | None = Field(None, pattern=r"^https?://")
    """Address that gets a POST for every promotion and rejection; null tells nobody."""
    secret_env: str | None = Field(None, min_length=1)
    """Environment variable with the secret that signs the body (HMAC-SHA256); null does not sign."""
    deadline_s: float = Field(30.0, gt=0, le=3600)
    """Seconds for one message, repetitions included."""
    timeout_s: float = Field(5.0, gt=0, le=600)
    """Seconds of one attempt."""


class Delivery(StrEnum):
    """What became of a message. Values are labels of a metric."""

    DELIVERED = "delivered"
    REFUSED = "refused"
    """The other side does not want it (a 4xx status that repeating does not change)."""
    FAILED = "failed"
    """No 2xx status within the deadline."""


Post = Callable[[str, bytes, Mapping[str, str], float], int]
"""(url, body, headers, timeout in s) → HTTP status; raises OSError when there is none."""


class Webhook:
    """Delivers messages."""

    def __init__(
        self,
        settings: WebhookSettings,
        *,
        post: Post | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            settings: with a `url`.
            post: makes one attempt.
            clock: seconds.
            sleep: waits.

        Raises:
            RequestError: the variable of the secret is not set.
        """
        assert settings.url is not None
        self._url = settings.url
        self._settings = settings
        self._post = post or _post
        self._clock = clock
        self._sleep = sleep
        self._secret = secret(settings)

    def deliver(self, message: Mapping[str, Any]) -> Delivery:
        """Send a message until it was taken or its time is over; never raises because of the other side."""
        body = json.dumps(message, sort_keys=True).encode()
        headers = {"content-type": "application/json"}
        if self._secret is not None:
            headers[SIGNATURE] = signature(self._secret, body)
        end, pause = self._clock() + self._settings.deadline_s, _PAUSE_S
        while (left := end - self._clock()) > 0:
            try:
                status = self._post(self._url, body, headers, min(self._settings.timeout_s, left))
            except OSError:
                status = 0
            if 200 <= status < 300:
                return Delivery.DELIVERED
            if 400 <= status < 500 and status not in (408, 425, 429):
                return Delivery.REFUSED
            self._sleep(max(0.0, min(pause, end - self._clock())))
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        return Delivery.FAILED


def secret(settings: WebhookSettings) -> bytes | None:
    """The secret, None where bodies are not signed.

    Raises:
        RequestError: the variable is not set.
    """
    if settings.secret_env is None:
        return None
    found = os.environ.get(settings.secret_env, "")
    if not found:
        raise RequestError("continual.webhook.secret_env", f"{settings.secret_env} is not set", "a variable that is")
    return found.encode()


def signature(key: bytes, body: bytes) -> str:
    """What the receiver compares with `X-Windlass-Signature`."""
    return "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest()


def _post(url: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> int:
    import httpx

    try:
        return httpx.post(url, content=body, headers=dict(headers), timeout=timeout_s).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OSError(str(error)) from error
