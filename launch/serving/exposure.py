"""What a policy shows, and with which probability: draws, beams, or a mixture of both. Simulation and service share it.

What is shown is a function of (weights, context, settings, seed, prompt id) alone, not of the engine or the batch.

A request gets K items, K = 1 included. The log-propensity of a slot is conditional on the slots before it, so that the
first is that of the item alone, and their sum is that of the whole list.

Suffixes: `_P` prompt of a batch, `_G` beam, `_K` slot of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from data.catalogue import Catalogue
from data.errors import RequestError
from data.feedback import PropensityKind
from data.records import NO_ITEM, Decode, DecodeSpec, IntArray, Prompt
from data.settings import Settings
from rollout.random import uniforms
from trainer.evaluation import Generator

_CHOICE_STEP: Final = 2**32 - 1
"""Step that keys the choice between beams and samples; decoding itself uses step 0."""
_Doubles = npt.NDArray[np.float64]


class Serving(StrEnum):
    """How the policy chooses what it shows."""

    SAMPLE = "sample"
    """A draw from the renormalised policy."""
    BEAM = "beam"
    """One of the best beams, evenly: no propensity, so of no use for importance weights."""
    MIXTURE = "mixture"
    """A beam with probability 1 - epsilon, a draw otherwise; the logged propensity is that of the whole mixture."""


class ExposureSettings(Settings):
    """How a policy serves."""

    serve: Serving = Serving.SAMPLE
    """sample, beam, or mixture (a beam with probability 1 - epsilon, a sample otherwise)."""
    epsilon: float = Field(0.1, gt=0, le=1)
    """Probability of a sample (mixture only)."""
    beams: int = Field(1, ge=1, le=1024)
    """Best beams that are shown evenly (beam and mixture); of several items, in the first slot."""
    temperature: float = Field(1.0, gt=0, le=100)
    """Divides the logits before the softmax over the legal continuations."""

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.serve is not Serving.MIXTURE and self.epsilon != 0.1:
            raise RequestError("epsilon", f"{self.epsilon} with serve {self.serve}", "serve mixture")
        if self.serve is Serving.SAMPLE and self.beams != 1:
            raise RequestError("beams", f"{self.beams} with serve {self.serve}", "serve beam or mixture")
        return self


@dataclass(frozen=True, kw_only=True)
class Shown:
    """K slots per prompt, those that are filled first."""

    item_PK: IntArray
    """`NO_ITEM` where fewer items were legal."""
    logp_PK: _Doubles
    """Log-probability of each item under the policy, for whatever slot."""
    logp0_PK: _Doubles
    """Log-propensity of each slot given those before it; of `Serving.BEAM` the policy's, which is none."""
    decode_P: npt.NDArray[np.str_]
    """The `Decode` that the exposure came from."""


def propensity_kind(settings: ExposureSettings) -> PropensityKind:
    """What the log-propensities of a log are."""
    kinds = {
        Serving.SAMPLE: PropensityKind.SAMPLE,
        Serving.BEAM: PropensityKind.NONE,
        Serving.MIXTURE: PropensityKind.MIXTURE,
    }
    return kinds[settings.serve]


def show(
    generator: Generator, prompts: list[Prompt], settings: ExposureSettings, *, seed: int, items: int = 1
) -> Shown:
    """What the policy shows for each prompt, and the logarithm of the propensity; every prompt has a legal item."""
    if settings.serve is Serving.SAMPLE:
        return _drawn(generator, prompts, settings, seed, items)
    groups = generator.generate(prompts, _spec(settings, Decode.BEAM, max(settings.beams, items), seed))
    choice_P2 = uniforms(
        seed=seed,
        step=_CHOICE_STEP,
        prompt_id_P=np.array([prompt.prompt_id for prompt in prompts]),
        members=2,
        token=0,
    )
    # Valid beams come first, so that a number below their count is a beam.
    beams_P = np.minimum(groups.valid_PG.sum(1), settings.beams)
    slot_PK = ranked(_slots((choice_P2[:, 1] * beams_P).astype(np.int64), items), groups.valid_PG.shape[1])
    filled_PK = (slot_PK >= 0) & np.take_along_axis(groups.valid_PG, slot_PK.clip(0), 1)
    item_PK = np.where(filled_PK, np.take_along_axis(groups.item_PG, slot_PK.clip(0), 1), NO_ITEM).astype(np.int32)
    logp_PG = groups.sequence_logp_PG.astype(np.float64)
    logp_PK = np.where(filled_PK, np.take_along_axis(logp_PG, slot_PK.clip(0), 1), 0.0)
    decode_P = np.full(len(prompts), Decode.BEAM.value, dtype="U32")
    if settings.serve is Serving.BEAM:
        return Shown(item_PK=item_PK, logp_PK=logp_PK, logp0_PK=logp_PK, decode_P=decode_P)
    draws = np.flatnonzero(choice_P2[:, 0] < settings.epsilon)
    if len(draws):
        drawn = _drawn(generator, [prompts[row] for row in draws], settings, seed, items)
        item_PK[draws], logp_PK[draws], decode_P[draws] = drawn.item_PK, drawn.logp_PK, drawn.decode_P
    best_PG = np.where(groups.valid_PG, groups.item_PG, NO_ITEM)
    return Shown(
        item_PK=item_PK,
        logp_PK=logp_PK,
        logp0_PK=mixture_logp(item_PK, logp_PK, best_PG, beams_P, settings.epsilon),
        decode_P=decode_P,
    )


def ordered_logp(logp_PK: _Doubles) -> _Doubles:
    """Log-probability of each item being drawn next, given the items drawn before it, which are out.

    log( pi(i_k) / (1 - sum over j < k of pi(i_j)) ); the order of a draw without replacement (Plackett-Luce).
    Source: Kool, van Hoof, Welling: Stochastic Beams and Where to Find Them (ICML 2019), section 2.3.
    """
    p_PK = np.exp(logp_PK)
    before_PK = np.cumsum(p_PK, 1) - p_PK
    # Rounding must make neither the rest vanish nor a probability larger than 1.
    left_PK = np.maximum(1.0 - before_PK, p_PK)
    logp: _Doubles = np.minimum(logp_PK - np.log(left_PK), 0.0)
    return logp


def mixture_logp(
    item_PK: IntArray,
    logp_PK: _Doubles,
    best_PG: IntArray,
    beams_P: npt.NDArray[np.integer],
    epsilon: float,
) -> _Doubles:
    """Log-propensity of each slot under the mixture, given the slots before it.

    A list has the probability (1 - epsilon) [it is one that the beams show] / beams + epsilon x the probability of the
    draws, whichever of the two it came from, and a slot that of the list up to it over that of the list before it.
    Of one item: log( (1 - epsilon) [item among the beams] / beams + epsilon pi(item) ).

    Args:
        item_PK: what is shown, `NO_ITEM` in empty slots.
        logp_PK: log-probabilities under the policy.
        best_PG: the beams, best first, `NO_ITEM` behind the last.
        beams_P: how many of them the first slot is chosen from.
        epsilon: probability of a draw.
    """
    filled_PK = item_PK != NO_ITEM
    candidate_PG = (best_PG == item_PK[:, :1]) & (np.arange(best_PG.shape[1]) < beams_P[:, None])
    first_P = np.where(candidate_PG.any(1), candidate_PG.argmax(1), -1)
    expected_PK = ranked(_slots(first_P, item_PK.shape[1]), best_PG.shape[1])
    same_PK = (expected_PK >= 0) & (np.take_along_axis(best_PG, expected_PK.clip(0), 1) == item_PK)
    same_PK &= (first_P >= 0)[:, None]
    with np.errstate(divide="ignore"):
        beam_PK = np.where(np.logical_and.accumulate(same_PK, 1), np.log((1.0 - epsilon) / beams_P)[:, None], -np.inf)
    draw_PK = np.log(epsilon) + np.cumsum(np.where(filled_PK, ordered_logp(logp_PK), 0.0), 1)
    whole_PK = np.logaddexp(beam_PK, draw_PK)
    before_PK = np.concatenate([np.zeros((len(whole_PK), 1)), whole_PK[:, :-1]], 1)
    logp0: _Doubles = np.where(filled_PK, np.minimum(whole_PK - before_PK, 0.0), 0.0)
    return logp0


def _slots(first_P: npt.NDArray[np.integer], items: int) -> npt.NDArray[np.int64]:
    """[P, K] beams of each slot: the given one first, then the others in the order of their rank."""
    rest = np.arange(items - 1)
    # The first one is left out of the ranks behind it.
    rest_PK = rest + (rest >= first_P[:, None])
    slots: npt.NDArray[np.int64] = np.concatenate([first_P[:, None], rest_PK], 1).astype(np.int64)
    return slots


def ranked(slot_PK: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.int64]:
    """The slots, -1 where there is no such beam."""
    return np.where(slot_PK < width, slot_PK, -1)


def _drawn(generator: Generator, prompts: list[Prompt], settings: ExposureSettings, seed: int, items: int) -> Shown:
    """Draws from the policy: one, or several that differ."""
    decode = Decode.SAMPLE if items == 1 else Decode.SAMPLE_WITHOUT_REPLACEMENT
    groups = generator.generate(prompts, _spec(settings, decode, items, seed))
    item_PK = np.where(groups.valid_PG, groups.item_PG, NO_ITEM).astype(np.int32)
    logp_PK = np.where(groups.valid_PG, groups.sequence_logp_PG, 0.0).astype(np.float64)
    logp0_PK = np.where(groups.valid_PG, ordered_logp(logp_PK), 0.0)
    decode_P = np.full(len(prompts), decode.value, dtype="U32")
    return Shown(item_PK=item_PK, logp_PK=logp_PK, logp0_PK=logp0_PK, decode_P=decode_P)


def _spec(settings: ExposureSettings, decode: Decode, width: int, seed: int) -> DecodeSpec:
    return DecodeSpec(decode=decode, width=width, temperature=settings.temperature, seed=seed)


def has_legal_item(prompt: Prompt, catalogue: Catalogue) -> bool:
    """Whether any active item is not excluded."""
    return int(catalogue.active.sum()) > int(catalogue.active[prompt.exclusions].sum())
