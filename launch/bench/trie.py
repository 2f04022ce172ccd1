"""Speed of the item trie against its goals: a million items in 30 s, the legal sets of 4,096 beams on one core in 2 ms.

Measured at every depth, with 500 excluded items per prompt and without, for codes that are evenly used and for
long-tailed ones. Medians are of the calls after a warm-up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from data.records import IntArray
from data.trie import ItemTrie
from data.trie_constraint import TrieConstraint

GOAL_BUILD_SECONDS = 30.0
GOAL_LEGAL_MS = 2.0
LEVELS = 3
CODES = 256
BEAMS = 4096
PROMPTS = 256
EXCLUDED = 500


def measure_trie(items: int = 1_000_000, seed: int = 0) -> dict[str, Any]:
    """Build times (s) and median times of legal sets and steps (ms), by kind of codes, depth and exclusions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        kinds = {kind: _measure(items, kind == "long_tailed", seed) for kind in ("even", "long_tailed")}
    finally:
        torch.set_num_threads(threads)
    return {
        "items": items,
        "goals": {"build_seconds": GOAL_BUILD_SECONDS, "legal_ms": GOAL_LEGAL_MS},
        "checked": all(kind.pop("checked") for kind in kinds.values()),
        **kinds,
    }


def _measure(items: int, long_tailed: bool, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    drawn = random.random((items, LEVELS))
    codes = (CODES * (drawn**2 if long_tailed else drawn)).astype(np.int32)
    token_NL = (4 + codes + CODES * np.arange(LEVELS)).astype(np.int32)
    begin = time.perf_counter()
    trie = ItemTrie.build(token_NL.ravel(), np.arange(items + 1, dtype=np.int64) * LEVELS)
    dense = [table is not None for table in trie.tables[:-1]]
    build_seconds = time.perf_counter() - begin
    exclusions = [
        random.choice(items, min(EXCLUDED, items - 1), replace=False).astype(np.int32) for _ in range(PROMPTS)
    ]
    return {
        "build_seconds": build_seconds,
        "nodes": trie.n_nodes,
        "widths": list(trie.widths[:-1]),
        "dense": dense,
        "checked": _first_level_is_right(trie, token_NL),
        "plain": _walk(TrieConstraint(trie, exclude=False), [np.zeros(0, dtype=np.int32)] * PROMPTS),
        "exclusions": _walk(TrieConstraint(trie, exclude=True), exclusions),
    }


def _first_level_is_right(trie: ItemTrie, token_NL: IntArray) -> bool:
    """Whether the children of the root, and those of its first child, are the tokens that the items have."""
    root = torch.zeros(1, dtype=torch.int64)
    first = np.unique(token_NL[:, 0])
    second = np.unique(token_NL[token_NL[:, 0] == first[0], 1])
    child = trie.step(root, torch.from_numpy(first[:1].astype(np.int64)))
    for node, depth, wanted in ((root, 0, first), (child, 1, second)):
        token_NC, legal_NC = trie.children(node, depth)
        if token_NC[legal_NC].sort().values.tolist() != wanted.tolist():
            return False
    return True


def _walk(constraint: TrieConstraint, exclusions: list[IntArray]) -> dict[str, Any]:
    """Random beams from the root to the leaves."""
    generator = torch.Generator().manual_seed(0)
    answer: dict[str, Any] = {"start_ms": _median_ms(lambda: constraint.start(exclusions), 5)}
    state = constraint.start(exclusions)
    parent = torch.arange(PROMPTS).repeat_interleave(BEAMS // PROMPTS)
    legal_ms, advance_ms = [], []
    for _ in range(LEVELS):
        here = state
        legal = constraint.legal(here)
        legal_ms.append(_median_ms(lambda here=here: constraint.legal(here), 50))  # type: ignore[misc]
        column = torch.multinomial(legal.legal_NC[parent].float(), 1, generator=generator)
        token = legal.token_NC[parent].gather(1, column)[:, 0]
        advance_ms.append(
            _median_ms(lambda here=here, p=parent, t=token: constraint.advance(here, p, t), 50)  # type: ignore[misc]
        )
        state = constraint.advance(here, parent, token)
        parent = torch.arange(BEAMS)
    return {**answer, "legal_ms": legal_ms, "advance_ms": advance_ms}


def _median_ms(call: Callable[[], object], times: int) -> float:
    call()
    measured = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        measured.append(time.perf_counter() - begin)
    return round(1000 * statistics.median(measured), 3)
