"""Contract: an open member is scored as if its item were in the constraint for it alone, and nobody else sees it.

The oracle enumerates the paths: those of the active items, and for an open member its own, without what the prompt
excludes. Every score and the gradient are compared, with temperatures, split groups, ranks and stretches. Logits are
random here; a model behind them, and several processes, are in test_trees.py and test_learner.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data.trie import ItemTrie, complete_paths
from data.trie_constraint import TrieConstraint
from trainer.legal import LegalTable, replay
from trainer.micro_batches import micro_batches
from trainer.policy import TokenScores, token_scores, token_scores_in_stretches
from trainer.trees import Completions, TreeBatch, completion_pieces, lay_out

END = 9
VOCABULARY = 12
Path = tuple[int, ...]
paths_lists = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=2, max_size=9)


class World(NamedTuple):
    """Items, and groups of them."""

    paths: list[Path]
    active: set[int]
    excluded: list[set[int]]
    items: list[list[int]]
    """By prompt, one per member."""

    @staticmethod
    def of(paths: list[list[int]], retired: set[int], excluded: Sequence[set[int]], items: list[list[int]]) -> World:
        values = np.array([token for path in paths for token in path], np.int32)
        start = np.cumsum([0, *map(len, paths)])
        values, start = complete_paths(values, start, END)
        bounds = zip(start[:-1].tolist(), start[1:].tolist(), strict=True)
        complete = [tuple(values[first:last].tolist()) for first, last in bounds]
        return World(complete, set(range(len(paths))) - retired, list(excluded), items)

    def is_open(self, prompt: int, member: int) -> bool:
        """Of a retired item that the prompt does not exclude."""
        return self.items[prompt][member] not in self.active | self.excluded[prompt]

    def constraint(self) -> TrieConstraint:
        """Of the active items."""
        active = np.isin(np.arange(len(self.paths)), list(self.active))
        start = np.cumsum([0, *map(len, self.paths)])
        trie = ItemTrie.build(np.concatenate([np.array(path) for path in self.paths]), start, active)
        return TrieConstraint(trie, exclude=True)

    def completions(self) -> Completions:
        """The groups."""
        shape = len(self.items), len(self.items[0])
        token_PGT = np.full((*shape, max(map(len, self.paths))), -1, np.int32)
        for p, g in np.ndindex(shape):
            path = self.paths[self.items[p][g]]
            token_PGT[p, g, : len(path)] = path
        return Completions(
            prompt_tokens=[np.arange(1, 3 + prompt, dtype=np.int32) for prompt in range(shape[0])],
            token_PGT=token_PGT,
            length_PG=(token_PGT >= 0).sum(2).astype(np.int32),
            valid_PG=np.ones(shape, np.bool_),
            exclusions=[np.array(sorted(items), np.int32) for items in self.excluded],
            open_PG=np.array([[self.is_open(p, g) for g in range(shape[1])] for p in range(shape[0])]),
        )

    def legal(self, prompt: int, member: int, step: int) -> list[int]:
        """Legal tokens at a step of a member, by enumeration; empty behind an illegal token."""
        own = self.paths[self.items[prompt][member]]
        known = self.active | ({self.items[prompt][member]} if self.is_open(prompt, member) else set())
        paths = [self.paths[item] for item in known - self.excluded[prompt]]
        return sorted({path[step] for path in paths if len(path) > step and path[:step] == own[:step]})


def brute_force(
    world: World, completions: Completions, batch: TreeBatch, logits_UV: Tensor, temperature: float
) -> list[tuple[Tensor, ...] | None]:
    """(logp, full, mass, entropy, certainty, choices) of every target in float64; None where it is not legal."""
    found: list[tuple[Tensor, ...] | None] = []
    for source, target, slot in zip(*(x.tolist() for x in (batch.source_K, batch.target_K, batch.slot_K)), strict=True):
        p, g, t = (int(place) for place in np.unravel_index(slot, completions.shape))
        legal = world.legal(p, g, t)
        if target not in legal:
            found.append(None)
            continue
        full_V = logits_UV[source].log_softmax(0)
        logp_C = (logits_UV[source, legal] / temperature).log_softmax(0)
        entropy = -(logp_C.exp() * logp_C).sum()
        uniform = -torch.tensor(float(len(legal)), dtype=torch.float64).log()
        certainty = (uniform - logp_C).mean()
        choices = torch.tensor(float(len(legal)), dtype=torch.float64)
        mass = full_V[legal].exp().sum()
        found.append((logp_C[legal.index(target)], full_V[target], mass, entropy, certainty, choices))
    return found


def assert_equals_the_enumeration(
    world: World, batches: Sequence[TreeBatch], table: LegalTable, temperature: float, positions: int | None, seed: int
) -> None:
    completions = world.completions()
    random = torch.Generator().manual_seed(seed)
    for batch in batches:
        # Now and then a token is all but certain or all but impossible.
        scale = 1 + 12 * (torch.rand((len(batch.head_U), 1), generator=random) < 0.2)
        exact_UV = torch.randn((len(batch.head_U), VOCABULARY), generator=random).mul(2 * scale).double()
        logits_UV = exact_UV.float().requires_grad_(True)
        exact_UV.requires_grad_(True)
        sets = table.sets(batch)
        if positions is None:
            scores = token_scores(logits_UV, batch, sets, temperature, entropy_gradient=True)
        else:
            scores, _ = token_scores_in_stretches(
                lambda batch, reduction: reduction(nn.Identity(), logits_UV, batch),  # noqa: B023
                batch,
                sets,
                temperature,
                positions=positions,
                entropy_gradient=True,
            )
        expected = brute_force(world, completions, batch, exact_UV, temperature)
        assert scores.legal_K.tolist() == [one is not None for one in expected]
        legal = [k for k, one in enumerate(expected) if one is not None]
        if not legal:
            continue
        found_K6 = torch.stack(scores[:6], 1)[legal].double()
        exact_K6 = torch.stack([torch.stack(one) for one in expected if one is not None])
        torch.testing.assert_close(found_K6, exact_K6, rtol=1e-4, atol=3e-5)
        # What carries a gradient: logp, full and entropy.
        weight_K6 = torch.randn((len(legal), 6), generator=random).double() * torch.tensor([1, 1, 0, 1, 0, 0])
        torch.autograd.backward([(weight_K6 * found_K6).sum(), (weight_K6 * exact_K6).sum()])
        assert logits_UV.grad is not None
        assert exact_UV.grad is not None
        torch.testing.assert_close(logits_UV.grad.double(), exact_UV.grad, rtol=1e-3, atol=1e-4)


@given(case=st.data(), paths=paths_lists)
@settings(max_examples=60, deadline=None)
def test_scores_and_gradients_equal_an_enumeration(case: st.DataObject, paths: list[list[int]]) -> None:
    item = st.integers(0, len(paths) - 1)
    retired = case.draw(st.sets(item, min_size=1, max_size=len(paths) - 1), "retired")
    excluded = [case.draw(st.sets(item, max_size=3), "excluded") for _ in range(2)]
    items = [case.draw(st.lists(item, min_size=4, max_size=4), "members") for _ in range(2)]
    world = World.of(paths, retired, excluded, items)
    assume(all(world.active - without for without in excluded))
    completions = world.completions()
    pieces = completion_pieces(completions, 16, case.draw(st.sampled_from([None, 8, 11]), "tree tokens"))
    ranks = case.draw(st.integers(1, 2), "ranks")
    temperature = case.draw(st.sampled_from([0.5, 1.0, 1.7]), "temperature")
    positions = case.draw(st.sampled_from([None, 1, 5]), "positions")
    for rank in range(ranks):
        batches = micro_batches(pieces, token_budget=24, rank=rank, ranks=ranks)
        slots = np.concatenate([np.zeros(0, np.int64), *(batch.slot_K.numpy() for batch in batches)])
        rows = np.unique(slots // np.prod(completions.shape[1:]))
        table = replay(world.constraint(), completions, [int(row) for row in rows])
        assert_equals_the_enumeration(world, batches, table, temperature, positions, seed=len(paths) + rank)


ACTIVE = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    ("retired", "excluded", "probabilities"),
    [
        ([2, 0, 0], (), (1 / 3, 1, 1)),  # nothing shared
        ([0, 2, 0], (), (1 / 2, 1 / 3, 1)),
        ([0, 0, 2], (), (1 / 2, 1 / 2, 1 / 3)),  # all but the last token
        ([0, 0, 0], (), (1 / 2, 1 / 2, 1 / 2)),  # the path of an active item
        ([0, 0, 0], (0,), (1 / 2, 1 / 2, 1 / 2)),  # of one that the prompt may not get
        ([1, 0, 0], (3,), (1 / 2, 1, 1)),  # which alone would have shared it
        ([0, 1, 0], (4,), (1 / 2, 1 / 2, 1)),  # retired and excluded, but an active item is the same answer
        ([0, 2, 0], (4,), None),  # retired and excluded
    ],
)
def test_equal_logits_give_the_sizes_of_the_sets(
    retired: list[int], excluded: tuple[int, ...], probabilities: tuple[float, ...] | None
) -> None:
    world = World.of([*ACTIVE, retired], {4}, [set(excluded)], [[4, 1]])
    completions = world.completions()
    batch = lay_out(completion_pieces(completions, 16))
    table = replay(world.constraint(), completions, [0])
    scores: TokenScores = token_scores(torch.zeros(len(batch.head_U), VOCABULARY), batch, table.sets(batch), 0.7)
    mine = batch.unit_K == 0
    if probabilities is None:
        assert scores.legal_K[mine].tolist() == [True, False, False]
    else:
        assert scores.legal_K.all()
        assert scores.logp_K[mine].exp().tolist() == pytest.approx(probabilities)
    # The rollout beside it has the policy of the engine.
    beside = (1 / (1 if 3 in excluded else 2), 1 / 2, 1 / (1 if 0 in excluded else 2))
    assert scores.logp_K[~mine].exp().tolist() == pytest.approx(beside)


def test_marks_are_kept_by_whatever_makes_completions_of_others() -> None:
    world = World.of([*ACTIVE, [2, 0, 0]], {4}, [set(), set()], [[1, 4], [4, 2]])
    completions = world.completions()
    assert completions.may_leave_PG.tolist() == [[False, True], [True, False]]
    assert completions.take(np.array([1])).may_leave_PG.tolist() == [[True, False]]
    token_PGT, length_PG = completions.token_PGT[:, :1], completions.length_PG[:, :1]
    plain = completions.with_members(token_PGT, length_PG)
    assert plain.may_leave_PG.tolist() == [[False, True, False], [True, False, False]]
    marked = plain.with_members(token_PGT, length_PG, np.array([[True], [False]]))
    assert marked.may_leave_PG.tolist() == [[False, True, False, True], [True, False, False, False]]
