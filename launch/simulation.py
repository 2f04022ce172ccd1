"""Feedback of simulated users: a frozen policy is asked for held-out contexts, and the future says who responds.

What is shown to a user and with which propensity is a function of (weights, context, settings, seed) alone, not of the
engine, the batch or the rows beside it.

Suffix `_N`: row.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from pydantic import Field

from data.dataset import Samples
from data.errors import RequestError
from data.feedback import FeedbackLog, single_item_log
from data.prompts import PromptBuilder
from data.records import FloatArray, IntArray, LongArray
from launch.serving.exposure import ExposureSettings, Shown, has_legal_item, propensity_kind, show
from trainer.evaluation import Generator


class Skipped(StrEnum):
    """Contexts that gave no row of the log. Keys of `Simulated.counts`."""

    NOTHING_LEGAL = "nothing_legal"
    """Every item was seen or retired, so there was nothing to show."""


class ServingSettings(ExposureSettings):
    """How a policy serves, and who responds."""

    horizon: int = Field(1, ge=1)
    """The response is 1 when the exposed item is among the user's next so many items of the split."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the draws."""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A log, and what the contexts needed."""

    log: FeedbackLog
    counts: dict[str, int]
    """Mended prompts by `PromptCount`, and contexts without a row by `Skipped`."""


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
            shown.append(show(generator, [built.prompts[place] for place in legal], settings, seed=settings.seed))
            kept.append(rows[first + np.array(legal)])
    if not shown:
        raise RequestError("simulate", f"nothing could be shown in any of {len(rows)} contexts", "a context with items")
    kept_N = np.concatenate(kept)
    item_N = np.concatenate([part.item_PK[:, 0] for part in shown])
    taken = samples.take(kept_N)
    log = single_item_log(
        request_id=[f"{name}-{policy_version}-{settings.seed}-{row}" for row in taken.sample_id_N.tolist()],
        user_id_N=taken.user_id_N,
        timestamp_N=taken.timestamp_N,
        # Whole, not as the prompt shows it: seen items are excluded, and so decide what the propensity is over.
        history=[taken.values[s:e] for s, e in zip(taken.start_N.tolist(), taken.end_N.tolist(), strict=True)],
        exposed_N=item_N,
        response_N=responses(samples, kept_N, item_N, settings.horizon),
        logp0_N=np.concatenate([part.logp0_PK[:, 0] for part in shown]).astype(np.float32),
        propensity_kind=propensity_kind(settings),
        policy_version=policy_version,
        decode=np.concatenate([part.decode_P for part in shown]).tolist(),
        temperature=settings.temperature,
        catalogue_digest=builder.catalogue.digest,
    )
    return Simulated(log=log, counts=dict(counts))
