"""Why a request got no answer. The values are labels of a metric and stand in the error that the client gets."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Refusal(StrEnum):
    """Reasons."""

    BAD_REQUEST = "bad_request"
    """The body is not what the route takes."""
    UNAUTHORIZED = "unauthorized"
    """No bearer token, or another one."""
    TOO_LARGE = "too_large"
    """The body is beyond `max_body_mib`."""
    NO_ROUTE = "no_route"
    """No such path, or not with this method."""
    NOTHING_LEGAL = "nothing_legal"
    """Every item is retired, seen or excluded."""
    OVERLOADED = "overloaded"
    """As many requests as `max_waiting` wait already."""
    DRAINING = "draining"
    """The service is being stopped."""
    ENGINE = "engine"
    """The engine failed, also after it was started again."""
    DISK = "disk"
    """The feedback log could not be written, so nothing was answered."""
    INTERNAL = "internal"


STATUS: Final = {
    Refusal.BAD_REQUEST: 422,
    Refusal.UNAUTHORIZED: 401,
    Refusal.TOO_LARGE: 413,
    Refusal.NO_ROUTE: 404,
    Refusal.NOTHING_LEGAL: 409,
    Refusal.OVERLOADED: 503,
    Refusal.DRAINING: 503,
    Refusal.ENGINE: 503,
    Refusal.DISK: 503,
    Refusal.INTERNAL: 500,
}
"""HTTP status of each."""


class Refused(Exception):
    """One request gets an error in place of an answer."""

    def __init__(self, reason: Refusal, text: str) -> None:
        super().__init__(reason, text)
        self.reason = reason
        self.text = text
