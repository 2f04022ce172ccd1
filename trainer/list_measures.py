"""Metrics of generated lists, prompt by prompt, against all gains of their candidates.

With beams a prompt's list is the most probable one they reached; with samples a prompt's value is the mean over its
lists. A list that is no permutation of the candidates (or its first K) is counted as invalid.

Suffixes: `_N` prompt, `_K` place in the list, `_C` candidate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.records import NO_ITEM, Decode, DecodeSpec, Groups, IntArray, Prompt
from reward.list_metrics import Floats, list_metrics
from trainer.evaluation import Generator


def measure_lists(
    generator: Generator, prompts: Sequence[Prompt], spec: DecodeSpec, *, batch: int, ks: Sequence[int]
) -> tuple[dict[str, Floats], float]:
    """Metrics of a policy's lists for each prompt, and the share of invalid lists.

    Args:
        generator: a fleet, or one engine.
        prompts: with candidates and gains.
        spec: how lists are asked for.
        batch: prompts per request.
        ks: cut-offs.

    Raises:
        ValueError: a spec of single items.
    """
    if spec.lists is None:
        raise ValueError("lists are measured, and the spec asks for single items")
    # Of a beam only the most probable list is shown to anybody.
    members = spec.width if spec.decode is Decode.SAMPLE else 1
    gain_rows, prompt_N, invalid = [], [], 0
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        groups = generator.generate(some, spec)
        for row, prompt in enumerate(some):
            for member in range(members):
                gain_K, sound = list_gains(prompt, _items(groups, row, member), spec.lists.length)
                gain_rows.append(gain_K)
                prompt_N.append(first + row)
                invalid += not sound
    candidate_NC = _padded([_gains(prompt) for prompt in prompts])
    values = list_metrics(_padded(gain_rows), candidate_NC[prompt_N], ks)
    mean_N = {name: value.reshape(len(prompts), members).mean(1) for name, value in values.items()}
    return mean_N, invalid / len(gain_rows)


def order_metrics(
    prompts: Sequence[Prompt], orders: Sequence[np.ndarray], width: int, ks: Sequence[int]
) -> dict[str, Floats]:
    """Metrics of given orders of the candidates, of which the first `width` are shown."""
    gains = [_gains(prompt) for prompt in prompts]
    listed = [gain_C[order[:width]] for gain_C, order in zip(gains, orders, strict=True)]
    return list_metrics(_padded(listed), _padded(gains), ks)


def list_gains(prompt: Prompt, item_K: IntArray, length: int) -> tuple[Floats, bool]:
    """Gains in list order, and whether the list is one: as many different candidates as were asked for.

    What is no candidate, or is there again, keeps its place without a gain.

    Args:
        length: how many were asked for; 0 asks for all candidates.
    """
    assert prompt.candidates is not None
    gain_of = dict(zip(prompt.candidates.tolist(), _gains(prompt).tolist(), strict=True))
    gain_K = [gain_of.pop(item, None) for item in item_K.tolist()]
    wanted = length or len(prompt.candidates)
    sound = len(gain_K) == wanted and None not in gain_K
    return np.array([gain or 0.0 for gain in gain_K], np.float64), sound


def _gains(prompt: Prompt) -> Floats:
    assert prompt.gain_C is not None
    return np.asarray(prompt.gain_C, np.float64)


def _items(groups: Groups, row: int, member: int) -> IntArray:
    assert groups.item_PGK is not None
    if not groups.valid_PG[row, member]:
        return np.zeros(0, np.int32)
    item_K: IntArray = groups.item_PGK[row, member]
    # Behind the end there is nothing; in between an absent item would be a fault, and stays.
    last = np.flatnonzero(item_K != NO_ITEM)
    return item_K[: int(last[-1]) + 1] if len(last) else item_K[:0]


def _padded(rows: Sequence[Floats]) -> Floats:
    """[N, K] of rows of different lengths, 0 behind their ends."""
    wide: Floats = np.zeros((len(rows), max(1, *map(len, rows))))
    for number, row in enumerate(rows):
        wide[number, : len(row)] = row
    return wide
