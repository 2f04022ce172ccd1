"""A feed whose next batch is drawn while the present one is worked on.

Building prompts is Python, 50 microseconds each: for the batches of a large fleet that is seconds in which no engine
would have work. What is drawn, and the cursor that a checkpoint gets, are those of the feed itself.

| waits  | for                              | unblocked by                           |
|--------|----------------------------------|----------------------------------------|
| `next` | the batch that was begun earlier | the drawing thread, or its error       |
| nobody | the drawing thread's last batch  | it is dropped at `close`, nobody asks  |
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from data.feed import CursorState, DrawnPrompts, Feed


class _Drawn(NamedTuple):
    prompts: DrawnPrompts
    cursor: CursorState
    """Where the feed stood after them."""


class FeedAhead:
    """Draws one batch ahead of a feed, which nobody else may ask meanwhile."""

    def __init__(self, feed: Feed) -> None:
        """Draw nothing yet."""
        self._feed = feed
        self._cursor = feed.state_dict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._next: Future[_Drawn] | None = None

    def next(self) -> DrawnPrompts:
        """The next batch of the feed; begins to draw the one after it.

        Raises:
            Exception: whatever drawing it raised.
        """
        drawn = self._draw() if self._next is None else self._next.result()
        self._cursor = drawn.cursor
        self._next = self._thread.submit(self._draw)
        return drawn.prompts

    def _draw(self) -> _Drawn:
        prompts = self._feed.next()
        return _Drawn(prompts, self._feed.state_dict())

    def state_dict(self) -> CursorState:
        """The cursor behind the last batch that `next` gave out."""
        return self._cursor

    @property
    def epochs(self) -> float:
        """Passes over the rows, up to that batch."""
        return int(self._cursor["epoch"]) + int(self._cursor["batch"]) / self._feed.batches_per_epoch

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
