"""Contract of `data.feed`: an epoch gives every row at most once, order and windows are functions of the seed and the
epoch, a cursor continues exactly or says why not, and each target of a sequence is predicted exactly once per epoch.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.catalogue import Catalogue
from data.errors import RequestError
from data.feed import Feed, sequence_windows
from data.prompts import PromptBuilder
from tests.data.tiny import samples, sequences

ITEMS = 40
CATALOGUE = Catalogue.from_codes([[item // 8, item % 8] for item in range(ITEMS - 1)] + [[5]])


def feed(rows: int = 10, batch: int = 3, seed: int = 0, shuffle: bool = True, fingerprint: str = "f") -> Feed:
    data = samples([[row % ITEMS] for row in range(rows)], [0] * rows)
    return Feed(data, PromptBuilder(CATALOGUE, 5, False, 32), batch, seed, shuffle, fingerprint=fingerprint)


def ids(source: Feed, batches: int) -> list[list[int]]:
    return [[prompt.prompt_id for prompt in source.next().prompts] for _ in range(batches)]


def test_an_epoch_gives_every_row_at_most_once_and_the_next_differs() -> None:
    batches = ids(feed(), 6)
    first, second = ([row for batch in half for row in batch] for half in (batches[:3], batches[3:]))
    assert len(set(first)) == len(first) == 9
    assert len(set(second)) == 9
    assert first != second
    assert batches == ids(feed(), 6)
    assert batches != ids(feed(seed=1), 6)


def test_without_shuffling_rows_come_in_order() -> None:
    assert ids(feed(shuffle=False), 4) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 1, 2]]


@settings(deadline=None, max_examples=40)
@given(before=st.integers(0, 9), after=st.integers(1, 5))
def test_a_cursor_continues_exactly(before: int, after: int) -> None:
    whole = ids(feed(), before + after)
    first = feed()
    ids(first, before)
    second = feed()
    assert second.load_state_dict(first.state_dict()) is None
    assert ids(second, after) == whole[before:]


def test_a_cursor_of_other_data_starts_anew_and_says_so() -> None:
    first = feed()
    ids(first, 2)
    second = feed(fingerprint="other")
    message = second.load_state_dict(first.state_dict())
    assert message is not None
    assert "fingerprint 'f' became 'other'" in message
    assert ids(second, 1) == ids(feed(), 1)


@pytest.mark.parametrize("batch", [0, 11])
def test_a_batch_larger_than_the_split_is_refused(batch: int) -> None:
    with pytest.raises(RequestError, match="1 to 10"):
        feed(batch=batch)


@settings(deadline=None, max_examples=150)
@given(case=st.data(), history=st.integers(1, 7), epoch=st.integers(0, 3))
def test_windows_predict_every_target_once(case: st.DataObject, history: int, epoch: int) -> None:
    lengths = case.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    loss_from = [case.draw(st.integers(0, length - 1)) for length in lengths]
    stride = case.draw(st.integers(1, history))
    # Every event is another item, so that a token tells which event it is.
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    if bounds[-1] > ITEMS:
        return
    events = [list(range(start, stop)) for start, stop in itertools.pairwise(bounds.tolist())]
    item_of = {tuple(CATALOGUE.tokens(item).tolist()): item for item in range(ITEMS)}
    rows = sequence_windows(sequences(events, loss_from), CATALOGUE, history, 7, epoch, stride=stride)
    targets: list[int] = []
    for tokens, mask in rows:
        assert tokens.dtype == np.int32
        assert tokens[0] == 1
        assert not mask[0]
        at, window, wanted = 1, [], []
        while at < len(tokens):
            size = 1 if tuple(tokens[at : at + 1].tolist()) in item_of else 2
            window.append(item_of[tuple(tokens[at : at + size].tolist())])
            assert len(set(mask[at : at + size].tolist())) == 1
            wanted.append(bool(mask[at]))
            at += size
        owner = next(s for s, items in enumerate(events) if window[0] in items)
        assert window == list(range(window[0], window[0] + len(window)))
        assert window[-1] in events[owner]
        assert len(window) <= history + 1
        assert wanted == sorted(wanted)
        first = window[wanted.index(True)]
        if len(events[owner]) > history + 1:
            assert sum(wanted) <= stride
            assert len(window) == history + 1 or window[0] == events[owner][0]
            assert wanted.index(True) > 0 or first == events[owner][0]
        else:
            assert window == events[owner]
        targets += [item for item, is_target in zip(window, wanted, strict=True) if is_target]
    expected = [item for items, start in zip(events, loss_from, strict=True) for item in items[start:]]
    assert sorted(targets) == sorted(expected)


def test_windows_depend_on_seed_and_epoch_only() -> None:
    data = sequences([list(range(ITEMS))], [1])

    def cut(seed: int, epoch: int) -> list[list[int]]:
        return [tokens.tolist() for tokens, _ in sequence_windows(data, CATALOGUE, 5, seed, epoch)]

    assert cut(0, 0) == cut(0, 0)
    assert len({str(sorted(cut(0, epoch))) for epoch in range(10)}) > 1
    with pytest.raises(RequestError, match="stride: 6; legal: 1 to 5"):
        sequence_windows(data, CATALOGUE, 5, 0, 0, stride=6)
