"""Contract of `data.trie` and `data.trie_constraint`: at every prefix the legal tokens are exactly those of a search
through the list of paths, with unequal depths, shared leaves, retired items, exclusions and end tokens; dead ends,
illegal tokens and bad paths are refused; arrays and pickles keep the trie; where there is a GPU, it gives the same.

Not checked: speed (`windlass bench data`).
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data.trie
from data.errors import RequestError, RunError
from data.records import NO_ITEM
from data.trie import ItemTrie, complete_paths
from data.trie_constraint import TrieConstraint, TrieState

END = 9

Path = tuple[int, ...]
paths_lists = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=12)


def csr(paths: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray([token for path in paths for token in path], dtype=np.int32)
    return values, np.concatenate([[0], np.cumsum([len(path) for path in paths])]).astype(np.int64)


def completed(paths: list[list[int]]) -> list[Path]:
    """Brute force: the end token goes to every path that is a proper prefix of another."""
    tuples = [tuple(path) for path in paths]
    return [(*p, END) if any(q != p and q[: len(p)] == p for q in tuples) else p for p in tuples]


def brute_legal(paths: list[Path], allowed: set[int], prefix: Path) -> list[int]:
    at = len(prefix)
    return sorted({p[at] for i, p in enumerate(paths) if i in allowed and len(p) > at and p[:at] == prefix})


def legal_tokens(constraint: TrieConstraint, state: TrieState) -> list[list[int]]:
    legal = constraint.legal(state)
    assert legal.token_NC.dtype == torch.int64
    assert legal.legal_NC.dtype == torch.bool
    return [tokens[mask].tolist() for tokens, mask in zip(legal.token_NC, legal.legal_NC, strict=True)]


@pytest.mark.parametrize("dense", [True, False])
@settings(deadline=None, max_examples=150)
@given(case=st.data(), paths=paths_lists)
def test_legal_sets_equal_a_search_through_the_paths(dense: bool, case: st.DataObject, paths: list[list[int]]) -> None:
    items = st.sets(st.integers(0, len(paths) - 1))
    active = np.ones(len(paths), dtype=bool)
    active[list(case.draw(items, "retired"))] = False
    if not active.any():
        active[0] = True
    exclusions = [sorted(case.draw(items, "excluded")) for _ in range(3)]
    full = completed(paths)
    with pytest.MonkeyPatch.context() as patch:
        if not dense:
            patch.setattr(data.trie, "DENSE_ENTRIES", 0)
            patch.setattr(data.trie, "MASK_WIDTH", 0)
        trie = ItemTrie.build(*csr(paths), active=active, end_token=END)
        tables = trie.tables  # made while the limits are patched, with the masks
    assert dense or all(table is None for table in tables[1:])
    constraint = TrieConstraint(trie, exclude=True)
    alive = set(np.flatnonzero(active).tolist())
    allowed = [alive - set(excluded) for excluded in exclusions]
    state = constraint.start([np.asarray(excluded, dtype=np.int32) for excluded in exclusions])
    if not all(allowed):
        with pytest.raises(RunError, match=f"prompt {[bool(a) for a in allowed].index(False)} "):
            constraint.legal(state)
        return

    rows: list[tuple[int, Path]] = [(prompt, ()) for prompt in range(3)]
    found: list[set[Path]] = [set(), set(), set()]
    for depth in range(trie.depth + 1):
        legal = legal_tokens(constraint, state)
        done, item = constraint.done(state).tolist(), constraint.items(state).tolist()
        following: list[tuple[int, int, tuple[int, Path]]] = []
        for row, (prompt, prefix) in enumerate(rows):
            assert legal[row] == brute_legal(full, allowed[prompt], prefix)
            mine = [i for i in sorted(allowed[prompt]) if full[i] == prefix]
            assert done[row] == bool(mine)
            assert item[row] == (mine[0] if mine else NO_ITEM)
            if mine:
                found[prompt].add(prefix)
            following += [(row, token, (prompt, (*prefix, token))) for token in legal[row]]
        if not following:
            break
        assert depth < trie.depth
        parents, tokens, rows = map(list, zip(*following, strict=True))
        state = constraint.advance(state, torch.tensor(parents), torch.tensor(tokens))
    for prompt in range(3):
        assert found[prompt] == {full[i] for i in allowed[prompt]}


@settings(deadline=None, max_examples=100)
@given(case=st.data(), paths=paths_lists)
def test_only_legal_tokens_can_be_taken(case: st.DataObject, paths: list[list[int]]) -> None:
    excluded = sorted(case.draw(st.sets(st.integers(0, len(paths) - 1), max_size=len(paths) - 1)))
    full = completed(paths)
    allowed = set(range(len(paths))) - set(excluded)
    constraint = TrieConstraint(ItemTrie.build(*csr(paths), end_token=END), exclude=True)
    # A second prompt without exclusions must not lend its freedom to the first.
    state = constraint.start([np.asarray(excluded, dtype=np.int32), np.zeros(0, dtype=np.int32)])
    prefix: Path = ()
    while True:
        legal = brute_legal(full, allowed, prefix)
        for token in [t for t in range(-2, END + 3) if t not in legal]:
            with pytest.raises(ValueError, match=f"token {token} at position {len(prefix)}"):
                constraint.advance(state, torch.tensor([0]), torch.tensor([token]))
        if not legal:
            break
        token = case.draw(st.sampled_from(legal))
        state = constraint.advance(state, torch.tensor([0]), torch.tensor([token]))
        prefix = (*prefix, token)


@settings(deadline=None, max_examples=100)
@given(paths=paths_lists, tokens=st.lists(st.integers(-1, END + 1), min_size=1, max_size=6))
def test_lookup_walks_to_the_first_leaf(paths: list[list[int]], tokens: list[int]) -> None:
    full = completed(paths)
    trie = ItemTrie.build(*csr(paths), end_token=END)
    hits = [(i, len(p)) for i, p in enumerate(full) if p == tuple(tokens[: len(p)])]
    item, length = trie.lookup(torch.tensor([tokens]))
    assert (int(item), int(length)) == (hits[0] if hits else (NO_ITEM, len(tokens)))


@settings(deadline=None, max_examples=100)
@given(paths=paths_lists)
def test_structure(paths: list[list[int]]) -> None:
    trie = ItemTrie.build(*csr(paths), end_token=END)
    full = completed(paths)
    prefixes = {p[:d] for p in full for d in range(len(p) + 1)}
    assert trie.n_nodes == len(prefixes)
    assert trie.depth == max(len(p) for p in full)
    assert int(trie.subtree_items_V[0]) == len(paths)
    assert (trie.first_child_V.diff() == trie.fanout_V).all()
    for edge in range(trie.n_nodes - 1):  # breadth-first numbering: edge e leads to node e + 1
        parent = int(trie.parent_V[edge + 1])
        assert trie.first_child_V[parent] <= edge < trie.first_child_V[parent + 1]
    for item, path in enumerate(full):
        nodes = trie.ancestors(trie.item_leaf_I[item : item + 1])[0].tolist()
        walked = [int(trie.token_E[node - 1]) for node in nodes if node > 0]
        assert tuple(reversed(walked)) == path


def test_values_of_a_small_trie() -> None:
    """A trie worked out by hand: items 0 and 3 share a leaf, item 2 is retired."""
    trie = ItemTrie.build(*csr([[5, 6], [5, 7], [4, 4], [5, 6]]), active=np.array([True, True, False, True]))
    assert trie.token_E.tolist() == [5, 6, 7]
    assert trie.first_child_V.tolist() == [0, 1, 3, 3, 3]
    assert trie.parent_V.tolist() == [-1, 0, 1, 1]
    assert trie.item_start_V.tolist() == [0, 0, 0, 2, 3]
    assert trie.item_values_I.tolist() == [0, 3, 1]
    assert trie.item_leaf_I.tolist() == [2, 3, -1, 2]
    assert trie.subtree_items_V.tolist() == [3, 3, 2, 1]
    assert trie.level_start == (0, 1, 2, 4)


def test_a_shared_leaf_gives_its_first_permitted_item() -> None:
    constraint = TrieConstraint(ItemTrie.build(*csr([[1], [1], [1], [2]])), exclude=True)
    exclusions = [[0], [0, 1], [], [0, 1, 2]]
    state = constraint.start([np.asarray(excluded, dtype=np.int32) for excluded in exclusions])
    assert legal_tokens(constraint, state) == [[1, 2], [1, 2], [1, 2], [2]]
    state = constraint.advance(state, torch.arange(3), torch.tensor([1, 1, 1]))
    assert constraint.items(state).tolist() == [1, 2, 0]


def test_the_width_depends_on_the_depth_only() -> None:
    """Otherwise a beam's log-probabilities could change with its neighbours in the last bit."""
    trie = ItemTrie.build(*csr([[1, 1], [1, 2], [1, 3], [2, 1]]))
    constraint = TrieConstraint(trie, exclude=False)
    none = np.zeros(0, dtype=np.int32)
    narrow = constraint.advance(constraint.start([none]), torch.tensor([0]), torch.tensor([2]))
    assert constraint.legal(narrow).token_NC.tolist() == [[1, 0, 0]]
    assert constraint.legal(narrow).legal_NC.tolist() == [[True, False, False]]


def test_specifications() -> None:
    trie = ItemTrie.build(*csr([[1], [2]]))
    assert TrieConstraint(trie, exclude=True).spec == "item_trie-exclusions"
    plain = TrieConstraint(trie, exclude=False)
    assert (plain.spec, plain.max_tokens) == ("item_trie", 1)
    with pytest.raises(ValueError, match="without exclusions"):
        plain.start([np.asarray([0], dtype=np.int32)])
    with pytest.raises(ValueError, match="excluded item 2 "):
        TrieConstraint(trie, exclude=True).start([np.asarray([2], dtype=np.int32)])


def test_bad_paths_are_refused() -> None:
    with pytest.raises(RequestError, match=r"item 0.*beginning of another"):
        ItemTrie.build(*csr([[1], [1, 2]]))
    with pytest.raises(RequestError, match="holds the end token"):
        complete_paths(*csr([[1], [1, END]]), END)
    with pytest.raises(RequestError, match=r"item 1.*empty path"):
        ItemTrie.build(*csr([[1], []]))
    with pytest.raises(RequestError, match="negative token"):
        ItemTrie.build(*csr([[1], [-1]]))
    with pytest.raises(RequestError, match="no active item"):
        ItemTrie.build(*csr([[1], [2]]), active=np.zeros(2, dtype=bool))
    with pytest.raises(RequestError, match="no item"):
        complete_paths(*csr([]), END)


def test_arrays_and_pickles_keep_the_trie() -> None:
    trie = ItemTrie.build(*csr([[1, 2], [1, 3], [4]]))
    again = ItemTrie.from_arrays(trie.arrays())
    assert again.digest == trie.digest == pickle.loads(pickle.dumps(trie)).digest
    assert trie.to("cpu").digest == trie.digest
    assert ItemTrie.build(*csr([[1, 2], [1, 3], [5]])).digest != trie.digest


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs cuda")
def test_cuda_gives_what_the_cpu_gives() -> None:
    rng = np.random.default_rng(0)
    paths = rng.integers(0, 6, (150, 3)).tolist()
    exclusions = [rng.choice(150, 40, replace=False).astype(np.int32) for _ in range(4)]
    host = TrieConstraint(ItemTrie.build(*csr(paths)), exclude=True)
    device = host.to("cuda")
    here, there = host.start(exclusions), device.start(exclusions)
    for _ in range(host.max_tokens):
        legal, other = host.legal(here), device.legal(there)
        assert torch.equal(legal.token_NC, other.token_NC.cpu())
        assert torch.equal(legal.legal_NC, other.legal_NC.cpu())
        parent, column = legal.legal_NC.nonzero(as_tuple=True)
        token = legal.token_NC[parent, column]
        here, there = host.advance(here, parent, token), device.advance(there, parent.cuda(), token.cuda())
    assert torch.equal(host.items(here), device.items(there).cpu())
    assert bool(device.done(there).all())
