"""Slow, obvious decoding in float64 that shares no code with `rollout`: paths as tuples, one prefix at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt

from data.catalogue import Catalogue

Path = tuple[int, ...]
NextLogits = Callable[[Path], npt.NDArray[np.float64]]
"""Logits after a prompt and a prefix of the completion."""


def allowed_paths(catalogue: Catalogue, exclusions: Iterable[int] = ()) -> dict[Path, int]:
    """Paths of the items that may be recommended, with the first permitted item of each."""
    banned = set(map(int, exclusions))
    paths: dict[Path, int] = {}
    for item in range(catalogue.n_items):
        if item not in banned and catalogue.active[item]:
            paths.setdefault(tuple(catalogue.tokens(item).tolist()), item)
    return paths


def step_logp(next_logits: NextLogits, paths: Mapping[Path, int], prefix: Path, temperature: float) -> dict[int, float]:
    """Renormalised log-probability of each legal token after a prefix."""
    depth = len(prefix)
    tokens = sorted({path[depth] for path in paths if len(path) > depth and path[:depth] == prefix})
    scaled = next_logits(prefix).astype(np.float64)[tokens] / temperature
    logp = scaled - scaled.max() - np.log(np.exp(scaled - scaled.max()).sum())
    return dict(zip(tokens, logp.tolist(), strict=True))


def beam_search(
    next_logits: NextLogits, paths: Mapping[Path, int], width: int, temperature: float = 1.0
) -> list[tuple[Path, float]]:
    """Beam search over the permitted paths; complete hypotheses stay in the running."""
    beams: list[tuple[Path, float]] = [((), 0.0)]
    while any(path not in paths for path, _ in beams):
        grown = []
        for path, score in beams:
            if path in paths:
                grown.append((path, score))
                continue
            for token, logp in step_logp(next_logits, paths, path, temperature).items():
                grown.append(((*path, token), score + logp))
        beams = sorted(grown, key=lambda beam: -beam[1])[:width]
    return beams


def all_items(next_logits: NextLogits, paths: Mapping[Path, int], temperature: float = 1.0) -> list[tuple[Path, float]]:
    """Every permitted path with its log-probability, the most probable first."""
    known: dict[Path, dict[int, float]] = {}
    scored = []
    for path in paths:
        total = 0.0
        for depth, token in enumerate(path):
            prefix = path[:depth]
            if prefix not in known:
                known[prefix] = step_logp(next_logits, paths, prefix, temperature)
            total += known[prefix][token]
        scored.append((path, total))
    return sorted(scored, key=lambda beam: -beam[1])
