"""Swap credit of ranked lists as one call, against a double loop over real swaps, list by list: part of
`windlass bench reward`. Both on one core.
"""

from __future__ import annotations

import statistics
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from data.records import FloatArray
from launch.bench.frame import Local, Way, paired
from reward.swap_credit import SwapForm, swap_credit

LOOP_LISTS: Final = 32
"""Lists of one repetition of the loop, at most; its time per list is what is compared."""
TOLERANCE: Final = 1e-6
"""Largest difference between a credit of the batch and the same by real swaps."""


def swap_figures(lists: int, items: int, repeats: int, seed: int) -> dict[str, Any]:
    """Time causal credit of random grades 0 to 5; `checked` says that both ways agree."""
    generator = torch.Generator().manual_seed(seed)
    gain_NK = torch.randint(6, (lists, items), generator=generator).float()
    some_NK = gain_NK[: min(lists, LOOP_LISTS)]

    def whole() -> Tensor:
        return swap_credit(gain_NK, SwapForm.CAUSAL).credit_NK

    def loop() -> list[list[float]]:
        return [real_swaps(row) for row in some_NK.numpy()]

    batch, alone = Local(whole), Local(loop)
    ways = {
        "ours": Way(time=batch.time, peak_mib=batch.peak_mib),
        "loop": Way(time=alone.time, peak_mib=alone.peak_mib),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = paired(ways, repeats)
        gap = float((whole()[: len(some_NK)] - torch.tensor(loop(), dtype=torch.float64)).abs().max())
    finally:
        torch.set_num_threads(before)
    ours, looped = (statistics.median(seconds[name]) for name in ("ours", "loop"))
    return {
        "lists": lists,
        "items": items,
        "lists_per_s": lists / ours,
        "speedup_vs_loop": (looped / len(some_NK)) / (ours / lists),
        "seconds": {"median": ours, "all": seconds["ours"]},
        "loop": {"lists": len(some_NK), "seconds": {"median": looped, "all": seconds["loop"]}},
        "peak_mib": round(batch.peak_mib(), 1),
        "threads": 1,
        "checked": gap <= TOLERANCE,
        "check": {"credit_gap_max": gap, "tolerance": TOLERANCE},
    }


def real_swaps(gain_K: FloatArray) -> list[float]:
    """Causal credit by its definition: the mean loss of NDCG over the swaps with every later position."""
    items = len(gain_K)
    gain_K = gain_K.astype(np.float64)
    discount_K = 1.0 / np.log2(np.arange(items) + 2.0)
    ideal = float(np.sort(gain_K)[::-1] @ discount_K)
    if ideal == 0:
        return [0.0] * items
    own = float(gain_K @ discount_K)
    credit = [0.0] * items
    for k in range(items - 1):
        for j in range(k + 1, items):
            swapped_K = gain_K.copy()
            swapped_K[k], swapped_K[j] = gain_K[j], gain_K[k]
            credit[k] += (own - float(swapped_K @ discount_K)) / ideal / (items - 1 - k)
    return credit
