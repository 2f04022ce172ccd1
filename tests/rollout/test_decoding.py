"""The decoding loop equals slow decoding in float64, on catalogues of any shape and a backend made of random tables.

Checked: beams, exhaustive ranking where the width covers it, unequal path lengths, exclusions, empty slots, ties,
independence from the batch, the distribution of samples, sets and weights of draws without replacement, unconstrained
decoding, broken logits. Not checked here: the
real models (test_engines.py).
"""

from __future__ import annotations

import itertools
from collections import Counter
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
from data.records import NO_ITEM, Decode, DecodeSpec, Finish, Groups, IntArray
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
        self.prompts: list[Path] = []
        self.most_rows = 0

    def logits(self, tokens: Path) -> np.ndarray:
        return np.random.default_rng(tokens).normal(size=self.vocabulary_size) * self.sharpness

    def _all(self, vocabulary_V: torch.Tensor | None) -> torch.Tensor:
        known = {row: self.logits(row) for row in set(self.rows)}
        logits_NV = torch.from_numpy(np.stack([known[row] for row in self.rows])).float()
        return logits_NV if vocabulary_V is None else logits_NV[:, vocabulary_V]

    def prefill(
        self, prompts: Sequence[IntArray], rows: int, new_tokens: int, vocabulary_V: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.prompts = [tuple(map(int, prompt)) for prompt in prompts]
        self.restart()
        self.most_rows = rows * len(prompts)
        return self._all(vocabulary_V)

    def extend(
        self, parent_N: torch.Tensor, token_N: torch.Tensor, vocabulary_V: torch.Tensor | None = None
    ) -> torch.Tensor:
        pairs = list(zip(parent_N.tolist(), token_N.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs) <= self.most_rows
        self.rows = [(*self.rows[parent], token) for parent, token in pairs]
        return self._all(vocabulary_V)

    def restart(self) -> None:
        self.rows = list(self.prompts)

    def release(self) -> None:
        self.rows = []


def run(
    catalogue: Catalogue,
    prompts: Sequence[Path],
    spec: DecodeSpec,
    exclusions: Sequence[Sequence[int]] | None = None,
    ids: Sequence[int] | None = None,
    sharpness: float = 1.0,
    level_head: bool = False,
) -> Completions:
    excluded = [np.array(sorted(rows), np.int32) for rows in exclusions or [()] * len(prompts)]
    trie = catalogue.trie()
    constraint = TrieConstraint(trie, exclude=any(len(rows) for rows in excluded))
    return decode(
        TableBackend(catalogue.vocabulary.size, sharpness),
        constraint,
        prompts=[np.array(prompt, np.int32) for prompt in prompts],
        prompt_id_P=np.array(ids if ids is not None else range(len(prompts)), np.int64),
        items=excluded,
        spec=spec,
        levels=[trie.level_tokens(depth) for depth in range(trie.depth)] if level_head else None,
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
    level_head=st.booleans(),
)
def test_beams_equal_the_slow_search(
    catalogue: Catalogue, width: int, temperature: float, seed: int, level_head: bool
) -> None:
    rng = np.random.default_rng(seed)
    prompts = [(seed, 1), (seed, 2), (seed, 3)]
    exclusions = [rng.choice(catalogue.n_items, rng.integers(0, catalogue.n_items), replace=False) for _ in prompts]
    done = run(
        catalogue,
        prompts,
        DecodeSpec(decode=Decode.BEAM, width=width, temperature=temperature),
        exclusions,
        level_head=level_head,
    )
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
@given(catalogue=catalogues(), decode=st.sampled_from(list(Decode)), order=st.permutations(range(5)))
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


@pytest.mark.parametrize("decode", list(Decode))
def test_logits_of_the_level_alone_give_the_same_bits(decode: Decode) -> None:
    catalogue = Catalogue.from_codes([[0, 0], [0, 1], [1], [2, 0, 0], [2, 0, 1], [2, 1, 0], [3, 3]])
    prompts, spec = [(4, 1), (4, 2)], DecodeSpec(decode=decode, width=5, seed=1)
    exclusions = [[0, 3], [6]]
    for one, other in zip(
        run(catalogue, prompts, spec, exclusions),
        run(catalogue, prompts, spec, exclusions, level_head=True),
        strict=True,
    ):
        assert torch.equal(one, other)


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


class ChainBackend:
    """A language model whose logits depend on the prompt and the last token: one table for any number of rows."""

    def __init__(self, vocabulary_size: int, prompts: int) -> None:
        self.table_VV = torch.from_numpy(np.random.default_rng(3).normal(size=(vocabulary_size,) * 2)).float() * 1.5
        self.prompts = prompts

    def prefill(
        self, prompts: Sequence[IntArray], rows: int, new_tokens: int, vocabulary_V: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.table_VV[0].expand(len(prompts), -1)

    def extend(
        self, parent_N: torch.Tensor, token_N: torch.Tensor, vocabulary_V: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.table_VV[token_N]

    def restart(self) -> None:
        pass

    def release(self) -> None:
        pass

    def distribution(self, allowed: dict[Path, int], temperature: float) -> dict[Path, float]:
        logits = self.table_VV.double().numpy()
        return {
            path: np.exp(logp)
            for path, logp in all_items(lambda prefix: logits[(0, *prefix)[-1]], allowed, temperature)
        }


def draw_sets(
    catalogue: Catalogue, *, draws: int, width: int, exclusion: Sequence[int] = ()
) -> tuple[Groups, dict[Path, float]]:
    """Groups drawn without replacement for one prompt under many keys, and the probability of every path."""
    spec = DecodeSpec(decode=Decode.SAMPLE_WITHOUT_REPLACEMENT, width=width, temperature=0.9, seed=8, step=1)
    backend = ChainBackend(catalogue.vocabulary.size, draws)
    excluded = np.array(exclusion, np.int32)
    done = decode(
        backend,
        TrieConstraint(catalogue.trie(), exclude=bool(len(excluded))),
        prompts=[np.array([1], np.int32)] * draws,
        prompt_id_P=np.arange(draws),
        items=[excluded] * draws,
        spec=spec,
    )
    groups = Groups(
        prompt_id_P=np.arange(draws),
        valid_PG=done.valid_PS.numpy(),
        token_PGT=done.token_PST.numpy().astype(np.int32),
        length_PG=done.length_PS.numpy().astype(np.int32),
        item_PG=done.item_PS.numpy().astype(np.int32),
        logp_PGT=done.logp_PST.numpy(),
        finish_PG=np.full(done.item_PS.shape, Finish.ITEM.value),
        weight_version_P=np.zeros(draws, np.int64),
        engine_id_P=np.full(draws, "table"),
        spec=spec,
        constraint="item_trie",
        catalogue_digest="",
        threshold_P=done.threshold_P.numpy(),
    )
    return groups, backend.distribution(allowed_paths(catalogue, exclusion), spec.temperature)


SMALL = [[0, 0], [0, 1], [1], [2, 0, 0], [2, 0, 1], [2, 1, 0], [3, 3]]


def test_sets_without_replacement_have_the_brute_force_frequencies() -> None:
    """The probability of a set is the sum over its orders of drawing one item after the other."""
    catalogue = Catalogue.from_codes(SMALL)
    draws, width = 30_000, 3
    groups, probability = draw_sets(catalogue, draws=draws, width=width, exclusion=[4])
    items = allowed_paths(catalogue, [4])
    p = {items[path]: value for path, value in probability.items()}
    assert sum(p.values()) == pytest.approx(1)
    expected: dict[frozenset[int], float] = {}
    for order in itertools.permutations(p, width):
        left, product = 1.0, 1.0
        for item in order:
            product, left = product * p[item] / left, left - p[item]
        expected[frozenset(order)] = expected.get(frozenset(order), 0.0) + product
    found = Counter(frozenset(row) for row in groups.item_PG.tolist())
    assert set(found) <= set(expected)
    counts = np.array([[found[key], value * draws] for key, value in expected.items()])
    often = counts[:, 1] >= 5
    observed, wanted = (np.append(column[often], column[~often].sum()) for column in counts.T)
    assert stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3
    # The first of a group is an ordinary draw.
    first = np.bincount(groups.item_PG[:, 0], minlength=catalogue.n_items)
    ordinary = np.array([p.get(item, 0.0) * draws for item in range(catalogue.n_items)])
    assert stats.chisquare(first[ordinary > 0], ordinary[ordinary > 0]).pvalue > 1e-3


def test_weighted_estimates_without_replacement_are_unbiased() -> None:
    catalogue = Catalogue.from_codes(SMALL)
    draws = 100_000
    value_I = np.array([3.0, -1.0, 0.5, 10.0, 2.0, -4.0, 7.0])
    items = allowed_paths(catalogue)
    for width in (1, 2, 4):
        groups, probability = draw_sets(catalogue, draws=draws, width=width)
        exact = sum(p * value_I[items[path]] for path, p in probability.items())
        estimate_P = (groups.importance_weight_PG * value_I[groups.item_PG]).sum(1)
        error = estimate_P.std() / np.sqrt(draws)
        assert abs(estimate_P.mean() - exact) < 4 * error
        # Weights that forget the threshold are off by far more than that.
        naive_P = value_I[groups.item_PG].mean(1)
        assert width == 1 or abs(naive_P.mean() - exact) > 10 * error


def test_everything_drawn_has_its_probability_as_weight() -> None:
    catalogue = Catalogue.from_codes(SMALL)
    groups, probability = draw_sets(catalogue, draws=5, width=9)
    assert groups.valid_PG.sum(1).tolist() == [7] * 5
    assert groups.threshold_P is not None
    assert (groups.threshold_P == -np.inf).all()
    items = allowed_paths(catalogue)
    p_I = np.array([probability[path] for path in sorted(items, key=items.__getitem__)])
    for weight_G, item_G, valid_G in zip(groups.importance_weight_PG, groups.item_PG, groups.valid_PG, strict=True):
        np.testing.assert_allclose(weight_G[valid_G], p_I[item_G[valid_G]], rtol=1e-5)
        assert (weight_G[~valid_G] == 0).all()
    half = groups.take(np.array([1, 3]))
    assert Groups.concat([half, half]).importance_weight_PG.shape == (4, 9)


def test_unconstrained_beams_search_the_whole_vocabulary() -> None:
    catalogue = tiny_catalogue(items=20, levels=(3, 3, 3))
    size = catalogue.vocabulary.size
    table = TableBackend(size, 2.0)
    done = decode(
        table,
        Unconstrained(catalogue.trie(), vocabulary_size=size, max_tokens=3),
        prompts=[np.array([3, 1], np.int32)],
        prompt_id_P=np.zeros(1, np.int64),
        items=[np.empty(0, np.int32)],
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
