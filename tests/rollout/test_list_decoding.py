"""Lists from the decoding loop and from the real engines equal slow decoding over all permutations.

The oracle treats every permutation (or first K) of the candidates as one path and searches all of them. Checked:
beams, samples, draws without replacement, unequal path lengths, free text, independence from the batch, one prefill per
prompt, spans and items of the record, the independent counter of violations, and what is refused.

Not checked: what a trained model ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data.catalogue import Catalogue
from data.errors import RequestError
from data.list_constraint import ListConstraint
from data.records import FORMAT_SEGMENT, NO_ITEM, Decode, DecodeSpec, Finish, Groups, IntArray, ListSpec, Prompt
from data.vocabulary import LIST_WORD, list_words
from rollout.decoding import Completions, decode
from rollout.engine import Engine, build_engine
from rollout.list_violations import ListViolation, ListViolationCounter
from rollout.settings import EngineKind, RolloutSettings
from rollout.violations import ViolationCounter
from tests.rollout.oracles import Path, all_items, beam_search
from tests.rollout.test_decoding import TableBackend, paths_of
from tests.tiny_model import random_prompts, tiny_catalogue, write_tiny_model


def lists_as_paths(catalogue: Catalogue, candidates: Sequence[int], length: int = 0) -> dict[Path, tuple[int, ...]]:
    """Tokens of every list of the candidates, with its items."""
    return {
        tuple(token for item in order for token in catalogue.tokens(item).tolist()): order
        for order in itertools.permutations(candidates, length or len(candidates))
    }


def run(
    catalogue: Catalogue, prompts: Sequence[Path], candidates: Sequence[Sequence[int]], spec: DecodeSpec, **backend: Any
) -> Completions:
    assert spec.lists is not None
    size = catalogue.vocabulary.size
    begin = catalogue.vocabulary.word_token(LIST_WORD) if spec.lists.text_tokens else 2
    return decode(
        TableBackend(size, **backend),
        ListConstraint(catalogue.trie(), spec.lists, begin_token=begin, vocabulary_size=size),
        prompts=[np.array(prompt, np.int32) for prompt in prompts],
        prompt_id_P=np.arange(len(prompts)),
        items=[np.array(some, np.int32) for some in candidates],
        spec=spec,
    )


# Unequal lengths, shared beginnings, and an end token where a path continues another.
UNEQUAL = Catalogue.from_codes([[0], [1, 0], [1, 1], [1, 1, 2], [2, 0, 1], [2, 0, 2], [3, 1]])


@settings(max_examples=40, deadline=None)
@given(case=st.data(), width=st.integers(1, 9), temperature=st.sampled_from([0.5, 1.0, 1.7]), fixed=st.booleans())
def test_beams_equal_the_slow_search(case: st.DataObject, width: int, temperature: float, fixed: bool) -> None:
    sets = [case.draw(st.permutations(range(7)))[: case.draw(st.integers(2, 4))] for _ in range(3)]
    length = 2 if fixed else 0
    lists = ListSpec(candidates=5, length=length)
    prompts = [(case.draw(st.integers(1, 10**6)), row) for row in range(3)]
    spec = DecodeSpec(decode=Decode.BEAM, width=width, temperature=temperature, lists=lists)
    done = run(UNEQUAL, prompts, sets, spec)
    table = TableBackend(UNEQUAL.vocabulary.size)
    for row, prompt in enumerate(prompts):
        allowed = lists_as_paths(UNEQUAL, sets[row], length)
        numbers = {path: number for number, path in enumerate(allowed)}
        expected = beam_search(lambda prefix, p=prompt: table.logits((*p, *prefix)), numbers, width, temperature)
        assert paths_of(done, row) == [path for path, _ in expected]
        found = done.logp_PST[row].double().sum(-1)[: len(expected)]
        np.testing.assert_allclose(found, [score for _, score in expected], atol=5e-6)
        assert done.item_PS[row, : len(expected)].tolist() == [allowed[path][0] for path, _ in expected]


@pytest.mark.parametrize("text", [0, 2])
def test_samples_follow_the_exact_distribution(text: int) -> None:
    catalogue = Catalogue.from_codes([[0], [1, 0], [1, 1], [1, 1, 2]]).with_words(list_words(()))
    candidates, draws, width = [0, 2, 3], 400, 8
    lists = ListSpec(candidates=3, length=2, text_tokens=text)
    spec = DecodeSpec(decode=Decode.SAMPLE, width=width, temperature=0.8, seed=5, lists=lists)
    done = run(catalogue, [(2, 2)] * draws, [candidates] * draws, spec, sharpness=2.0)
    table = TableBackend(catalogue.vocabulary.size, 2.0)
    begin, size = catalogue.vocabulary.word_token(LIST_WORD), catalogue.vocabulary.size
    others = [token for token in range(size) if token != begin]
    said = [path for n in range(text + 1) for path in itertools.product(others, repeat=n)]
    texts = [(*path, begin) for path in said] if text else [()]
    whole = {(*words, *path) for words in texts for path in lists_as_paths(catalogue, candidates, 2)}
    exact = all_items(lambda prefix: table.logits((2, 2, *prefix)), dict.fromkeys(whole, 0), 0.8)
    assert sum(np.exp(logp) for _, logp in exact) == pytest.approx(1)
    counts = dict.fromkeys((path for path, _ in exact), 0)
    for row in range(draws):
        for path in paths_of(done, row):
            counts[path] += 1
    wanted = np.array([np.exp(logp) * draws * width for _, logp in exact])
    observed = np.array(list(counts.values()))
    often = wanted >= 5
    observed, wanted = (np.append(column[often], column[~often].sum()) for column in (observed, wanted))
    assert stats.chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3
    by_path = dict(exact)
    for path, logp in zip(paths_of(done, 0), done.logp_PST[0].double().sum(-1).tolist(), strict=True):
        assert logp == pytest.approx(by_path[path], abs=5e-6)


@pytest.mark.parametrize("kind", list(Decode))
def test_no_list_depends_on_its_batch(kind: Decode) -> None:
    """Also where the others have more candidates."""
    spec = DecodeSpec(decode=kind, width=4, seed=11, lists=ListSpec(candidates=6))
    sets = [[0, 3], [1, 2, 3, 4, 5], [6, 0, 2], [5, 4]]
    prompts = [(7, row) for row in range(4)]
    together = run(UNEQUAL, prompts, sets, spec)
    for row in range(4):
        size = UNEQUAL.vocabulary.size
        assert spec.lists is not None
        alone = decode(
            TableBackend(size),
            ListConstraint(UNEQUAL.trie(), spec.lists, begin_token=2, vocabulary_size=size),
            prompts=[np.array(prompts[row], np.int32)],
            prompt_id_P=np.array([row]),
            items=[np.array(sets[row], np.int32)],
            spec=spec,
        )
        for field, one in zip(together, alone, strict=True):
            assert torch.equal(field[row], one[0])


def test_lists_without_replacement_differ() -> None:
    spec = DecodeSpec(decode=Decode.SAMPLE_WITHOUT_REPLACEMENT, width=8, seed=1, lists=ListSpec(candidates=3))
    done = run(UNEQUAL, [(1, 2)], [[1, 3, 6]], spec)
    assert sorted(paths_of(done, 0)) == sorted(lists_as_paths(UNEQUAL, [1, 3, 6]))
    assert done.valid_PS.sum() == 6


def as_lists(prompts: list[Prompt], sets: Sequence[Sequence[int]]) -> list[Prompt]:
    return [
        dataclasses.replace(prompt, candidates=np.array(some, np.int32), need="interest")
        for prompt, some in zip(prompts, sets, strict=True)
    ]


SETS = [[3, 59, 17, 20], [0, 1, 2, 3, 4], [58, 12, 40]]


@pytest.fixture
def asked(catalogue: Catalogue) -> list[Prompt]:
    return as_lists(random_prompts(catalogue, [33, 5, 70], seed=21), SETS)


def sequences(groups: Groups, row: int) -> list[Path]:
    lengths = groups.length_PG[row][groups.valid_PG[row]].tolist()
    return [tuple(tokens[:n]) for tokens, n in zip(groups.token_PGT[row].tolist(), lengths, strict=False)]


def test_engines_search_the_best_lists(
    engine: Engine, catalogue: Catalogue, reference_engine: Any, asked: list[Prompt]
) -> None:
    spec = DecodeSpec(decode=Decode.BEAM, width=8, temperature=1.3, lists=ListSpec(candidates=5, length=3))
    groups = engine.generate(asked, spec)
    model = reference_engine.model
    for row, prompt in enumerate(asked):

        @cache
        def logits(prefix: Path, prompt: Prompt = prompt) -> np.ndarray:
            ids = torch.tensor([*prompt.token_ids.tolist(), *prefix])[None]
            with torch.inference_mode():
                found: np.ndarray = model(input_ids=ids).logits[0, -1].double().numpy()
            return found

        allowed = lists_as_paths(catalogue, SETS[row], 3)
        expected = beam_search(logits, dict.fromkeys(allowed, 0), 8, 1.3)
        assert sequences(groups, row) == [path for path, _ in expected]
        count = len(expected)
        np.testing.assert_allclose(groups.sequence_logp_PG[row, :count], [score for _, score in expected], atol=2e-4)
        assert groups.item_PGK is not None
        assert [tuple(items) for items in groups.item_PGK[row, :count].tolist()] == [
            allowed[path] for path, _ in expected
        ]
    assert set(groups.finish_PG[groups.valid_PG].tolist()) == {Finish.LIST.value}
    assert (groups.finish_PG[~groups.valid_PG] == Finish.ABSENT.value).all()
    assert groups.constraint == "list-3-of-5"
    assert set(ViolationCounter(catalogue).count(asked, groups).values()) == {0}


def test_engines_sample_permutations(engine: Engine, catalogue: Catalogue, asked: list[Prompt]) -> None:
    spec = DecodeSpec(decode=Decode.SAMPLE, width=6, seed=3, lists=ListSpec(candidates=5))
    groups = engine.generate(asked, spec)
    assert groups.item_PGK is not None
    assert groups.segment_PGT is not None
    assert groups.item_PGK.shape == (3, 6, 5)
    for row, some in enumerate(SETS):
        for member in range(6):
            ranked = groups.item_PGK[row, member].tolist()
            assert sorted(ranked) == sorted(some + [NO_ITEM] * (5 - len(some)))
            spans = groups.segment_PGT[row, member][: 3 * len(some)].tolist()
            assert spans == [rank for rank in range(len(some)) for _ in range(3)]
    assert (groups.item_PG == groups.item_PGK[..., 0]).all()
    assert set(ViolationCounter(catalogue).count(asked, groups).values()) == {0}
    # The last item is the only one left.
    assert (groups.logp_PGT[0, :, 9:12] == 0).all()
    alone = [engine.generate([prompt], spec) for prompt in reversed(asked)]
    joined = Groups.concat(alone[::-1])
    for name in ("token_PGT", "logp_PGT", "segment_PGT", "item_PGK", "length_PG"):
        assert np.array_equal(getattr(joined, name), getattr(groups, name)), name
    assert np.array_equal(groups.take(np.array([1])).item_PGK, groups.item_PGK[1:2])


@pytest.fixture(scope="module")
def text_engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The reference engine on a model that knows the words of lists."""
    catalogue = tiny_catalogue().with_words(list_words(["interest"]))
    folder: File = write_tiny_model(tmp_path_factory.mktemp("text"), catalogue, spread=2.0)
    return build_engine(RolloutSettings(engine=EngineKind.REFERENCE, dtype="float32"), folder, engine_id="text")


@pytest.mark.parametrize("kind", [Decode.SAMPLE, Decode.BEAM])
def test_free_text_ends_with_a_list(text_engine: Any, catalogue: Catalogue, asked: list[Prompt], kind: Decode) -> None:
    wide = catalogue.with_words(list_words(["interest"]))
    begin = wide.vocabulary.word_token(LIST_WORD)
    spec = DecodeSpec(decode=kind, width=8, seed=3, lists=ListSpec(candidates=5, length=2, text_tokens=12))
    groups = text_engine.generate(asked, spec)
    assert groups.segment_PGT is not None
    assert groups.constraint == "list-2-of-5-text-12"
    for row, member in np.argwhere(groups.valid_PG):
        tokens = sequences(groups, row)[member]
        text = tokens.index(begin) + 1
        assert text <= 13
        assert groups.segment_PGT[row, member, :text].tolist() == [FORMAT_SEGMENT] * text
        cut = groups.finish_PG[row, member] == Finish.LIST_TEXT_CUT.value
        assert cut == (text == 13)
        if cut:
            assert groups.logp_PGT[row, member, 12] == 0
    assert set(ViolationCounter(wide).count(asked, groups).values()) == {0}
    if kind is Decode.SAMPLE:
        assert set(groups.finish_PG.ravel().tolist()) == {Finish.LIST.value, Finish.LIST_TEXT_CUT.value}


def test_a_prompt_is_computed_once(reference_engine: Any, asked: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    backend, prefill = reference_engine._backend, reference_engine._backend.prefill

    def counted(prompts: Sequence[IntArray], *rest: Any) -> torch.Tensor:
        lengths.extend(len(prompt) for prompt in prompts)
        return prefill(prompts, *rest)

    monkeypatch.setattr(backend, "prefill", counted)
    spec = DecodeSpec(decode=Decode.SAMPLE, width=16, seed=3, lists=ListSpec(candidates=5))
    reference_engine.generate(asked, spec)
    assert lengths == [33, 5, 70]


def test_each_violation_is_counted(text_engine: Any, catalogue: Catalogue, asked: list[Prompt]) -> None:
    spec = DecodeSpec(decode=Decode.BEAM, width=4, lists=ListSpec(candidates=5, length=2, text_tokens=3))
    groups = text_engine.generate(asked, spec)
    wide = catalogue.with_words(list_words(["interest"]))
    counter = ListViolationCounter(wide)

    def found(prompts: list[Prompt] = asked, spec: DecodeSpec = spec, **arrays: Any) -> set[ListViolation]:
        damaged = dataclasses.replace(groups, spec=spec, **arrays)
        return {reason for reason, count in counter.count(prompts, damaged).items() if count}

    def changed(name: str, at: tuple[int, ...], value: float) -> dict[str, Any]:
        array = getattr(groups, name).copy()
        array[at] = value
        return {name: array}

    assert found() == set()
    begin = wide.vocabulary.word_token(LIST_WORD)
    where = sequences(groups, 0)[0].index(begin)
    assert found(**changed("token_PGT", (0, 0, where), 5)) == {ListViolation.TEXT}
    assert found(**changed("token_PGT", (0, 0, where + 1), 0)) == {ListViolation.UNKNOWN_PATH}
    fewer = [dataclasses.replace(asked[0], candidates=np.array([1, 2], np.int32)), *asked[1:]]
    assert found(fewer) == {ListViolation.NOT_A_CANDIDATE, ListViolation.WRONG_ITEMS}
    longer = dataclasses.replace(spec, lists=ListSpec(candidates=5, length=3, text_tokens=3))
    assert found(spec=longer) == {ListViolation.LENGTH}
    shorter = dataclasses.replace(spec, lists=ListSpec(candidates=5, length=2, text_tokens=1))
    assert ListViolation.TEXT in found(spec=shorter) or where <= 1
    assert found(**changed("item_PGK", (0, 0, 1), 7)) == {ListViolation.WRONG_ITEMS}
    assert found(**changed("segment_PGT", (0, 0, where + 1), 1)) == {ListViolation.WRONG_SPANS}
    assert found(**changed("logp_PGT", (1, 0, 1), np.nan)) == {ListViolation.LOG_PROBABILITY}
    assert found(**changed("valid_PG", (1, 0), 0)) == {ListViolation.ORDER}
    assert found(**changed("prompt_id_P", (1,), 77)) == {ListViolation.ORDER}
    twice = {
        name: np.concatenate([array[:, :1], array[:, :1], array[:, 2:]], 1)
        for name in ("token_PGT", "item_PGK", "segment_PGT", "logp_PGT", "length_PG")
        for array in [getattr(groups, name)]
    }
    assert found(**twice) == {ListViolation.DUPLICATE}
    # The same item in both places.
    tokens = groups.token_PGT.copy()
    tokens[0, 0, where + 4 : where + 7] = tokens[0, 0, where + 1 : where + 4]
    ranked = changed("item_PGK", (0, 0, 1), groups.item_PGK[0, 0, 0])
    assert found(token_PGT=tokens, **ranked) == {ListViolation.REPEATED}
    with pytest.raises(ValueError, match="are no lists"):
        counter.count(asked, dataclasses.replace(groups, item_PGK=None))


def test_wrong_requests_are_named(reference_engine: Any, catalogue: Catalogue, asked: list[Prompt]) -> None:
    lists = ListSpec(candidates=5, length=3)
    spec = DecodeSpec(decode=Decode.SAMPLE, width=2, lists=lists)

    def refused(match: str, prompts: list[Prompt] = asked, spec: DecodeSpec = spec) -> None:
        with pytest.raises(RequestError, match=match):
            reference_engine.generate(prompts, spec)

    plain = dataclasses.replace(spec, lists=None)
    refused("prompt 0: candidates, but no list is asked for", spec=plain)
    refused("prompt 0: candidates: none; legal: the items that its list ranks", random_prompts(catalogue, [5]))
    for items, message in (([], "0 items"), ([1, 2], "2 items; legal: 3 or more"), ([1, 2, 1], "item 1 twice")):
        refused(f"prompt 0: candidates: {message}", as_lists(asked[:1], [items]))
    refused("prompt 1: candidates: unknown item 60", as_lists(asked[:2], [SETS[0], [1, 2, 60]]))
    refused("prompt 0: candidates: 6 items", as_lists(asked[:1], [[1, 2, 3, 4, 5, 6]]))
    refused("prompt 0: scored_items", [dataclasses.replace(asked[0], scored_items=(1,))])
    refused("without the constraint", spec=dataclasses.replace(spec, constrained=False))
    refused("3 of 2 candidates", spec=dataclasses.replace(spec, lists=ListSpec(candidates=2, length=3)))
    text = dataclasses.replace(spec, lists=dataclasses.replace(lists, text_tokens=4))
    refused("word: <list>", spec=text)
    refused(
        "with free text; legal: beam, sample", spec=dataclasses.replace(text, decode=Decode.SAMPLE_WITHOUT_REPLACEMENT)
    )
    long = dataclasses.replace(asked[0], token_ids=np.full(504, 5, np.int32))
    refused("prompt 0: 504 tokens; legal: 1 to 503", [long])
