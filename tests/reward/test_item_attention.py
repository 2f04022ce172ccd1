"""Contract: rows by id and attention over a history are what torch's own functions give, and so are their gradients;
places that are absent are not looked at.

Not checked here: the encoder around them (`tests/trainer/test_laac_losses.py`, `tests/reward/test_rankers.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from reward.item_attention import attended, item_rows

ROWS, QUERIES, PLACES, WIDTH, ITEMS = 5, 2, 4, 6, 9


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def histories() -> tuple[Tensor, Tensor, Tensor]:
    """Queries, what is read, and absent places: none in the first row, all but one in the last."""
    absent_BH = torch.arange(PLACES) < torch.tensor([0, 1, 2, 1, 3])[:, None]
    return numbers(ROWS, QUERIES, WIDTH), numbers(ROWS, PLACES, WIDTH), absent_BH


def plain(query_BKD: Tensor, read_BHD: Tensor, absent_BH: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query_BKD, read_BHD, read_BHD, attn_mask=~absent_BH[:, None])


def test_attention_and_its_gradients_are_torchs() -> None:
    query_BKD, read_BHD, absent_BH = histories()
    found, expected = attended(query_BKD, read_BHD, absent_BH), plain(query_BKD, read_BHD, absent_BH)
    torch.testing.assert_close(found, expected)
    weight_BKD = torch.randn(found.shape, dtype=found.dtype)
    gradients = [torch.autograd.grad(value, (query_BKD, read_BHD), weight_BKD) for value in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][1][absent_BH].any()


def test_gradients_are_those_of_differences() -> None:
    query_BKD, read_BHD, absent_BH = histories()
    place = torch.tensor([[0, 8, 8], [3, 3, 3]])
    assert torch.autograd.gradcheck(lambda query, read: attended(query, read, absent_BH), (query_BKD, read_BHD))
    assert torch.autograd.gradcheck(lambda rows: item_rows(rows, place), (numbers(ITEMS, WIDTH),))


def test_a_row_without_a_place_is_the_mean_of_what_is_hidden() -> None:
    query_BKD, read_BHD, absent_BH = histories()
    absent_BH = absent_BH | (torch.arange(ROWS) == 2)[:, None]
    hidden = torch.finfo(torch.float64).min
    logit_BKH = (query_BKD @ read_BHD.transpose(1, 2) * WIDTH**-0.5).masked_fill(absent_BH[:, None], hidden)
    found, expected = attended(query_BKD, read_BHD, absent_BH), logit_BKH.softmax(-1) @ read_BHD
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[2], read_BHD[2].mean(0).expand(QUERIES, WIDTH))
    weight_BKD = torch.randn(found.shape, dtype=found.dtype)
    gradients = [torch.autograd.grad(value, (query_BKD, read_BHD), weight_BKD) for value in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_rows_of_items_are_torchs_to_the_bit() -> None:
    item_ND, place = numbers(ITEMS, WIDTH), torch.tensor([[4, 4, 0], [8, 4, 1]])
    found, expected = item_rows(item_ND, place), functional.embedding(place, item_ND)
    assert torch.equal(found, expected)
    weight = torch.randn(found.shape, dtype=found.dtype)
    gradients = [torch.autograd.grad(value, item_ND, weight)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
