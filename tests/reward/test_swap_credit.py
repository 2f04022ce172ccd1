"""Swap credit: equal to a double loop over real swaps, and the identities of methods.md section 8, item 8.

Checked for every form, linear and exponential gains, ties, lists of unequal length, lists that show the first
positions of a larger candidate set, zero ideal DCG, and the propagated variance against a simulation-free oracle (the
numerical Jacobian). Not checked: speed (`windlass bench reward`), the credit's way to the tokens.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import RequestError
from reward.swap_credit import (
    LISTS_PER_CHUNK,
    GainForm,
    SwapForm,
    credit_matrix,
    credit_variance,
    gain_values,
    swap_credit,
)

GRADES = st.lists(st.sampled_from([0.0, 0.25, 1.0, 2.0, 3.5, 5.0]), min_size=1, max_size=9)


def dcg(gains: list[float]) -> float:
    return sum(gain / math.log2(position + 2) for position, gain in enumerate(gains))


def real_swaps(gains: list[float], form: SwapForm, candidates: list[float]) -> list[float]:
    """The definition, by making every swapped list."""
    size = len(gains)
    ideal = dcg(sorted(candidates, reverse=True)[:size])
    if ideal == 0:
        return [0.0] * size
    credit = []
    for k in range(size):
        if form is SwapForm.INDEPENDENT:
            credit.append(gains[k] / math.log2(k + 2) / ideal)
            continue
        if form is SwapForm.SUFFIX_DCG:
            credit.append(sum(gains[j] / math.log2(j + 2) for j in range(k, size)))
            continue
        others = range(k + 1, size) if form is SwapForm.CAUSAL else [j for j in range(size) if j != k]
        deltas = []
        for j in others:
            swapped = list(gains)
            swapped[k], swapped[j] = swapped[j], swapped[k]
            deltas.append((dcg(gains) - dcg(swapped)) / ideal)
        credit.append(sum(deltas) / len(deltas) if deltas else 0.0)
    return credit


@pytest.mark.parametrize("form", list(SwapForm))
@pytest.mark.parametrize("gain_form", list(GainForm))
@settings(max_examples=25)
@given(lists=st.lists(GRADES, min_size=1, max_size=6), extra=st.integers(0, 3))
def test_equals_real_swaps(form: SwapForm, gain_form: GainForm, lists: list[list[float]], extra: int) -> None:
    width = max(len(grades) for grades in lists)
    lengths = torch.tensor([len(grades) for grades in lists])
    grade_NK = torch.full((len(lists), width), 4.0)
    for row, grades in enumerate(lists):
        grade_NK[row, : len(grades)] = torch.tensor(grades)
    gain_NK = gain_values(grade_NK, gain_form)
    candidates = [[*gain_NK[row, : len(g)].tolist(), *[1.5] * extra] for row, g in enumerate(lists)]
    candidate_NC = torch.zeros(len(lists), width + extra, dtype=torch.float64)
    for row, values in enumerate(candidates):
        candidate_NC[row, : len(values)] = torch.tensor(values)
    credit_NK, _ = swap_credit(gain_NK, form, length_N=lengths, candidate_gain_NC=candidate_NC)
    for row, grades in enumerate(lists):
        wanted = real_swaps(gain_NK[row, : len(grades)].tolist(), form, candidates[row])
        np.testing.assert_allclose(credit_NK[row, : len(grades)], wanted, atol=1e-12)
        assert not credit_NK[row, len(grades) :].any()


@given(grades=GRADES)
def test_signs_and_scale(grades: list[float]) -> None:
    ordered = torch.tensor(sorted(grades, reverse=True))[None]
    assert bool((swap_credit(ordered, SwapForm.CAUSAL).credit_NK >= -1e-15).all())
    assert bool((swap_credit(ordered.flip(1), SwapForm.CAUSAL).credit_NK <= 1e-15).all())
    gain = torch.tensor(grades)[None]
    for form in (SwapForm.CAUSAL, SwapForm.ALL_PAIRS, SwapForm.INDEPENDENT):
        torch.testing.assert_close(swap_credit(3 * gain, form).credit_NK, swap_credit(gain, form).credit_NK)


@given(value=st.floats(0, 10), size=st.integers(1, 40), form=st.sampled_from([SwapForm.CAUSAL, SwapForm.ALL_PAIRS]))
def test_equal_gains_give_exactly_zero(value: float, size: int, form: SwapForm) -> None:
    assert not swap_credit(torch.full((2, size), value), form).credit_NK.any()


@given(grades=GRADES.filter(lambda grades: len(grades) > 1 and max(grades) > 0), data=st.data())
def test_a_swap_is_worth_the_same_from_both_sides_and_its_reverse_the_opposite(
    grades: list[float], data: st.DataObject
) -> None:
    k, j = data.draw(st.permutations(range(len(grades))))[:2]
    swapped = list(grades)
    swapped[k], swapped[j] = swapped[j], swapped[k]
    size = len(grades)

    def delta(gains: list[float], first: int, second: int) -> float:
        """The part of position `first` that comes from its swap with `second`: their gains alone, all others equal."""
        matrix = credit_matrix(SwapForm.ALL_PAIRS, size) * (size - 1)
        return float(matrix[first, second]) * (gains[second] - gains[first])

    exact = (dcg(grades) - dcg(swapped)) / dcg(sorted(grades, reverse=True))
    ideal = dcg(sorted(grades, reverse=True))
    assert delta(grades, k, j) / ideal == pytest.approx(exact, abs=1e-12)
    assert delta(grades, k, j) == pytest.approx(delta(grades, j, k), abs=1e-12)
    assert delta(swapped, k, j) == pytest.approx(-delta(grades, k, j), abs=1e-12)
    pair = torch.tensor([[grades[k], grades[j]], [grades[j], grades[k]]])
    both = swap_credit(pair, SwapForm.ALL_PAIRS).credit_NK
    torch.testing.assert_close(both[:, 0], both[:, 1])
    torch.testing.assert_close(both[0], -both[1])


@given(grades=GRADES.filter(lambda grades: max(grades) > 0))
def test_telescoping(grades: list[float]) -> None:
    size = len(grades)
    gain = torch.tensor([grades], dtype=torch.float64)
    ideal = dcg(sorted(grades, reverse=True))
    discount = [1 / math.log2(k + 2) for k in range(size)]
    random_ndcg = sum(grades) * sum(discount) / (size * ideal)
    wanted = size * (dcg(grades) / ideal - random_ndcg)
    causal = swap_credit(gain, SwapForm.CAUSAL).credit_NK[0]
    weighted = sum((size - 1 - k) * float(causal[k]) for k in range(size))
    assert weighted == pytest.approx(wanted, abs=1e-10)
    every = swap_credit(gain, SwapForm.ALL_PAIRS).credit_NK[0]
    assert (size - 1) * float(every.sum()) == pytest.approx(2 * wanted, abs=1e-10)
    suffix = swap_credit(gain, SwapForm.SUFFIX_DCG).credit_NK[0]
    for k in range(size - 1):
        assert float(suffix[k] - suffix[k + 1]) == pytest.approx(grades[k] * discount[k])


@pytest.mark.parametrize("form", list(SwapForm))
def test_no_positive_gain_gives_zeros_and_says_so(form: SwapForm) -> None:
    credit = swap_credit(torch.zeros(3, 5), form)
    assert not credit.credit_NK.any()
    assert not credit.ideal_N.any()


@pytest.mark.parametrize("form", list(SwapForm))
def test_variance_is_that_of_the_linear_map(form: SwapForm) -> None:
    generator = torch.Generator().manual_seed(0)
    gain = torch.rand(1, 6, generator=generator, dtype=torch.float64)
    spread = torch.rand(1, 6, generator=generator, dtype=torch.float64)
    ideal_N = swap_credit(gain, form).ideal_N
    # The ideal held fixed: a candidate set whose best list does not change when a gain does.
    fixed = torch.full((1, 6), 1.0, dtype=torch.float64) * ideal_N / sum(1 / math.log2(k + 2) for k in range(6))
    base = swap_credit(gain, form, candidate_gain_NC=fixed).credit_NK
    wanted = torch.zeros(1, 6, dtype=torch.float64)
    for i in range(6):
        moved = gain.clone()
        moved[0, i] += 1.0
        wanted += (swap_credit(moved, form, candidate_gain_NC=fixed).credit_NK - base).square() * spread[0, i]
    torch.testing.assert_close(credit_variance(spread, ideal_N, form), wanted)


def test_batches_above_one_chunk_equal_their_parts() -> None:
    gain = torch.rand(LISTS_PER_CHUNK + 3, 4, generator=torch.Generator().manual_seed(0))
    whole = swap_credit(gain, SwapForm.CAUSAL)
    # The rows of a matrix product round by their number.
    part = swap_credit(gain[-5:], SwapForm.CAUSAL).credit_NK
    torch.testing.assert_close(whole.credit_NK[-5:], part, rtol=0, atol=1e-15)
    assert whole.ideal_N.shape == (len(gain),)


def test_rows_of_the_swap_matrices_sum_to_zero() -> None:
    for form in (SwapForm.CAUSAL, SwapForm.ALL_PAIRS):
        torch.testing.assert_close(credit_matrix(form, 30).sum(1), torch.zeros(30, dtype=torch.float64))


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_gains_are_named(value: float) -> None:
    gain = torch.ones(2, 3)
    gain[1, 2] = value
    with pytest.raises(RequestError, match=r"gain_NK\[1, 2\].*legal"):
        swap_credit(gain, SwapForm.CAUSAL)
    late = torch.cat([torch.ones(LISTS_PER_CHUNK, 3), gain])
    with pytest.raises(RequestError, match=rf"gain_NK\[{LISTS_PER_CHUNK + 1}, 2\]"):
        swap_credit(late, SwapForm.CAUSAL)


def test_bad_lengths_are_named() -> None:
    with pytest.raises(RequestError, match="length_N"):
        swap_credit(torch.ones(1, 3), SwapForm.CAUSAL, length_N=torch.tensor([4]))
