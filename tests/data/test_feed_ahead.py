"""Contract: a feed that draws ahead gives out the batches of the feed in its order, its cursor is that of the last one
that was given out, and an error of the drawing comes up in the call for that batch.

Not checked here: the feed itself (test_feed.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.feed import Feed
from data.feed_ahead import FeedAhead


class Drawn(list[int]):
    """Rows as prompts."""

    counts: dict[str, int] = {}  # noqa: RUF012 -- never changed

    @property
    def prompts(self) -> list[int]:
        return self


class RowNumbers:
    """Makes prompts that are their rows; fails at one."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.built = 0

    def build(self, samples: Any, rows: np.ndarray) -> Any:
        self.built += 1
        if self.built == self.fails_at:
            raise ValueError("no such row")
        return Drawn(rows.tolist())


def feed(rows: int, batch: int, fails_at: int | None = None) -> Feed:
    return Feed(range(rows), RowNumbers(fails_at), batch, 7, fingerprint="f")


@given(rows=st.integers(3, 20), batch=st.integers(1, 3), draws=st.integers(0, 15), more=st.integers(0, 9))
def test_the_same_batches_and_cursors(rows: int, batch: int, draws: int, more: int) -> None:
    plain, ahead = feed(rows, batch), FeedAhead(feed(rows, batch))
    for turn in range(draws):
        for _ in range(turn % 3):
            ahead.begin()
        assert ahead.next() == plain.next()
        assert ahead.state_dict() == plain.state_dict()
        assert ahead.epochs == plain.epoch + plain.batch / plain.batches_per_epoch
    ahead.close()
    # A restart from the cursor continues with the batch that was drawn and not given out.
    again = feed(rows, batch)
    assert again.load_state_dict(ahead.state_dict()) is None
    restarted = FeedAhead(again)
    for _ in range(more):
        restarted.begin()
        assert restarted.next() == plain.next()
    restarted.close()


def test_an_error_comes_up_where_its_batch_is_asked_for() -> None:
    ahead = FeedAhead(feed(9, 2, fails_at=3))
    for _ in range(2):
        ahead.next()
        ahead.begin()
    with pytest.raises(ValueError, match="no such row"):
        ahead.next()
    ahead.close()
