"""Products of matrices, on CPU by the faster of the two libraries that torch has for them.

torch multiplies float32 matrices by MKL, which keeps to AVX2 on processors other than Intel's. oneDNN, by which torch's
own compiler multiplies, takes what the processor has, in the same float32. It knows no gradient, so that no result of
these functions has one, on any device: they are for the inside of `torch.autograd.Function`.

Suffixes: `_M` row of the result, `_N` its column, `_K` what is summed over.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


def _by_onednn(tensor: Tensor) -> bool:
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and tensor.device.type == "cpu" and tensor.dtype is torch.float32


@torch.no_grad()
def product(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """`left @ right`, without gradient; the right one may be a transposed view, the left one is best none."""
    if not _by_onednn(left_MK) or not left_MK.shape[1]:  # of oneDNN's no sum is empty
        return left_MK @ right_KN
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(left_MK, right_KN.T, None, "none", [], ""))


@torch.no_grad()
def transposed_product(left_KM: Tensor, right_KN: Tensor) -> Tensor:
    """`left.T @ right`, without gradient, of a large left and a small right one; perhaps a transposed view."""
    if not _by_onednn(left_KM):
        return left_KM.T @ right_KN
    return product(right_KN.T.contiguous(), left_KM).T
