"""The decoding loop equals slow decoding in float64, on catalogues of any shape and a backend made of random tables.

Checked: beams, exhaustive ranking where the width covers it, unequal path lengths, exclusions, empty slots, ties,
independence from the batch, the distribution of samples, unconstrained decoding, broken logits. Not checked here: the
real models (test_engines.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data.catalogue import Catalogue
from data.constraint import LegalSets, legal_log_softmax
from data.errors import RunError
from data.records import NO_ITEM, Decode, DecodeSpec, IntArray
from data.trie_constraint import TrieConstraint
from rollout.decoding import Completions, decode, policy_logp, stable_top
from rollout.unconstrained import Unconstrained
from tests.rollout.oracles import Path, all_items, allowed_paths, beam_search
from tests.tiny_model import tiny_catalogue


class TableBackend:
    """A language model that is a table: logits drawn from a generator seeded by the whole prefix."""

    def __init__(self, vocabulary_size: int, sharpness: float = 1.0) -> None:
        self.vocabulary_size = vocabulary_size
        self.sharpness = sharpness
        self.rows: list[Path] = []
        self.most_rows = 0

    def logits(self, tokens: Path) -> np.ndarray:
        return np.random.default_rng(tokens).normal(size=self.vocabulary_size) * self.sharpness

    def _all(self) -> torch.Tensor:
        known = {row: self.logits(row) for row in set(self.rows)}
        return torch.from_numpy(np.stack([known[row] for row in self.rows])).float()

    def prefill(self, prompts: Sequence[IntArray], rows: int, new_tokens: int) -> torch.Tensor:
        self.rows = [tuple(map(int, prompt)) for prompt in prompts]
        self.most_rows = rows * len(prompts)
        return self._all()

    def extend(self, parent_N: torch.Tensor, token_N: torch.Tensor) -> torch.Tensor:
        pairs = list(zip(parent_N.tolist(), token_N.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs) <= self.most_rows
        self.rows = [(*self.rows[parent], token) for parent, token in pairs]
        return self._all()

    def release(self) -> None:
        self.rows = []


def run(
    catalogue: Catalogue,
    prompts: Sequence[Path],
    spec: DecodeSpec,
    exclusions: Sequence[Sequence[int]] | None = None,
    ids: Sequence[int] | None = None,
    sharpness: float = 1.0,
) -> Completions:
    excluded = [np.array(sorted(rows), np.int32) for rows in exclusions or [()] * len(prompts)]
    trie = catalogue.trie()
    constraint = TrieConstraint(trie, exclude=any(len(rows) for rows in excluded))
    return decode(
        TableBackend(catalogue.vocabulary.size, sharpness),
        constraint,
        prompts=[np.array(prompt, np.int32) for prompt in prompts],
        prompt_id_P=np.array(ids if ids is not None else range(len(prompts)), np.int64),
        exclusions=excluded,
        spec=spec,
    )


def paths_of(done: Completions, prompt: int) -> list[Path]:
    lengths = done.length_PS[prompt][done.valid_PS[prompt]].tolist()
    return [tuple(row[:n]) for row, n in zip(done.token_PST[prompt].tolist(), lengths, strict=False)]


@st.composite
def catalogues(draw: st.DrawFn) -> Catalogue:
    """Paths of one to four codes, with shared leaves and paths that continue others."""
    path = st.lists(st.integers(0, 3), min_size=1, max_size=4)
    return Catalogue.from_codes(draw(st.lists(path, min_size=1, max_size=12)))


@settings(max_examples=60, deadline=None)
@given(
    catalogue=catalogues(),
    width=st.integers(1, 14),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    seed=st.integers(0, 10**6),
)
def test_beams_equal_the_slow_search(catalogue: Catalogue, width: int, temperature: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts = [(seed, 1), (seed, 2), (seed, 3)]
    exclusions = [rng.choice(catalogue.n_items, rng.integers(0, catalogue.n_items), replace=False) for _ in prompts]
    done = run(catalogue, prompts, DecodeSpec(decode=Decode.BEAM, width=width, temperature=temperature), exclusions)
    table = TableBackend(catalogue.vocabulary.size)
    for row, prompt in enumerate(prompts):
        allowed = allowed_paths(catalogue, exclusions[row])
        expected = beam_search(lambda prefix, p=prompt: table.logits((*p, *prefix)), allowed, width, temperature)
        assert paths_of(done, row) == [path for path, _ in expected]
        found = done.logp_PST[row].double().sum(-1)[: len(expected)]
        np.testing.assert_allclose(found, [score for _, score in expected], atol=2e-6)
        assert done.item_PS[row, : len(expected)].tolist() == [allowed[path] for path, _ in expected]
        assert done.valid_PS[row].tolist() == [slot < len(expected) for slot in range(width)]
        assert (done.item_PS[row, len(expected) :] == NO_ITEM).all()
        assert (done.token_PST[row, len(expected) :] == -1).all()


@settings(max_examples=25, deadline=None)
@given(catalogue=catalogues(), decode=st.sampled_from([Decode.BEAM, Decode.SAMPLE]), order=st.permutations(range(5)))
def test_no_completion_depends_on_its_batch(catalogue: Catalogue, decode: Decode, order: list[int]) -> None:
    spec = DecodeSpec(decode=decode, width=5, seed=11, step=2)
    prompts = [(7, index) for index in range(5)]
    together = run(catalogue, prompts, spec)
    shuffled = run(catalogue, [prompts[i] for i in order], spec, ids=order)
    for place, index in enumerate(order):
        alone = run(catalogue, [prompts[index]], spec, ids=[index])
        for field, one, other in zip(together, alone, shuffled, strict=True):
            assert torch.equal(field[index], one[0])
            assert torch.equal(field[index], other[place])


def test_a_width_that_covers_all_prefixes_ranks_the_catalogue() -> None:
    catalogue = tiny_catalogue()
    done = run(catalogue, [(5, 9)], DecodeSpec(decode=Decode.BEAM, width=catalogue.n_items + 3))
    table = TableBackend(catalogue.vocabulary.size)
    ranked = all_items(lambda prefix: table.logits((5, 9, *prefix)), allowed_paths(catalogue))
    assert paths_of(done, 0) == [path for path, _ in ranked]
    assert int(done.valid_PS.sum()) == catalogue.n_items


def test_equal_scores_are_ordered_by_parent_and_token() -> None:
    catalogue = tiny_catalogue(items=64, levels=(4, 4, 4))
    done = run(catalogue, [(1,)], DecodeSpec(decode=Decode.BEAM, width=10), sharpness=0.0)
    assert paths_of(done, 0) == sorted(allowed_paths(catalogue))[:10]


def test_samples_follow_the_exact_distribution() -> None:
    catalogue = Catalogue.from_codes([[0, 0], [0, 1], [1], [2, 0, 0], [2, 0, 1], [2, 1, 0], [3, 3]])
    exclusion, prompts, width = [4], 1500, 8
    spec = DecodeSpec(decode=Decode.SAMPLE, width=width, temperature=0.8, seed=5, step=3)
    done = run(catalogue, [(2, 2)] * prompts, spec, [exclusion] * prompts)
    table = TableBackend(catalogue.vocabulary.size)
    allowed = allowed_paths(catalogue, exclusion)
    exact = dict(all_items(lambda prefix: table.logits((2, 2, *prefix)), allowed, 0.8))
    counts = np.bincount(done.item_PS.flatten().numpy(), minlength=catalogue.n_items)
    expected = np.zeros(catalogue.n_items)
    for path, item in allowed.items():
        expected[item] = np.exp(exact[path]) * prompts * width
    assert counts[4] == 0
    drawn = expected > 0
    assert stats.chisquare(counts[drawn], expected[drawn]).pvalue > 1e-3
    # Neighbouring members are independent: their pairs follow the product of the two distributions.
    pairs = done.item_PS[:, :2].numpy()
    table_of_pairs = np.zeros((catalogue.n_items, catalogue.n_items))
    np.add.at(table_of_pairs, (pairs[:, 0], pairs[:, 1]), 1)
    seen = table_of_pairs[drawn][:, drawn]
    assert stats.chi2_contingency(seen[seen.sum(1) > 20][:, seen.sum(0) > 20]).pvalue > 1e-3
    for path, logp in zip(paths_of(done, 0), done.logp_PST[0].double().sum(-1).tolist(), strict=True):
        assert logp == pytest.approx(exact[path], abs=2e-6)


def test_draws_follow_the_key() -> None:
    catalogue = tiny_catalogue()
    base = DecodeSpec(decode=Decode.SAMPLE, width=16, seed=1, step=0)
    first = run(catalogue, [(4, 4)], base)
    assert torch.equal(first.token_PST, run(catalogue, [(4, 4)], base).token_PST)
    for other in (
        run(catalogue, [(4, 4)], DecodeSpec(decode=Decode.SAMPLE, width=16, seed=2, step=0)),
        run(catalogue, [(4, 4)], DecodeSpec(decode=Decode.SAMPLE, width=16, seed=1, step=1)),
        run(catalogue, [(4, 4)], base, ids=[1]),
    ):
        assert not torch.equal(first.token_PST, other.token_PST)
    wider = run(catalogue, [(4, 4)], DecodeSpec(decode=Decode.SAMPLE, width=20, seed=1, step=0))
    assert torch.equal(first.token_PST, wider.token_PST[:, :16])


def test_unconstrained_beams_search_the_whole_vocabulary() -> None:
    catalogue = tiny_catalogue(items=20, levels=(3, 3, 3))
    size = catalogue.vocabulary.size
    table = TableBackend(size, 2.0)
    done = decode(
        table,
        Unconstrained(catalogue.trie(), vocabulary_size=size, max_tokens=3),
        prompts=[np.array([3, 1], np.int32)],
        prompt_id_P=np.zeros(1, np.int64),
        exclusions=[np.empty(0, np.int32)],
        spec=DecodeSpec(decode=Decode.BEAM, width=size**2 + 1, constrained=False),
    )
    free = {(a, b, c): -1 for a in range(size) for b in range(size) for c in range(size)}
    ranked = all_items(lambda prefix: table.logits((3, 1, *prefix)), free)
    assert paths_of(done, 0)[:50] == [path for path, _ in ranked[:50]]
    items = allowed_paths(catalogue)
    assert done.item_PS[0].tolist() == [items.get(path, NO_ITEM) for path in paths_of(done, 0)]
    assert (done.item_PS[0] != NO_ITEM).any()


def test_policy_is_the_shared_definition_whatever_the_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn((50, 300), generator=generator) * 3
    token_NC = torch.arange(200).expand(50, 200)
    legal_NC = torch.rand((50, 200), generator=generator) < 0.7
    legal_NC[:, 0] = True
    logp_NC = policy_logp(logits_NV, LegalSets(token_NC, legal_NC), 1.3)
    expected = legal_log_softmax(logits_NV.double(), LegalSets(token_NC, legal_NC), 1.3)
    torch.testing.assert_close(logp_NC, expected.float(), atol=1e-6, rtol=0)
    wide = LegalSets(
        torch.nn.functional.pad(token_NC, (0, 77)), torch.nn.functional.pad(legal_NC, (0, 77), value=False)
    )
    assert torch.equal(policy_logp(logits_NV[7:8], LegalSets(wide[0][7:8], wide[1][7:8]), 1.3)[:, :200], logp_NC[7:8])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_stop_the_run(bad: float) -> None:
    logits = torch.zeros((1, 4))
    logits[0, 2] = bad
    legal = LegalSets(torch.arange(4)[None], torch.ones((1, 4), dtype=torch.bool))
    with pytest.raises(RunError, match="not finite"):
        policy_logp(logits, legal, 1.0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.sampled_from([-np.inf, 0.0, 1.0, 2.0]), min_size=6, max_size=6), min_size=1, max_size=4),
    count=st.integers(1, 6),
)
def test_stable_top_is_a_stable_sort(rows: list[list[float]], count: int) -> None:
    values = torch.tensor(rows, dtype=torch.float64)
    expected = values.sort(dim=1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(stable_top(values, count), expected)
