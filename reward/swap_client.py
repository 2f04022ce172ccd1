"""Callers of the reward service's swap credit: a whole batch per call, with the deadlines and retries of scores."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from data.records import IntArray, RewardFailure
from reward.client import HttpPost, RetryingClient, call_handle, rows_of
from reward.swap_calls import SwapCall, SwapReply, checked_swaps
from reward.swap_credit import SwapForm


class SwapAttempt(Protocol):
    """One attempt at a call; failures that concern all lists come back as such, nothing is raised."""

    def __call__(self, call: SwapCall, deadline_s: float) -> SwapReply:
        """Credit the lists of the call within the deadline."""
        ...


class SwapClient(RetryingClient[SwapAttempt]):
    """Asks for swap credit through a transport, with retries."""

    def credit(
        self, histories: Sequence[IntArray], lists: Sequence[IntArray], form: SwapForm, *, seed: int
    ) -> SwapReply:
        """Credit of every position of `lists[i]` after `histories[i]`; the whole batch is one call.

        Args:
            form: `causal` or `all_pairs`.
            seed: of the drawn swaps.
        """
        call = SwapCall.pack(histories, lists, form=form, swaps=self.settings.swaps.swaps, seed=seed)
        return self._repeated(lambda deadline_s: self._attempt(call, deadline_s))


class HandleSwapAttempt:
    """Calls through a Ray Serve handle; arrays travel through the object store."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __call__(self, call: SwapCall, deadline_s: float) -> SwapReply:
        """See `SwapAttempt`."""
        reply: SwapReply | RewardFailure = call_handle(self._handle.swap_call, call, deadline_s)
        return SwapReply.failed(len(call), reply) if isinstance(reply, RewardFailure) else checked_swaps(reply, call)


class HttpSwapAttempt:
    """Calls `POST /swaps`; any service that speaks the same JSON will do."""

    def __init__(self, url: str, token: str | None = None, *, transport: Any = None) -> None:
        """Connect lazily to `url`; `transport` is an httpx transport for tests."""
        self._http = HttpPost(url, token, transport=transport)

    def __call__(self, call: SwapCall, deadline_s: float) -> SwapReply:
        """See `SwapAttempt`."""
        body = {
            "histories": [row.tolist() for row in call.lists.histories()],
            "lists": [row.tolist() for row in call.lists.candidates()],
            "form": call.form.value,
            "swaps": call.swaps,
            "seed": call.seed,
        }
        content = self._http.post("/swaps", body, deadline_s)
        if isinstance(content, RewardFailure):
            return SwapReply.failed(len(call), content)
        parsed = parse_swaps(content)
        return SwapReply.failed(len(call), RewardFailure.ERROR) if parsed is None else checked_swaps(parsed, call)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


def parse_swaps(content: bytes) -> SwapReply | None:
    """A JSON body of `/swaps`, or None when it is not one."""
    try:
        body = json.loads(content)
        credits = rows_of(body["credits"])
        failures = [str(reason) for reason in body["failures"]]
        counts = {str(name): float(count) for name, count in body.get("counts", {}).items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    if any(row.ndim != 1 for row in credits) or not all(map(math.isfinite, counts.values())):
        return None
    return SwapReply(credits=credits, failure_N=np.array(failures, dtype=np.str_), counts=counts)
