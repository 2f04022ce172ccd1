"""The best list that a ranking prompt allows, which a model of lists is first taught."""

from __future__ import annotations

import numpy as np

from data.catalogue import Catalogue
from data.errors import RequestError
from data.records import IntArray, Prompt


def ideal_list(prompt: Prompt, length: int = 0) -> IntArray:
    """Candidates with a gain, the largest first, equal ones in the order of the prompt.

    Candidates without a gain are left out: their order would teach nothing but the order of the prompt.

    Args:
        length: most items; 0 for all.

    Raises:
        RequestError: the prompt has no candidates with gains.
    """
    candidates, gain_C = prompt.candidates, prompt.gain_C
    if candidates is None or gain_C is None or not (gain_C > 0).any():
        raise RequestError(f"prompt {prompt.prompt_id}", "no candidate with a gain", "a ranking prompt with gains")
    order = np.argsort(-gain_C, kind="stable")[: int((gain_C > 0).sum())]
    best: IntArray = candidates[order[:length] if length else order]
    return best


def ideal_completion(prompt: Prompt, catalogue: Catalogue, length: int = 0) -> IntArray:
    """Tokens of the ideal list, for a prompt that ends with `<list>`; the same errors."""
    tokens, _ = catalogue.tokens_of(ideal_list(prompt, length))
    return tokens
