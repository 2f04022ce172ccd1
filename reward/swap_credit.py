"""Credit for each position of a ranked list by counterfactual swaps, in closed form.

With gains g in list order, discounts D_k = 1/log2(k+1) and the ideal DCG of the candidates, swapping positions k and j
changes the NDCG by

    delta_kj = NDCG(list) - NDCG(swapped) = (g_k - g_j)(D_k - D_j) / IDCG

so every kind of credit below is linear in the gains: `r = A g / IDCG` with a matrix A that depends on the length only,
and a batch of lists is one matrix product per length. `Var(r_k) = sum_i A_ki^2 u_i / IDCG^2` follows for independent
gains with variances u, the ideal DCG held fixed.

Source: methods.md section 3. Suffixes: `N` list, `K` position, `C` candidate.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.errors import RequestError

LISTS_PER_CHUNK = 65536
"""Lists computed at once: the temporaries stay in tens of MiB whatever the batch."""


class SwapForm(StrEnum):
    """Which counterfactuals a position is compared with."""

    CAUSAL = "causal"
    """Swaps with later positions: at position k the earlier items are no longer to be had. The last position gets 0."""
    ALL_PAIRS = "all_pairs"
    """Swaps with every other position."""
    INDEPENDENT = "independent"
    """No swap: the position's own part of the NDCG, `g_k D_k / IDCG`."""
    SUFFIX_DCG = "suffix_dcg"
    """The discounted gain from the position on, not normalised (Rank-GRPO)."""


class GainForm(StrEnum):
    """What a grade is worth."""

    LINEAR = "linear"
    EXPONENTIAL = "exponential"
    """`2^g - 1`."""


class ListCredit(NamedTuple):
    """Credit of the positions of lists."""

    credit_NK: Float[Tensor, "N K"]
    """Zero behind the end of a list, and in the whole list where the ideal DCG is zero."""
    ideal_N: Float[Tensor, " N"]
    """Ideal DCG; where it is zero the list carries no signal, which callers count."""


def discounts(length: int) -> Float[Tensor, " K"]:
    """`D_k = 1/log2(k+1)` of the positions 1..length, in float64."""
    return 1.0 / torch.log2(torch.arange(length, dtype=torch.float64) + 2.0)


def credit_matrix(form: SwapForm, length: int) -> Float[Tensor, "K K"]:
    """The matrix A of lists of one length: `credit = A gains / IDCG` (`suffix_dcg` without the divisor)."""
    discount_K = discounts(length)
    if form is SwapForm.INDEPENDENT:
        return torch.diag(discount_K)
    if form is SwapForm.SUFFIX_DCG:
        return discount_K.expand(length, length).triu()
    pair_KK = discount_K[:, None] - discount_K[None, :]
    if form is SwapForm.CAUSAL:
        pair_KK = pair_KK.triu(1)
        compared_K = torch.arange(length - 1, -1, -1, dtype=torch.float64)
    else:
        compared_K = torch.full((length,), length - 1.0, dtype=torch.float64)
    pair_KK = pair_KK / compared_K.clamp_min(1.0)[:, None]
    return torch.diag(pair_KK.sum(1)) - pair_KK


def gain_values(grade: Tensor, form: GainForm) -> Tensor:
    """Gains of grades, in float64, in the grades' shape."""
    return grade.double() if form is GainForm.LINEAR else torch.exp2(grade.double()) - 1.0


def check_gains(where: str, gain: Tensor, first_row: int = 0) -> None:
    """Refuse gains that no NDCG is defined for; `first_row` is the number of the first row in what `where` names.

    Raises:
        RequestError: NaN, infinite or negative gains.
    """
    bad = ~torch.isfinite(gain) | (gain < 0)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        found = f"gain {gain[row, column].item():g}"
        raise RequestError(f"{where}[{first_row + row}, {column}]", found, "a finite number from 0")


def swap_credit(
    gain_NK: Float[Tensor, "N K"],
    form: SwapForm,
    *,
    length_N: Int[Tensor, " N"] | None = None,
    candidate_gain_NC: Float[Tensor, "N C"] | None = None,
) -> ListCredit:
    """Credit of every position of a batch of lists, on the device of the gains.

    Args:
        gain_NK: gains in list order; what stands behind a list's end is ignored.
        form: which counterfactuals.
        length_N: positions of each list; none means K.
        candidate_gain_NC: gains of all candidates, zeros behind the last, where a list shows its first positions only:
            the ideal list takes the best of them. None: the list's own items are the candidates.

    Raises:
        RequestError: NaN, infinite or negative gains, or a length outside 0..K.
    """
    lists, width = gain_NK.shape
    length_N = torch.full((lists,), width, device=gain_NK.device) if length_N is None else length_N
    if lists and not (int(length_N.min()) >= 0 and int(length_N.max()) <= width):
        raise RequestError("length_N", f"{int(length_N.min())}..{int(length_N.max())}", f"0..{width}")
    parts = []
    for start in range(0, max(lists, 1), LISTS_PER_CHUNK):
        rows = slice(start, start + LISTS_PER_CHUNK)
        outside_NK = torch.arange(width, device=gain_NK.device) >= length_N[rows, None]
        value_NK = gain_NK[rows].double().masked_fill(outside_NK, 0.0)
        check_gains("gain_NK", value_NK, start)
        candidate_NC = value_NK
        if candidate_gain_NC is not None:
            candidate_NC = candidate_gain_NC[rows].double()
            check_gains("candidate_gain_NC", candidate_NC, start)
        parts.append(_chunk_credit(value_NK, form, length_N[rows], candidate_NC))
    return ListCredit(torch.cat([part.credit_NK for part in parts]), torch.cat([part.ideal_N for part in parts]))


def credit_variance(
    variance_NK: Float[Tensor, "N K"],
    ideal_N: Float[Tensor, " N"],
    form: SwapForm,
    *,
    length_N: Int[Tensor, " N"] | None = None,
) -> Float[Tensor, "N K"]:
    """Variance of the credit for independent gains of the given variances, the ideal DCG held fixed.

    Args:
        variance_NK: variance of the gain at each position; 0 where it was observed.
        ideal_N: `ListCredit.ideal_N` of the same lists.
        form: as for the credit.
        length_N: as for the credit.
    """
    lists, width = variance_NK.shape
    length_N = torch.full((lists,), width, device=variance_NK.device) if length_N is None else length_N
    scale_N = ideal_N.new_ones(lists) if form is SwapForm.SUFFIX_DCG else _inverse(ideal_N).square()
    result_NK = torch.zeros(lists, width, dtype=torch.float64, device=variance_NK.device)
    for length, rows in _by_length(length_N):
        squared_KK = credit_matrix(form, length).square().to(variance_NK.device)
        value_MK = variance_NK[rows, :length].double() @ squared_KK.T
        result_NK[rows, :length] = value_MK * scale_N[rows, None]
    return result_NK


def _chunk_credit(gain_NK: Tensor, form: SwapForm, length_N: Tensor, candidate_gain_NC: Tensor) -> ListCredit:
    ideal_N = _ideal_dcg(candidate_gain_NC, length_N, gain_NK.shape[1])
    scale_N = (ideal_N > 0).double() if form is SwapForm.SUFFIX_DCG else _inverse(ideal_N)
    credit_NK = torch.zeros_like(gain_NK)
    for length, rows in _by_length(length_N):
        value_MK = gain_NK[rows, :length]
        if form in (SwapForm.CAUSAL, SwapForm.ALL_PAIRS):
            # Swaps see differences of gains only; taken from one of them, equal gains give exactly 0.
            value_MK = value_MK - value_MK[:, -1:]
        matrix_KK = credit_matrix(form, length).to(gain_NK.device)
        credit_NK[rows, :length] = (value_MK @ matrix_KK.T) * scale_N[rows, None]
    return ListCredit(credit_NK, ideal_N)


def _ideal_dcg(candidate_gain_NC: Tensor, length_N: Tensor, width: int) -> Tensor:
    """DCG of the best list of each length that the candidates allow."""
    best_NK = _largest(candidate_gain_NC, min(width, candidate_gain_NC.shape[1]))
    shown_NK = torch.arange(best_NK.shape[1], device=best_NK.device) < length_N[:, None]
    return (best_NK * shown_NK) @ discounts(best_NK.shape[1]).to(best_NK.device)


def _largest(value_NC: Tensor, count: int) -> Tensor:
    """The largest `count` values of each row, descending."""
    if value_NC.device.type != "cpu":
        return value_NC.topk(count, dim=1).values
    # numpy sorts short rows many times faster than torch does on a processor, and half of the time went there.
    ascending_NC = np.sort(value_NC.numpy(), axis=1)
    return torch.from_numpy(ascending_NC[:, ::-1][:, :count].copy())


def _inverse(ideal_N: Tensor) -> Tensor:
    """1/IDCG, and 0 where it is zero: such a list has no credit."""
    return torch.where(ideal_N > 0, 1.0 / ideal_N.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def _by_length(length_N: Tensor) -> list[tuple[int, Tensor | slice]]:
    """Rows of each length above 0; a slice where all are of one."""
    lengths = [length for length in torch.unique(length_N).tolist() if length > 0]
    if len(lengths) == 1 and bool((length_N == lengths[0]).all()):
        return [(lengths[0], slice(None))]
    return [(length, (length_N == length).nonzero()[:, 0]) for length in lengths]
