"""How requests are called: a name tells the time, so that late requests are known from those that never were."""

from __future__ import annotations


class RequestIds:
    """Names of requests: time, start of the service, number. They tell late from unknown without a memory of all."""

    def __init__(self, start_ms: int, seed: int) -> None:
        self._start = f"{start_ms:011x}{seed:08x}"
        self._next = 0

    def take(self, timestamp: int) -> tuple[str, int]:
        """The next name, and its number, below 2^32, which keys the draws."""
        number = self._next
        self._next += 1
        return f"{timestamp:09x}-{self._start}-{number:x}", number % 2**32


def time_of(request_id: str) -> int | None:
    """The time of a request by its name, None for a name that is not ours."""
    parts = request_id.split("-")
    if len(parts) != 3 or len(parts[0]) != 9 or any(set(part) - set("0123456789abcdef") for part in parts):
        return None
    time = int(parts[0], 16)
    return time if all(parts) else None
