"""A feed whose next batch is drawn while the present one is worked on.

Building prompts takes 20 microseconds each: for the batches of a large fleet that is a second in which no engine would
have work, and as much of the interpreter, which the thread that hands out work needs first. So whoever knows when the
engines are busy says `begin`. What is drawn, and the cursor that a checkpoint gets, are those of the feed itself.

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
        """The next batch of the feed.

        Raises:
            Exception: whatever drawing it raised.
        """
        drawn = self._draw() if self._next is None else self._next.result()
        self._next = None
        self._cursor = drawn.cursor
        return drawn.prompts

    def begin(self) -> None:
        """Begin to draw the batch that `next` will give out, where that is not done yet."""
        if self._next is None:
            self._next = self._thread.submit(self._draw)

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
