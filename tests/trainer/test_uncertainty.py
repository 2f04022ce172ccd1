"""Uncertainty: methods.md section 8 item 9, and the limits that a quotient of variances must not break at.

Checked: constant variance gives exactly 1, signs stay, scaling invariance without eps and clip, the definition against
a plain loop, observed gains (variance 0) with and without eps, huge variances, bounds, refused variances. Not checked:
which tokens a factor lands on (test_list_credit.py).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.errors import RequestError
from trainer.uncertainty import Uncertainty, VarianceKind, uncertainty_weights

WIDE = {"variance": VarianceKind.ITEM, "low": 0.0, "high": 1e6}
VARIANCES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12)


def weights(values: list[float], settings: Uncertainty) -> torch.Tensor:
    variance = torch.tensor(values, dtype=torch.float64)
    return uncertainty_weights(variance, torch.ones(len(values), dtype=torch.bool), settings)[0]


@given(value=st.floats(0, 1e300), count=st.integers(1, 40), eps=st.sampled_from([0.0, 1e-2, 3.0]))
def test_constant_variance_changes_nothing(value: float, count: int, eps: float) -> None:
    assert weights([value] * count, Uncertainty(variance=VarianceKind.ITEM, eps=eps)).tolist() == [1.0] * count


@given(values=VARIANCES, eps=st.floats(0, 10), low=st.floats(0, 1), high=st.floats(1, 5))
def test_equals_the_definition(values: list[float], eps: float, low: float, high: float) -> None:
    c = 1 / (np.array(values) + eps)
    settings = Uncertainty(variance=VarianceKind.ITEM, eps=eps, low=low, high=high)
    found = weights(values, settings)
    np.testing.assert_allclose(found, np.clip(c / c.mean(), low, high), rtol=1e-9)
    assert bool((found >= 0).all())


@given(values=VARIANCES, scale=st.floats(1e-9, 1e9))
def test_the_scale_of_the_variances_cancels(values: list[float], scale: float) -> None:
    settings = Uncertainty(**WIDE, eps=0.0)
    torch.testing.assert_close(weights([value * scale for value in values], settings), weights(values, settings))


def test_observed_gains_without_eps_take_the_limit() -> None:
    nearly = weights([1e-12, 1e-12, 1.0, 2.0], Uncertainty(**WIDE, eps=0.0))
    exactly = weights([0.0, 0.0, 1.0, 2.0], Uncertainty(**WIDE, eps=0.0))
    assert exactly.tolist() == [2.0, 2.0, 0.0, 0.0]
    torch.testing.assert_close(nearly, exactly, atol=1e-9, rtol=1e-9)
    clipped = weights([0.0, 0.0, 1.0, 2.0], Uncertainty(variance=VarianceKind.ITEM, eps=0.0, low=0.1, high=1.5))
    assert clipped.tolist() == [1.5, 1.5, 0.1, 0.1]


def test_extreme_variances_do_not_overflow() -> None:
    found = weights([1e-300, 1e300], Uncertainty(**WIDE, eps=0.0))
    assert found.tolist() == [2.0, 0.0]


def test_what_is_not_uncertain_has_factor_one_and_does_not_enter_the_mean() -> None:
    variance = torch.tensor([[1.0, 4.0], [1e9, torch.nan]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [False, False]])
    found, metrics = uncertainty_weights(variance, mask, Uncertainty(**WIDE, eps=0.0))
    torch.testing.assert_close(found, torch.tensor([[1.6, 0.4], [1.0, 1.0]], dtype=torch.float64))
    assert metrics["uncertainty/items"] == 2
    assert metrics["uncertainty/variance"] == 2.5
    none, told = uncertainty_weights(variance, torch.zeros_like(mask), Uncertainty(**WIDE))
    assert none.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert told == {"uncertainty/items": 0.0}


def test_clipped_and_observed_shares_are_told() -> None:
    variance = torch.tensor([0.0, 0.0, 3.0, 100.0], dtype=torch.float64)
    settings = Uncertainty(variance=VarianceKind.ITEM, eps=1.0, low=0.5, high=1.6)
    _, metrics = uncertainty_weights(variance, torch.ones(4, dtype=torch.bool), settings)
    assert metrics["uncertainty/observed_share"] == 0.5
    assert metrics["uncertainty/high_share"] == 0.5
    assert metrics["uncertainty/low_share"] == 0.5


@pytest.mark.parametrize("value", [-1e-9, float("inf"), float("nan")])
def test_impossible_variances_are_refused(value: float) -> None:
    with pytest.raises(RequestError, match="variance of a gain"):
        weights([1.0, value], Uncertainty(variance=VarianceKind.ITEM))
