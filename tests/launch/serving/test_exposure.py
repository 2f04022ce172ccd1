"""Contract: the log-propensities of a shown list are those of the process that shows it: over all lists they sum to
one, slot by slot and for the whole list; with a real engine they equal the exact policy (by exhaustive beams) put
through a plain loop; what is shown does not depend on the batch.

Single items against the exact policy, and against frequencies: tests/launch/test_simulation.py.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.catalogue import Catalogue
from data.prompts import PromptBuilder
from data.records import NO_ITEM, Decode, DecodeSpec
from launch.serving.exposure import ExposureSettings, Serving, Shown, mixture_logp, ordered_logp, show
from rollout.engine import Engine, build_engine
from rollout.settings import EngineKind, RolloutSettings
from tests.tiny_model import tiny_catalogue, write_tiny_model

ITEMS = 12


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=5), st.floats(0.01, 1), st.data())
def test_mixture_propensities_are_a_distribution(weights: list[float], epsilon: float, data: st.DataObject) -> None:
    policy = np.array(weights) / sum(weights)
    beams = data.draw(st.integers(1, len(weights)))
    items = data.draw(st.integers(1, len(weights)))
    best = np.argsort(-policy, kind="stable")
    lists = np.array(list(itertools.permutations(range(len(weights)), items)), np.int32)
    count = len(lists)
    logp0 = mixture_logp(
        lists, np.log(policy)[lists], np.tile(best, (count, 1)).astype(np.int32), np.full(count, beams), epsilon
    )
    assert (logp0 <= 0).all()
    assert np.exp(logp0.sum(1)).sum() == pytest.approx(1)
    # Given the first slots, the next one is a distribution too.
    for slot in range(items):
        prefixes = {tuple(row[: slot + 1].tolist()): np.exp(lp[slot]) for row, lp in zip(lists, logp0, strict=True)}
        totals: dict[tuple[int, ...], float] = {}
        for prefix, p in prefixes.items():
            totals[prefix[:-1]] = totals.get(prefix[:-1], 0.0) + p
        np.testing.assert_allclose(list(totals.values()), 1, atol=1e-9)


def test_one_item_of_a_mixture_as_the_formula_says() -> None:
    policy = np.array([0.5, 0.3, 0.2])
    found = mixture_logp(
        np.arange(3, dtype=np.int32)[:, None],
        np.log(policy)[:, None],
        np.tile(np.arange(3, dtype=np.int32), (3, 1)),
        np.full(3, 2),
        0.4,
    )
    np.testing.assert_allclose(np.exp(found[:, 0]), 0.6 * np.array([0.5, 0.5, 0]) + 0.4 * policy)


def test_the_last_item_left_is_certain() -> None:
    logp = ordered_logp(np.log(np.array([[0.6, 0.3, 0.1]])))
    np.testing.assert_allclose(np.exp(logp), [[0.6, 0.75, 1.0]])


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return tiny_catalogue(items=ITEMS, levels=(3, 3, 3))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> Engine:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), catalogue, hidden=32, layers=1)
    return build_engine(RolloutSettings(engine=EngineKind.REFERENCE, dtype="float32"), folder)


def shown(engine: Engine, catalogue: Catalogue, serving: ExposureSettings, rows: range, items: int) -> Shown:
    builder = PromptBuilder(catalogue, history=4, exclude_seen=True, max_prompt_tokens=32)
    prompts = [builder.prompt(np.array([row % ITEMS, (row + 5) % ITEMS], np.int32), row)[0] for row in rows]
    return show(engine, prompts, serving, seed=5, items=items)


@pytest.mark.parametrize("serve", list(Serving))
def test_lists_have_the_probability_of_the_exact_policy(engine: Engine, catalogue: Catalogue, serve: Serving) -> None:
    serving = ExposureSettings(
        serve=serve,
        temperature=2.0,
        **({} if serve is Serving.SAMPLE else {"beams": 2}),
        **({"epsilon": 0.5} if serve is Serving.MIXTURE else {}),
    )
    rows, items = range(8), 3
    found = shown(engine, catalogue, serving, rows, items)
    builder = PromptBuilder(catalogue, history=4, exclude_seen=True, max_prompt_tokens=32)
    first_beams = set()
    for row in rows:
        prompt = builder.prompt(np.array([row % ITEMS, (row + 5) % ITEMS], np.int32), row)[0]
        groups = engine.generate([prompt], DecodeSpec(decode=Decode.BEAM, width=27, temperature=2.0))
        best = groups.item_PG[0][groups.valid_PG[0]].tolist()
        policy = dict(zip(best, np.exp(groups.sequence_logp_PG[0].astype(float)).tolist(), strict=False))
        listed = found.item_PK[row].tolist()
        assert len(set(listed)) == items
        assert not set(listed) & set(prompt.exclusions.tolist())
        np.testing.assert_allclose(np.exp(found.logp_PK[row]), [policy[item] for item in listed], rtol=1e-4)
        # Beams as narrow as those that are shown; they need not find the best.
        best = engine.generate([prompt], DecodeSpec(decode=Decode.BEAM, width=items, temperature=2.0)).item_PG[0]
        by_beams = [[best[b], *[one for one in best if one != best[b]]] for b in range(2)]
        if serve is Serving.BEAM:
            assert listed in by_beams
            first_beams.add(listed == by_beams[0])
            continue
        epsilon = 0.5 if serve is Serving.MIXTURE else 1.0
        draw, left = 1.0, 1.0
        for item in listed:
            draw *= policy[item] / left
            left -= policy[item]
        expected = (1 - epsilon) * (listed in by_beams) / 2 + epsilon * draw
        assert np.exp(found.logp0_PK[row].sum()) == pytest.approx(expected, rel=1e-3)
    assert serve is not Serving.BEAM or first_beams == {True, False}
    modes = set(found.decode_P.tolist())
    assert (
        modes
        == {
            Serving.SAMPLE: {"sample_without_replacement"},
            Serving.BEAM: {"beam"},
            Serving.MIXTURE: {"beam", "sample_without_replacement"},
        }[serve]
    )


def test_lists_do_not_depend_on_the_batch(engine: Engine, catalogue: Catalogue) -> None:
    serving = ExposureSettings(serve=Serving.MIXTURE, epsilon=0.5, beams=2)
    whole = shown(engine, catalogue, serving, range(6), 3)
    parts = [shown(engine, catalogue, serving, rows, 3) for rows in (range(3), range(3, 6))]
    np.testing.assert_array_equal(whole.item_PK, np.concatenate([part.item_PK for part in parts]))
    np.testing.assert_array_equal(whole.logp0_PK, np.concatenate([part.logp0_PK for part in parts]))


def test_a_list_is_as_long_as_there_are_legal_items(engine: Engine, catalogue: Catalogue) -> None:
    builder = PromptBuilder(catalogue, history=4, exclude_seen=True, max_prompt_tokens=32)
    prompt = builder.prompt(np.arange(ITEMS - 2, dtype=np.int32), 1)[0]
    for serving in (ExposureSettings(), ExposureSettings(serve=Serving.MIXTURE), ExposureSettings(serve=Serving.BEAM)):
        found = show(engine, [prompt], serving, seed=0, items=4)
        assert sorted(found.item_PK[0].tolist()) == [NO_ITEM, NO_ITEM, ITEMS - 2, ITEMS - 1]
        assert (found.item_PK[0][2:] == NO_ITEM).all()
