"""Rankers for tests, named by import path: most misbehave in one way each."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.records import FloatArray, IntArray
from reward.list_ranker import load_list_ranker
from reward.settings import RewardSettings
from reward.swap_calls import SwapScorer
from reward.swap_client import SwapClient


def plain_scores(histories: Sequence[IntArray], candidates: Sequence[IntArray]) -> list[FloatArray]:
    """1000 * last item of the history + candidate: tells every (history, candidate) pair apart."""
    last = [int(history[-1]) if len(history) else -1 for history in histories]
    return [(1000 * base + wanted).astype(np.float32) for base, wanted in zip(last, candidates, strict=True)]


class PlainRanker:
    """Does as told, and remembers how many rows every call had."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def score(self, histories: Sequence[IntArray], candidates: Sequence[IntArray]) -> list[FloatArray]:
        """Plain scores."""
        self.rows.append(len(histories))
        return plain_scores(histories, candidates)


class FaultyRanker:
    """Misbehaves by what the last history item says; each trigger works once per `flag` file where one is given.

    -1 sleeps, 9001 NaN, 9002 raises, 9003 a score too few, 9004 kills its process, 9005 infinity, 9006 sleeps.
    """

    def __init__(self, flag: str = "", seconds: float = 30.0) -> None:
        self.flag = flag
        self.seconds = seconds

    def score(self, histories: Sequence[IntArray], candidates: Sequence[IntArray]) -> list[FloatArray]:
        """Plain scores, unless a history triggers something."""
        scores = plain_scores(histories, candidates)
        for i, history in enumerate(histories):
            trigger = int(history[-1]) if len(history) else 0
            if trigger == 9001:
                scores[i][0] = np.nan
            elif trigger == 9005:
                scores[i][-1] = np.inf
            elif trigger == 9002:
                raise KeyError("a bug in a ranker")
            elif trigger == 9003:
                scores[i] = scores[i][:-1]
            elif trigger in (9004, 9006) and self._armed():
                if trigger == 9004:
                    os._exit(1)
                time.sleep(self.seconds)
        return scores

    def _armed(self) -> bool:
        if not self.flag:
            return True
        path = Path(self.flag)
        if path.exists():
            return False
        path.write_text("triggered")
        return True


class SmallFirst:
    """A list-wise ranker: likes lists whose first items are small; NaN for histories that end with 9001."""

    version = "small-first"

    def score_list(self, histories: Sequence[IntArray], lists: Sequence[IntArray]) -> FloatArray:
        """Larger is better."""
        scores = np.array([-float((items / np.arange(1, len(items) + 1)).sum()) for items in lists], np.float32)
        return np.where([len(history) > 0 and history[-1] == 9001 for history in histories], np.nan, scores)


def local_swaps(settings: RewardSettings) -> SwapClient | None:
    """A client of the settings' list-wise ranker in this process, None where there is none."""
    if settings.list_ranker is None:
        return None
    served = SwapScorer(
        load_list_ranker(settings.list_ranker, settings.list_ranker_options), settings.swaps.cache_lists
    )
    return SwapClient(lambda call, deadline_s: served.credit(call), settings, sleep=lambda _: None)


class NoRanker:
    """Has no `score`."""
