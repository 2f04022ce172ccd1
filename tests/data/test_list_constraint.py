"""Contract of `data.list_constraint` and `data.lists`: at every prefix the legal tokens, the items and the end are
those of a search through sets of paths, with unequal lengths, shared beginnings, several prompts, the first K or all
candidates, and free text; illegal tokens and impossible sets are refused; spans and items read back from the tokens
are those that made them.

Not checked: decoding with it (tests of rollout do).
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.list_constraint import ListConstraint, ListState
from data.lists import read_lists
from data.records import FORMAT_SEGMENT, NO_ITEM, NO_SEGMENT, ListSpec
from data.trie import ItemTrie
from tests.data.test_trie_constraint import END, Path, completed, csr

BEGIN, VOCABULARY = 10, 12
paths_lists = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=9, unique_by=tuple)


class Brute:
    """One list under way: sets of paths, nothing else."""

    def __init__(self, paths: list[Path], candidates: list[int], length: int, text: int) -> None:
        self.paths = {item: paths[item] for item in candidates}
        self.length = length or len(candidates)
        self.text = text
        self.in_text = text > 0
        self.placed: list[int] = []
        self.prefix: Path = ()
        self.segments: list[int] = []

    @property
    def done(self) -> bool:
        return len(self.placed) == self.length

    def legal(self) -> list[int]:
        if self.in_text:
            return list(range(VOCABULARY)) if len(self.segments) < self.text else [BEGIN]
        if self.done:
            return []
        depth = len(self.prefix)
        going = [path for item, path in self.paths.items() if item not in self.placed and path[:depth] == self.prefix]
        return sorted({path[depth] for path in going})

    def take(self, token: int) -> Brute:
        after = Brute.__new__(Brute)
        after.__dict__ = {**self.__dict__, "placed": list(self.placed)}
        after.segments = [*self.segments, FORMAT_SEGMENT if self.in_text else len(self.placed)]
        if self.in_text:
            after.in_text = token != BEGIN
            return after
        after.prefix = (*self.prefix, token)
        for item, path in self.paths.items():
            if path == after.prefix and item not in self.placed:
                after.placed.append(item)
                after.prefix = ()
        return after


def legal_tokens(constraint: ListConstraint, state: ListState) -> list[list[int]]:
    legal = constraint.legal(state)
    assert legal.token_NC.dtype == torch.int64
    assert legal.legal_NC.dtype == torch.bool
    assert bool((legal.token_NC[~legal.legal_NC] == 0).all())
    return [tokens[mask].tolist() for tokens, mask in zip(legal.token_NC, legal.legal_NC, strict=True)]


@settings(deadline=None, max_examples=100)
@given(case=st.data(), paths=paths_lists, text=st.sampled_from([0, 0, 1, 3]), fixed=st.booleans())
def test_every_list_is_what_sets_of_paths_allow(
    case: st.DataObject, paths: list[list[int]], text: int, fixed: bool
) -> None:
    full = completed(paths)
    items = st.lists(st.integers(0, len(paths) - 1), min_size=1, unique=True)
    sets = [case.draw(items, "candidates") for _ in range(3)]
    length = case.draw(st.integers(1, min(map(len, sets))), "length") if fixed else 0
    lists = ListSpec(candidates=len(paths) + 1, length=length, text_tokens=text)
    trie = ItemTrie.build(*csr(paths), end_token=END)
    constraint = ListConstraint(trie, lists, begin_token=BEGIN, vocabulary_size=VOCABULARY)
    state = constraint.start([np.asarray(some, dtype=np.int32) for some in sets])
    rows = [(prompt, Brute(full, some, length, text), ()) for prompt, some in enumerate(sets)]
    finished: list[tuple[int, Brute, Path]] = []
    for tokens in range(constraint.max_tokens + 1):
        assert legal_tokens(constraint, state) == [brute.legal() for _, brute, _ in rows]
        done = [brute.done for _, brute, _ in rows]
        assert constraint.done(state).tolist() == done
        first = [brute.placed[0] if brute.done else NO_ITEM for _, brute, _ in rows]
        assert constraint.items(state).tolist() == first
        placed = [brute.placed + [NO_ITEM] * (lists.width - len(brute.placed)) for _, brute, _ in rows]
        assert constraint.ranked(state).tolist() == placed
        finished += [row for row, end in zip(rows, done, strict=True) if end]
        choices = [(row, token) for row, (_, brute, _) in enumerate(rows) for token in brute.legal()]
        if not choices:
            break
        assert tokens < constraint.max_tokens
        some = case.draw(st.lists(st.sampled_from(choices), min_size=1, max_size=5), "continuations")
        state = constraint.advance(state, torch.tensor([r for r, _ in some]), torch.tensor([t for _, t in some]))
        rows = [(rows[r][0], rows[r][1].take(t), (*rows[r][2], t)) for r, t in some]
    assert finished
    for prompt, brute, _ in finished:
        assert len(set(brute.placed)) == (length or len(sets[prompt]))
        assert set(brute.placed) <= set(sets[prompt])

    # Read back, beside an empty slot, as groups hold them.
    of_prompt = [[row for row in finished if row[0] == prompt] for prompt in range(3)]
    members, width = max(map(len, of_prompt)), max(len(path) for *_, path in finished)
    token_PGT = np.full((3, members + 1, width), -1, np.int32)
    length_PG = np.zeros((3, members + 1), np.int32)
    for prompt, mine in enumerate(of_prompt):
        for member, (_, _, path) in enumerate(mine):
            token_PGT[prompt, member, : len(path)] = path
            length_PG[prompt, member] = len(path)
    read = read_lists(constraint, [np.asarray(some, dtype=np.int32) for some in sets], token_PGT, length_PG)
    for prompt, mine in enumerate(of_prompt):
        for member in range(members + 1):
            brute_segments = mine[member][1].segments if member < len(mine) else []
            padded = brute_segments + [NO_SEGMENT] * (width - len(brute_segments))
            assert read.segment_PGT[prompt, member].tolist() == padded
            ranked = mine[member][1].placed if member < len(mine) else []
            assert read.item_PGK[prompt, member].tolist() == ranked + [NO_ITEM] * (lists.width - len(ranked))


@settings(deadline=None, max_examples=25)
@given(case=st.data(), paths=paths_lists, text=st.sampled_from([0, 2]))
def test_only_legal_tokens_can_be_taken(case: st.DataObject, paths: list[list[int]], text: int) -> None:
    lists = ListSpec(candidates=len(paths), text_tokens=text)
    trie = ItemTrie.build(*csr(paths), end_token=END)
    constraint = ListConstraint(trie, lists, begin_token=BEGIN, vocabulary_size=VOCABULARY)
    state = constraint.start([np.arange(len(paths), dtype=np.int32)])
    brute = Brute(completed(paths), list(range(len(paths))), 0, text)
    while True:
        for token in [t for t in range(-2, VOCABULARY + 3) if t not in brute.legal()]:
            with pytest.raises(ValueError, match=f"token {token} at position {len(brute.segments)} is not legal"):
                constraint.advance(state, torch.tensor([0]), torch.tensor([token]))
        if brute.done:
            break
        token = case.draw(st.sampled_from(brute.legal()))
        state, brute = constraint.advance(state, torch.tensor([0]), torch.tensor([token])), brute.take(token)


def test_all_permutations_can_be_said() -> None:
    paths = [[0], [1, 0], [1, 1, 0], [1, 1, 1]]
    trie = ItemTrie.build(*csr(paths))
    for length, count in ((0, 24), (2, 12), (4, 24)):
        constraint = ListConstraint(
            trie, ListSpec(candidates=4, length=length), begin_token=BEGIN, vocabulary_size=VOCABULARY
        )
        state = constraint.start([np.arange(4, dtype=np.int32)])
        said = []
        while len(state.prompt_N):
            said += constraint.ranked(state)[constraint.done(state)].tolist()
            legal = constraint.legal(state)
            parent, column = legal.legal_NC.nonzero(as_tuple=True)
            state = constraint.advance(state, parent, legal.token_NC[parent, column])
        width = length or 4
        assert sorted(tuple(one[:width]) for one in said) == sorted(itertools.permutations(range(4), width))
        assert len(said) == count


def test_specifications_and_lengths() -> None:
    trie = ItemTrie.build(*csr([[1, 2, 3], [4]]))

    def of(**lists: int) -> ListConstraint:
        return ListConstraint(trie, ListSpec(**lists), begin_token=BEGIN, vocabulary_size=VOCABULARY)

    assert (of(candidates=5).spec, of(candidates=5).max_tokens) == ("list-all-of-5", 15)
    assert (of(candidates=5, length=2).spec, of(candidates=5, length=2).max_tokens) == ("list-2-of-5", 6)
    assert of(candidates=5, length=2, text_tokens=8).spec == "list-2-of-5-text-8"
    assert of(candidates=5, length=2, text_tokens=8).max_tokens == 15
    for wrong in ({"candidates": 0}, {"candidates": 2, "length": 3}, {"candidates": 2, "text_tokens": -1}):
        with pytest.raises(ValueError, match="allows no list"):
            of(**wrong)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "0 to 0 candidates, not 2 to 4"),
        ([0], "1 to 1 candidates"),
        ([0, 1, 2, 3, 4], "5 to 5 candidates"),
        ([0, 7], "candidate 7 is not in the trie"),
        ([0, -1], "candidate -1 is not in the trie"),
        ([0, 5], "candidate 5 is not in the trie"),
        ([0, 1, 0], "candidate 0 or its path twice"),
        ([3, 1, 4], "candidate 3 or its path twice"),
    ],
)
def test_impossible_sets_are_refused(items: list[int], message: str) -> None:
    active = np.array([1, 1, 1, 1, 1, 0], dtype=bool)
    trie = ItemTrie.build(*csr([[1], [2], [3], [4, 1], [4, 1], [5]]), active=active)
    constraint = ListConstraint(trie, ListSpec(candidates=4, length=2), begin_token=BEGIN, vocabulary_size=VOCABULARY)
    with pytest.raises(ValueError, match=message):
        constraint.start([np.asarray(items, dtype=np.int32)])


def test_lists_that_end_early_are_refused() -> None:
    trie = ItemTrie.build(*csr([[1], [2], [3]]))
    constraint = ListConstraint(trie, ListSpec(candidates=3), begin_token=BEGIN, vocabulary_size=VOCABULARY)
    token_PGT = np.array([[[1, 2, 3], [3, 2, -1]]], np.int32)
    with pytest.raises(ValueError, match="completion 1 of prompt 0 ends after 2 tokens, before its list"):
        read_lists(constraint, [np.arange(3, dtype=np.int32)], token_PGT, np.array([[3, 2]], np.int32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs cuda")
def test_cuda_gives_what_the_cpu_gives() -> None:
    rng = np.random.default_rng(0)
    trie = ItemTrie.build(*csr(np.unique(rng.integers(0, 6, (150, 3)), axis=0).tolist()))
    items = [rng.choice(80, 30, replace=False).astype(np.int32) for _ in range(4)]
    lists = ListSpec(candidates=30, length=10, text_tokens=2)
    host, device = (
        ListConstraint(t, lists, begin_token=BEGIN, vocabulary_size=VOCABULARY) for t in (trie, trie.to("cuda"))
    )
    here, there = host.start(items), device.start(items)
    for _ in range(host.max_tokens):
        legal, other = host.legal(here), device.legal(there)
        assert torch.equal(legal.token_NC, other.token_NC.cpu())
        assert torch.equal(legal.legal_NC, other.legal_NC.cpu())
        row = torch.arange(len(here.prompt_N))[legal.legal_NC.any(1)]
        if not len(row):
            break
        choice = torch.multinomial(legal.legal_NC[row].float(), 1, generator=torch.Generator().manual_seed(1))[:, 0]
        token = legal.token_NC[row, choice]
        here, there = host.advance(here, row, token), device.advance(there, row.cuda(), token.cuda())
    assert torch.equal(host.ranked(here), device.ranked(there).cpu())
