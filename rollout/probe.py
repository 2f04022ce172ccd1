"""The gap between engine and learner: the probe after a push, and the policy gap of every step.

Both compare log-probabilities of given tokens that the engine and the learner computed from what should be the same
weights. The rule is one: mean and maximum are at most twice the learner's own noise, its gap to itself in a wider type
on the same tokens. In float32 the noise is looked at only where a token differs by more than 1e-4, which a policy does
whose logits have grown large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.errors import RunError
from data.records import BoolArray, FloatArray, IntArray

FLOAT32_GAP = 1e-4
"""Largest gap of one token in float32; 2e-6 is what a sound engine shows."""
NOISE_FACTOR = 2.0
"""Gap in a shorter type over the learner's noise. Two independent roundings give 1.4."""


class GapAlarm(RunError):
    """Engine and learner do not compute the same policy."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Absolute differences of log-probabilities over some tokens, or the limits for them."""

    mean: float
    max: float
    tokens: int = 0

    def within(self, limit: Gap) -> bool:
        """Whether neither mean nor maximum is above the limit; a gap that is not a number never is."""
        return self.mean <= limit.mean and self.max <= limit.max

    def __str__(self) -> str:
        return f"mean {self.mean:.2e}, max {self.max:.2e} over {self.tokens} tokens"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Fixed sequences whose log-probabilities both sides compute over the full vocabulary at temperature 1."""

    prompts: tuple[IntArray, ...]
    completions: tuple[IntArray, ...]


@dataclass(frozen=True, kw_only=True)
class ProbeAnswer:
    """The learner's log-probabilities of a probe."""

    logp: tuple[FloatArray, ...]
    """Per completion, one per token."""
    noise: Gap | None
    """Gap of the learner to itself in a wider type on the probe; None where it was not measured, in float32 alone."""


def random_probe(vocabulary: int, *, prompts: int = 4, length: int = 24, completion: int = 16, seed: int = 0) -> Probe:
    """Sequences of random tokens; every prompt has another length."""
    generator = np.random.default_rng(seed)
    lengths = [max(1, length - 3 * row) for row in range(prompts)]
    return Probe(
        prompts=tuple(generator.integers(0, vocabulary, n).astype(np.int32) for n in lengths),
        completions=tuple(generator.integers(0, vocabulary, completion).astype(np.int32) for _ in lengths),
    )


def item_probe(
    paths: Sequence[IntArray], *, bos: int, prompts: int = 8, items: int = 6, members: int = 4, seed: int = 0
) -> Probe:
    """Sequences of item paths, legal under an item trie, for a learner that replays the constraint.

    Args:
        paths: token path of every item.
        bos: first token of a prompt.
        prompts: number of prompts.
        items: items in each prompt.
        members: completions of each prompt.
        seed: of the choice.
    """
    generator = np.random.default_rng(seed)
    contexts, completions = [], []
    for _ in range(prompts):
        shown = [paths[i] for i in generator.integers(0, len(paths), items)]
        context = np.concatenate([np.array([bos]), *shown]).astype(np.int32)
        for item in generator.integers(0, len(paths), members):
            contexts.append(context)
            completions.append(np.asarray(paths[item], dtype=np.int32))
    return Probe(prompts=tuple(contexts), completions=tuple(completions))


def policy_gap(behaviour_PGT: FloatArray, learner_PGT: FloatArray, mask_PGT: BoolArray) -> Gap:
    """Gap per completion token between what the engine returned with the groups and the learner's score.

    Args:
        behaviour_PGT: `Groups.logp_PGT`, renormalised over the legal set at the rollout temperature.
        learner_PGT: the learner's score of the same tokens before the update, renormalised alike.
        mask_PGT: `Groups.token_mask_PGT`.
    """
    difference = np.abs(behaviour_PGT[mask_PGT].astype(np.float64) - learner_PGT[mask_PGT].astype(np.float64))
    return _summary(difference)


def probe_gap(engine: Sequence[FloatArray], learner: Sequence[FloatArray]) -> Gap:
    """Gap over the tokens of a probe; raises ValueError when the shapes differ."""
    pairs = list(zip(engine, learner, strict=True))
    if any(np.shape(a) != np.shape(b) for a, b in pairs):
        raise ValueError("engine and learner scored completions of different lengths")
    if not pairs:
        return _summary(np.zeros(0))
    difference = [np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) for a, b in pairs]
    return _summary(np.concatenate(difference))


def _summary(difference: np.ndarray) -> Gap:
    if not difference.size:
        return Gap(mean=0.0, max=0.0, tokens=0)
    return Gap(mean=float(difference.mean()), max=float(difference.max()), tokens=difference.size)


def gap_limit(dtype: str, noise: Gap | None, factor: float = NOISE_FACTOR) -> Gap:
    """Largest permitted gap.

    Args:
        dtype: the shorter of the types that engine and learner compute in.
        noise: the learner's own gap to a wider type; needed unless dtype is float32.
        factor: multiple of the noise that is permitted.

    Raises:
        ValueError: a shorter type without the noise.
    """
    least = FLOAT32_GAP if dtype == "float32" else 0.0
    if noise is None:
        if not least:
            raise ValueError(f"the limit of the policy gap in {dtype} needs the learner's noise")
        return Gap(mean=least, max=least)
    return Gap(mean=max(least, factor * noise.mean), max=max(least, factor * noise.max))


def check_gap(gap: Gap, limit: Gap, what: str) -> None:
    """Sound the alarm when a gap is over its limit, not a number, or of no tokens.

    Raises:
        GapAlarm: names `what`, the gap and the limit.
    """
    if not gap.within(limit) or not gap.tokens:
        raise GapAlarm(
            f"{what}: engine and learner differ by {gap}; allowed are mean {limit.mean:.2e}, max {limit.max:.2e}. "
            "The engine does not hold the learner's weights, or computes another policy."
        )
