"""Speed of the item trie against its goals: `python -m launch.trie_benchmark [ITEMS]`.

Builds the trie of a million items (goal: 30 s) and measures the legal sets of 4,096 beams on one core (goal: 2 ms), at
every depth, with 500 excluded items per prompt and without, for codes that are evenly used and for long-tailed ones.
Not a test: timings depend on what else the machine does. Medians are of the calls after a warm-up.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from data.errors import RequestError
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


def measure_trie(items: int = 1_000_000) -> dict[str, object]:
    """Build times (s) and median times of legal sets and steps (ms), by kind of codes, depth and exclusions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        kinds = {kind: _measure(items, kind == "long_tailed") for kind in ("even", "long_tailed")}
    finally:
        torch.set_num_threads(threads)
    return {"items": items, "goals": {"build_seconds": GOAL_BUILD_SECONDS, "legal_ms": GOAL_LEGAL_MS}, **kinds}


def _measure(items: int, long_tailed: bool) -> dict[str, object]:
    random = np.random.default_rng(0)
    drawn = random.random((items, LEVELS))
    codes = (CODES * (drawn**2 if long_tailed else drawn)).astype(np.int32)
    values = (4 + codes + CODES * np.arange(LEVELS)).astype(np.int32).ravel()
    begin = time.perf_counter()
    trie = ItemTrie.build(values, np.arange(items + 1, dtype=np.int64) * LEVELS)
    dense = [table is not None for table in trie.tables[:-1]]
    build_seconds = time.perf_counter() - begin
    exclusions = [random.choice(items, EXCLUDED, replace=False).astype(np.int32) for _ in range(PROMPTS)]
    return {
        "build_seconds": build_seconds,
        "nodes": trie.n_nodes,
        "widths": list(trie.widths[:-1]),
        "dense": dense,
        "plain": _walk(TrieConstraint(trie, exclude=False), [np.zeros(0, dtype=np.int32)] * PROMPTS),
        "exclusions": _walk(TrieConstraint(trie, exclude=True), exclusions),
    }


def _walk(constraint: TrieConstraint, exclusions: list[IntArray]) -> dict[str, object]:
    """Random beams from the root to the leaves."""
    generator = torch.Generator().manual_seed(0)
    answer: dict[str, object] = {"start_ms": _median_ms(lambda: constraint.start(exclusions), 5)}
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


def main(arguments: list[str]) -> None:
    """Print the measurement as JSON."""
    if len(arguments) > 1 or (arguments and not arguments[0].isdecimal()):
        raise RequestError("arguments", " ".join(arguments), "[ITEMS]")
    print(json.dumps(measure_trie(int(arguments[0]) if arguments else 1_000_000), indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
