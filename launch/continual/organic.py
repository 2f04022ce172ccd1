"""Organic interactions in a feedback log: what users took after a request that nobody had shown them.

A row keeps the user's whole history, so a later request of the same user tells what came in between. Of that, the first
item is the target which the policy should have ranked high, unless it was shown to the user meanwhile and got a
response: then the exposure may have caused it, and the next one counts.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from data.dataset import Samples
from data.feedback import FeedbackLog


def organic_samples(log: FeedbackLog) -> Samples:
    """The requests that an organic interaction followed, with it as their target; none where no request has one.

    Args:
        log: in the order of time; one exposed item per request.
    """
    samples, anchors = log.samples(), log.anchors()
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, user in enumerate(samples.user_id_N.tolist()):
        rows_of[user].append(row)
    target_N = samples.target_N.copy()
    kept: list[int] = []
    for rows in rows_of.values():
        for at, row in enumerate(rows):
            found = _first_organic(samples, rows[at:], anchors.item_N, anchors.response_N)
            if found is not None:
                target_N[row] = found
                kept.append(row)
    return dataclasses.replace(samples, target_N=target_N).take(np.array(sorted(kept), dtype=np.int64))


def _first_organic(
    samples: Samples, rows: list[int], item_N: npt.NDArray[np.integer], response_N: npt.NDArray[np.floating]
) -> int | None:
    """The first item after the first of the rows that no row before it had shown with a response.

    Args:
        rows: of one user, in the order of time.
    """
    mine = _history(samples, rows[0])
    caused: set[int] = set()
    done = len(mine)
    for before, row in pairwise(rows):
        if response_N[before] > 0:
            caused.add(int(item_N[before]))
        later = _history(samples, row)
        if len(later) < done or not np.array_equal(later[: len(mine)], mine):
            # A history that was cut or corrected says nothing of what came in between.
            return None
        for item in later[done:].tolist():
            if item not in caused:
                return int(item)
        done = len(later)
    return None


def _history(samples: Samples, row: int) -> npt.NDArray[np.integer]:
    return samples.values[int(samples.start_N[row]) : int(samples.end_N[row])]
