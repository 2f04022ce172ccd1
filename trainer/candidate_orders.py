"""Orders of a prompt's candidates that no policy made, to hold beside its lists: the bounds, counts, and rankers.

`ideal` sorts by the gains themselves, `random` is one seeded order per prompt, `popularity` the number of training
events; a ranker sorts by its scores, a critic by those for the prompt's need. Equal scores keep the prompt's order.

Suffixes: `_C` candidate, `_N` prompt, `_I` item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from data.errors import RequestError
from data.feed import generator
from data.records import LongArray, Prompt, RewardFailure
from reward.batch_scoring import score_batch
from reward.ranker import Ranker

Order = npt.NDArray[np.int64]
_RANDOM_STREAM = 41
_CHUNK = 64
IDEAL, RANDOM, POPULARITY = "ideal", "random", "popularity"


def candidate_orders(
    prompts: Sequence[Prompt], count_I: LongArray, rankers: Mapping[str, Ranker], *, seed: int
) -> dict[str, list[Order | None]]:
    """Places of the candidates of every prompt, best first, by the name of the order.

    A prompt that a ranker cannot be asked about (a need that a critic does not know) has None there.

    Args:
        count_I: training events of every item.
        rankers: by the name that their order gets.
        seed: of the random order.

    Raises:
        RequestError: a ranker fails on a prompt whose items and need it knows.
    """
    orders: dict[str, list[Order | None]] = {
        IDEAL: [_by(_gains(prompt)) for prompt in prompts],
        POPULARITY: [_by(count_I[_items(prompt)]) for prompt in prompts],
        RANDOM: [
            generator(seed, _RANDOM_STREAM, prompt.prompt_id).permutation(len(_items(prompt))) for prompt in prompts
        ],
    }
    for name, ranker in rankers.items():
        orders[name] = _ranked(name, ranker, prompts)
    return orders


def _ranked(name: str, ranker: Ranker, prompts: Sequence[Prompt]) -> list[Order | None]:
    found = score_batch(
        ranker,
        [prompt.history for prompt in prompts],
        [_items(prompt) for prompt in prompts],
        chunk=_CHUNK,
        needs=[prompt.need for prompt in prompts],
    )
    broken = np.isin(found.failure_N, [RewardFailure.NONE.value, RewardFailure.BAD_REQUEST.value], invert=True)
    if broken.any():
        reason = f"{found.failure_N[broken][0]} on {int(broken.sum())} of {len(prompts)} prompts"
        raise RequestError(f"ranker {name}", reason, "finite scores of every candidate")
    return [
        None if failure else _by(scores) for scores, failure in zip(found.scores, found.failure_N.tolist(), strict=True)
    ]


def _by(score_C: npt.NDArray[np.generic]) -> Order:
    order: Order = np.argsort(-score_C.astype(np.float64), kind="stable")
    return order


def _items(prompt: Prompt) -> npt.NDArray[np.int32]:
    if prompt.candidates is None:
        raise ValueError(f"prompt {prompt.prompt_id} asks for a single item")
    return prompt.candidates


def _gains(prompt: Prompt) -> npt.NDArray[np.float32]:
    if prompt.gain_C is None:
        raise ValueError(f"prompt {prompt.prompt_id} has no gains")
    return prompt.gain_C
