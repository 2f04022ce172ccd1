"""Feedback of simulated users: a frozen policy is asked for held-out contexts, and the future says who responds.

What is shown to a user and with which propensity is a function of (weights, context, settings, seed) alone, not of the
engine, the batch or the rows beside it.

Suffixes: `_N` row, `_P` prompt of a batch, `_G` beam.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from data.catalogue import Catalogue
from data.dataset import Samples
from data.errors import RequestError
from data.feedback import FeedbackLog, PropensityKind, single_item_log
from data.prompts import PromptBuilder
from data.records import BoolArray, Decode, DecodeSpec, FloatArray, IntArray, LongArray, Prompt
from data.settings import Settings
from rollout.random import uniforms
from trainer.evaluation import Generator

_CHOICE_STEP: Final = 2**32 - 1
"""Step that keys the choice between beams and samples; decoding itself uses step 0."""


class Serving(StrEnum):
    """How the policy chooses what it shows."""

    SAMPLE = "sample"
    """A draw from the renormalised policy."""
    BEAM = "beam"
    """One of the best beams, evenly: no propensity, so of no use for importance weights."""
    MIXTURE = "mixture"
    """A beam with probability 1 - epsilon, a draw otherwise; the logged propensity is that of the whole mixture."""


class Skipped(StrEnum):
    """Contexts that gave no row of the log. Keys of `Simulated.counts`."""

    NOTHING_LEGAL = "nothing_legal"
    """Every item was seen or retired, so there was nothing to show."""


class ServingSettings(Settings):
    """How a policy serves."""

    serve: Serving = Serving.SAMPLE
    """sample, beam, or mixture (a beam with probability 1 - epsilon, a sample otherwise)."""
    epsilon: float = Field(0.1, gt=0, le=1)
    """Probability of a sample (mixture only)."""
    beams: int = Field(1, ge=1, le=1024)
    """Best beams that are shown evenly (beam and mixture)."""
    temperature: float = Field(1.0, gt=0, le=100)
    """Divides the logits before the softmax over the legal continuations."""
    horizon: int = Field(1, ge=1)
    """The response is 1 when the exposed item is among the user's next so many items of the split."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the draws."""

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.serve is not Serving.MIXTURE and self.epsilon != 0.1:
            raise RequestError("epsilon", f"{self.epsilon} with serve {self.serve}", "serve mixture")
        if self.serve is Serving.SAMPLE and self.beams != 1:
            raise RequestError("beams", f"{self.beams} with serve {self.serve}", "serve beam or mixture")
        return self


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One exposure per prompt."""

    item_P: IntArray
    logp0_P: npt.NDArray[np.float64]
    decode_P: npt.NDArray[np.str_]
    """The `Decode` that the exposure came from."""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A log, and what the contexts needed."""

    log: FeedbackLog
    counts: dict[str, int]
    """Mended prompts by `PromptCount`, and contexts without a row by `Skipped`."""


def propensity_kind(settings: ServingSettings) -> PropensityKind:
    """What the log-propensities of a log are."""
    kinds = {
        Serving.SAMPLE: PropensityKind.SAMPLE,
        Serving.BEAM: PropensityKind.NONE,
        Serving.MIXTURE: PropensityKind.MIXTURE,
    }
    return kinds[settings.serve]


def show(generator: Generator, prompts: list[Prompt], settings: ServingSettings) -> Shown:
    """What the policy shows for each prompt, and the logarithm of the propensity; every prompt has a legal item."""
    if settings.serve is Serving.SAMPLE:
        item_P, logp_P = _sampled(generator, prompts, settings)
        return Shown(item_P=item_P, logp0_P=logp_P, decode_P=np.full(len(prompts), Decode.SAMPLE.value))
    groups = generator.generate(prompts, _spec(settings, Decode.BEAM, settings.beams))
    choice_P2 = uniforms(
        seed=settings.seed,
        step=_CHOICE_STEP,
        prompt_id_P=np.array([prompt.prompt_id for prompt in prompts]),
        members=2,
        token=0,
    )
    beams_P = groups.valid_PG.sum(1)
    # Valid beams come first, so that a number below their count is a beam.
    slot_P = (choice_P2[:, 1] * beams_P).astype(np.int64)
    every = np.arange(len(prompts))
    item_P = groups.item_PG[every, slot_P].astype(np.int32)
    logp_P = groups.sequence_logp_PG[every, slot_P].astype(np.float64)
    if settings.serve is Serving.BEAM:
        return Shown(item_P=item_P, logp0_P=logp_P, decode_P=np.full(len(prompts), Decode.BEAM.value))
    draws_P = choice_P2[:, 0] < settings.epsilon
    drawn = np.flatnonzero(draws_P)
    if len(drawn):
        item_P[drawn], logp_P[drawn] = _sampled(generator, [prompts[row] for row in drawn], settings)
    among_P = ((groups.item_PG == item_P[:, None]) & groups.valid_PG).any(1)
    return Shown(
        item_P=item_P,
        logp0_P=mixture_logp(logp_P, among_P, beams_P, settings.epsilon),
        decode_P=np.where(draws_P, Decode.SAMPLE.value, Decode.BEAM.value),
    )


def mixture_logp(
    logp_P: npt.NDArray[np.float64], among_P: BoolArray, beams_P: npt.NDArray[np.integer], epsilon: float
) -> npt.NDArray[np.float64]:
    """log( (1 - epsilon) [item among the beams] / beams + epsilon pi(item) ), whichever of the two chose the item."""
    beam_P = np.where(among_P, (1.0 - epsilon) / beams_P, 0.0)
    # Rounding must not make a probability larger than 1.
    logp0_P: npt.NDArray[np.float64] = np.minimum(np.log(beam_P + epsilon * np.exp(logp_P)), 0.0)
    return logp0_P


def _sampled(
    generator: Generator, prompts: list[Prompt], settings: ServingSettings
) -> tuple[IntArray, npt.NDArray[np.float64]]:
    groups = generator.generate(prompts, _spec(settings, Decode.SAMPLE, 1))
    return groups.item_PG[:, 0].astype(np.int32), groups.sequence_logp_PG[:, 0].astype(np.float64)


def _spec(settings: ServingSettings, decode: Decode, width: int) -> DecodeSpec:
    return DecodeSpec(decode=decode, width=width, temperature=settings.temperature, seed=settings.seed)


def responses(samples: Samples, rows: LongArray, exposed_N: IntArray, horizon: int) -> FloatArray:
    """[N] 1 where the exposed item is among the next `horizon` items of the user, the target first; else 0.

    The next items are the targets of the user's rows of the same split, so that no log holds what a later split is
    to measure; the last rows of a user have fewer.

    Args:
        samples: all rows of the split, in the order of time.
        rows: the rows that were shown something.
        exposed_N: what each was shown.
        horizon: how many items the user has to respond with.
    """
    order = np.argsort(samples.user_id_N, kind="stable")
    user, target = samples.user_id_N[order], samples.target_N[order]
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    at_N = place[rows]
    found_N = np.zeros(len(rows), np.bool_)
    for ahead in range(min(horizon, len(order))):
        later_N = np.minimum(at_N + ahead, len(order) - 1)
        theirs_N = (at_N + ahead < len(order)) & (user[later_N] == user[at_N])
        if not theirs_N.any():
            break
        found_N |= theirs_N & (target[later_N] == exposed_N)
    return found_N.astype(np.float32)


def has_legal_item(prompt: Prompt, catalogue: Catalogue) -> bool:
    """Whether any active item is not excluded."""
    return int(catalogue.active.sum()) > int(catalogue.active[prompt.exclusions].sum())


def simulate(
    generator: Generator,
    samples: Samples,
    rows: LongArray,
    builder: PromptBuilder,
    settings: ServingSettings,
    *,
    name: str,
    policy_version: str,
    batch: int,
) -> Simulated:
    """Serve the contexts of `rows` and log what was shown and who responded.

    Args:
        generator: the frozen policy; a fleet or an engine.
        samples: all rows of the split, in the order of time.
        rows: which of them are served.
        builder: makes prompts as the model was trained on them.
        settings: how the policy serves.
        name: begins every request id; name of dataset and split.
        policy_version: what the rows name as their policy.
        batch: prompts per request to the generator.

    Raises:
        RequestError: there was nothing to show in any context.
    """
    counts: Counter[str] = Counter({Skipped.NOTHING_LEGAL.value: 0})
    shown: list[Shown] = []
    kept: list[LongArray] = []
    for first in range(0, len(rows), batch):
        built = builder.build(samples, rows[first : first + batch])
        counts.update(built.counts)
        legal = [place for place, prompt in enumerate(built.prompts) if has_legal_item(prompt, builder.catalogue)]
        counts[Skipped.NOTHING_LEGAL.value] += len(built) - len(legal)
        if legal:
            shown.append(show(generator, [built.prompts[place] for place in legal], settings))
            kept.append(rows[first + np.array(legal)])
    if not shown:
        raise RequestError("simulate", f"nothing could be shown in any of {len(rows)} contexts", "a context with items")
    kept_N = np.concatenate(kept)
    item_N = np.concatenate([part.item_P for part in shown])
    taken = samples.take(kept_N)
    log = single_item_log(
        request_id=[f"{name}-{policy_version}-{settings.seed}-{row}" for row in taken.sample_id_N.tolist()],
        user_id_N=taken.user_id_N,
        timestamp_N=taken.timestamp_N,
        # Whole, not as the prompt shows it: seen items are excluded, and so decide what the propensity is over.
        history=[taken.values[s:e] for s, e in zip(taken.start_N.tolist(), taken.end_N.tolist(), strict=True)],
        exposed_N=item_N,
        response_N=responses(samples, kept_N, item_N, settings.horizon),
        logp0_N=np.concatenate([part.logp0_P for part in shown]).astype(np.float32),
        propensity_kind=propensity_kind(settings),
        policy_version=policy_version,
        decode=np.concatenate([part.decode_P for part in shown]).tolist(),
        temperature=settings.temperature,
        catalogue_digest=builder.catalogue.digest,
    )
    return Simulated(log=log, counts=dict(counts))
