"""Contract: products by either library are those of float64 up to float32's rounding, whatever the layout, carry what
is not finite, and have no gradient that could be lost.

Not checked here: that one of them is faster.
"""

from __future__ import annotations

import pytest
import torch

from trainer.products import product, transposed_product

SHAPES = [(1, 1, 1), (4, 0, 3), (0, 4, 3), (4, 3, 0), (7, 5, 3), (64, 8, 333), (33, 700, 12)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "inner", "columns"), SHAPES)
def test_products_are_those_of_float64(rows: int, inner: int, columns: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(rows)
    left_MK = torch.randn(rows, inner, generator=random, dtype=torch.float64).to(dtype)
    right_KN = torch.randn(inner, columns, generator=random, dtype=torch.float64).to(dtype)
    rounding = torch.finfo(dtype).eps
    wanted_MN = (left_MK.double() @ right_KN.double()).to(dtype)
    for left in (left_MK, left_MK.T.contiguous().T, torch.cat([left_MK, left_MK], 1)[:, :inner]):
        for right in (right_KN, right_KN.T.contiguous().T, torch.cat([right_KN, right_KN], 1)[:, :columns]):
            for found_MN in (product(left, right), transposed_product(left.T, right)):
                torch.testing.assert_close(found_MN, wanted_MN, rtol=8 * rounding, atol=inner * rounding)
    assert product(left_MK, right_KN).dtype is dtype


def test_what_is_not_finite_stays_so() -> None:
    left_MK, right_KN = torch.ones(4, 3), torch.ones(3, 20)
    left_MK[1, 0], left_MK[2, 0] = torch.nan, torch.inf
    for found_MN in (product(left_MK, right_KN), transposed_product(left_MK.T, right_KN)):
        assert found_MN[1].isnan().all()
        assert found_MN[2].isinf().all()
        assert torch.equal(found_MN[[0, 3]], torch.full((2, 20), 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_that_is_asked_for_is_an_error(dtype: torch.dtype) -> None:
    left_MK, right_KN = torch.ones(4, 3, dtype=dtype, requires_grad=True), torch.ones(3, 5, dtype=dtype)
    for found_MN in (product(left_MK, right_KN), transposed_product(left_MK.T, right_KN)):
        with pytest.raises(RuntimeError, match="does not require grad"):
            found_MN.sum().backward()
