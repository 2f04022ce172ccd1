"""Uncertainty stage: smaller steps where the gains behind the credit are uncertain (FlexRec).

    c = 1 / (u + eps),   cn = clip(c / mean(c), low, high)

with u the variance behind the credit of a token and the mean over all tokens of the batch that have one. Constant u
leaves everything as it is, whatever its size. Source: methods.md section 3, "Uncertainty".
"""

from __future__ import annotations

from enum import StrEnum

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from data.errors import RequestError
from data.settings import Settings


class VarianceKind(StrEnum):
    """The variance that decides."""

    OFF = "off"
    """None: the identity."""
    ITEM = "item"
    """Of the gain of the item that was placed."""
    PROPAGATED = "propagated"
    """Of the credit, to which the gains of all positions contribute; the ideal DCG held fixed."""


class Uncertainty(Settings):
    """Scale advantages by the certainty of the gains."""

    variance: VarianceKind = VarianceKind.OFF
    """off (factor 1), item (variance of the placed item's gain) or propagated (through the swap formula)."""
    eps: float = Field(1e-2, ge=0, le=1e6)
    """Added to the variance, in its unit; observed gains have variance 0."""
    low: float = Field(0.1, ge=0, le=1)
    """Smallest factor."""
    high: float = Field(3.0, ge=1, le=1e6)
    """Largest factor."""


def uncertainty_weights(
    variance: Float[Tensor, "*shape"], uncertain: Bool[Tensor, "*shape"], settings: Uncertainty
) -> tuple[Float[Tensor, "*shape"], dict[str, float]]:
    """Factors `cn` of the entries in `uncertain`, 1 for all others, in float64; and their metrics.

    With `eps` 0 entries of variance 0 are infinitely certain; the factors are then the limit: the certain entries share
    the whole mean, the others have the lowest factor.

    Raises:
        RequestError: a variance that is negative or not finite.
    """
    u_N = variance[uncertain].double()
    bad_N = ~torch.isfinite(u_N) | (u_N < 0)
    if bool(bad_N.any()):
        raise RequestError("variance of a gain", f"{u_N[bad_N][0].item():g}", "a finite number from 0")
    factor = torch.ones(variance.shape, dtype=torch.float64, device=variance.device)
    if not len(u_N):
        return factor, {"uncertainty/items": 0.0}
    # Relative to the most certain entry, so that nothing overflows; the mean takes the reference out again.
    wide_N = u_N + settings.eps
    smallest = wide_N.min()
    c_N = smallest / wide_N if bool(smallest > 0) else (wide_N == 0).double()
    raw_N = c_N / c_N.mean()
    cn_N = raw_N.clamp(settings.low, settings.high)
    factor[uncertain] = cn_N
    return factor, {
        "uncertainty/items": float(len(u_N)),
        "uncertainty/variance": float(u_N.mean()),
        "uncertainty/observed_share": float((u_N == 0).double().mean()),
        "uncertainty/factor": float(cn_N.mean()),
        "uncertainty/low_share": float((raw_N < settings.low).double().mean()),
        "uncertainty/high_share": float((raw_N > settings.high).double().mean()),
    }
