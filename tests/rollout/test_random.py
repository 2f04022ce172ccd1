"""Random numbers are those of the published generator, uniform, and a function of their key alone."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rollout.random import philox, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, words: str) -> None:
    def parse(text: str) -> list[int]:
        return [int(word, 16) for word in text.split()]

    low, high = parse(key)
    assert philox(np.array([parse(counter)], np.uint32), (low, high))[0].tolist() == parse(words)


def test_uniform_and_keyed() -> None:
    ids = np.arange(4000)
    drawn = uniforms(seed=2**63 + 5, step=7, prompt_id_P=ids, members=16, token=2)
    assert drawn.shape == (4000, 16)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 1e-3
    assert len(np.unique(drawn)) == drawn.size
    some = uniforms(seed=2**63 + 5, step=7, prompt_id_P=ids[[9, 3]], members=4, token=2)
    assert np.array_equal(some, drawn[[9, 3], :4])
    for change in ({"seed": 1}, {"step": 8}, {"token": 3}):
        key = {"seed": 2**63 + 5, "step": 7, "token": 2, **change}
        assert not np.isin(uniforms(prompt_id_P=ids[:50], members=16, **key), drawn).any()


@pytest.mark.parametrize("change", [{"seed": -1}, {"seed": 2**64}, {"step": -1}, {"token": 2**32}])
def test_keys_that_do_not_fit_are_refused(change: dict[str, int]) -> None:
    key = {"seed": 0, "step": 0, "token": 0, **change}
    with pytest.raises(ValueError, match=r"must be in|not in"):
        uniforms(prompt_id_P=np.arange(2), members=1, **key)
    with pytest.raises(ValueError, match="must be in"):
        uniforms(prompt_id_P=np.array([-1]), members=1, seed=0, step=0, token=0)
