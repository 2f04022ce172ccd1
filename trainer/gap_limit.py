"""What the gap between engine and learner may be in a step, and its metrics; `rollout.probe` has the rule."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rollout.probe import Gap, gap_limit
from trainer.run_settings import PolicyGapSettings

Noise = Mapping[str, float]
"""The learner's own gap to a wider type: `mean` and `max`."""


def step_limit(settings: PolicyGapSettings, dtype: str, noise: Noise | None) -> Gap:
    """The limit by the learner's noise, or the one that was set, which is of the mean alone.

    Raises:
        ValueError: a type shorter than float32 without the noise.
    """
    if settings.limit is not None:
        return Gap(mean=settings.limit, max=torch.inf)
    measured = None if noise is None else Gap(mean=noise["mean"], max=noise["max"])
    return gap_limit(dtype, measured, settings.noise_factor)


def gap_metrics(gap: Gap, limit: Gap, given: int, noise: Noise | None) -> dict[str, float]:
    """Metrics of a step.

    Args:
        given: compared tokens that the engine scored and did not generate.
        noise: None where there is none to tell of.
    """
    return {
        "policy_gap/mean": gap.mean,
        "policy_gap/max": gap.max,
        "policy_gap/limit_mean": limit.mean,
        "policy_gap/given_share": given / max(gap.tokens, 1),
        **{f"policy_gap/noise_{kind}": value for kind, value in (noise or {}).items()},
    }
