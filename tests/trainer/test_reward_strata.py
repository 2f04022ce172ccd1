"""Contract: on beams of a real engine, ranks, discriminability and hits are those of a plain loop over the beams and
the ranker's scores; strata tell the metric before and after over the known prompts alone; prompts without a target
that may be recommended are not known.

Not checked here: the gate's rules (test_gate.py), the strata's means (tests/reward/test_stratified.py), the command
(tests/launch/test_whole_job.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from data.catalogue import Catalogue
from data.prompts import PromptBuilder
from data.records import Decode, DecodeSpec, FloatArray, Groups, IntArray, Prompt
from rollout.engine import Engine, build_engine
from rollout.settings import EngineKind, RolloutSettings
from tests.data.tiny import samples
from tests.tiny_model import tiny_catalogue, write_tiny_model
from trainer.gate import Gate, GateKind
from trainer.gate_scores import cross_negatives
from trainer.reward_strata import RankerView, beam_ndcg, hits, ranker_view, strata

ITEMS, ROWS, WIDTH = 30, 24, 8
GATE = Gate(kind=GateKind.ADAGRPO, tau=0.5, rho=0.8, negatives=2)


class TableRanker:
    """Scores that depend on the item and the last item of the history, with ties."""

    def score(self, histories: Sequence[IntArray], candidates: Sequence[IntArray]) -> list[FloatArray]:
        return [
            ((7 * items + 3 * int(history[-1])) % 11).astype(np.float32)
            for history, items in zip(histories, candidates, strict=True)
        ]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors on shared cores: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return tiny_catalogue(items=ITEMS, levels=(4, 4, 3)).retire([ITEMS - 1])


@pytest.fixture(scope="module")
def prompts(catalogue: Catalogue) -> list[Prompt]:
    """The first target was seen, the second is retired."""
    rng = np.random.default_rng(2)
    histories = [rng.choice(ITEMS - 1, 5, replace=False).tolist() for _ in range(ROWS)]
    targets = [int(rng.choice(np.setdiff1d(np.arange(ITEMS - 1), history))) for history in histories]
    targets[:2] = [histories[0][0], ITEMS - 1]
    builder = PromptBuilder(catalogue, history=4, exclude_seen=True, max_prompt_tokens=32)
    return builder.build(samples(histories, targets)).prompts


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue, prompts: list[Prompt]) -> Groups:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), catalogue, hidden=32, layers=1, spread=2.0)
    engine: Engine = build_engine(RolloutSettings(engine=EngineKind.REFERENCE, dtype="float32"), folder)
    return engine.generate(prompts, DecodeSpec(decode=Decode.BEAM, width=WIDTH))


def test_the_view_is_that_of_the_plain_loop(catalogue: Catalogue, prompts: list[Prompt], groups: Groups) -> None:
    view = ranker_view(TableRanker(), prompts, groups, catalogue, GATE, seed=0)
    assert view.known_N.tolist() == [False, False] + [True] * (ROWS - 2)
    cross_PM = cross_negatives(prompts, groups, GATE.negatives, seed=0)
    for row in range(2, ROWS):
        prompt, listed = prompts[row], groups.item_PG[row].tolist()
        assert view.policy_rank_N[row] == (1 + listed.index(prompt.target) if prompt.target in listed else WIDTH + 1)
        others = [item for item in listed if item != prompt.target]
        asked = np.array([prompt.target, *others, *cross_PM[row]], np.int32)
        truth, *rest = TableRanker().score([prompt.history], [asked])[0].tolist()
        rivals, cross = rest[: len(others)], rest[len(others) :]
        assert view.ranker_rank_N[row] == 1 + sum(score >= truth for score in rivals)
        ranked = [1 + sum(other > score for other in (truth, *rivals, *cross)) for score in cross]
        tail = min(ranked) > 0.2 * (1 + len(rivals) + len(cross))
        assert view.discriminable_N[row] == (view.ranker_rank_N[row] <= 0.5 * WIDTH and tail)
    assert 0 < view.discriminable_N.sum() < ROWS
    assert len(np.unique(view.policy_rank_N[2:])) > 1
    assert not view.only(np.zeros(ROWS, np.bool_)).known_N.any()


def test_ndcg_of_beams(catalogue: Catalogue, prompts: list[Prompt], groups: Groups) -> None:
    path_id_I = catalogue.active_path_id
    wanted = path_id_I[np.array([prompt.target for prompt in prompts])]
    found = beam_ndcg(hits(groups, wanted, path_id_I), 3)
    for row, prompt in enumerate(prompts):
        listed = groups.item_PG[row, :3].tolist()
        expected = 1 / np.log2(listed.index(prompt.target) + 2) if prompt.target in listed and row != 1 else 0.0
        assert found[row] == pytest.approx(expected)
    assert found.max() > 0


def test_strata_are_of_the_known_prompts() -> None:
    view = RankerView(
        policy_rank_N=np.array([1, 1, 9, 9, 9]),
        ranker_rank_N=np.array([2, 1, 3, 3, 1]),
        discriminable_N=np.array([True, False, True, True, True]),
        known_N=np.array([True, True, True, True, False]),
    )
    before, after = np.array([1.0, 1.0, 0.0, 0.0, 0.0]), np.array([0.5, 1.0, 0.5, 0.3, 1.0])
    answer = strata(view, np.array([1, 1, 1, 2, 5]), before, after, np.arange(5, dtype=np.int32), bins=2, seed=0)
    by = {(s["difficulty"], s["discriminable"]): s for s in answer}
    assert [by[key]["prompts"] for key in ((0, False), (0, True), (1, False), (1, True))] == [1, 1, 0, 2]
    assert by[1, True]["correction"] == 6.0
    assert by[1, True]["oracle_correction"] == 7.5
    assert by[1, True]["gain"] == pytest.approx(0.4)
    low, high = by[1, True]["gain_ci95"]
    assert 0.3 <= low <= high <= 0.5
    assert by[1, False]["gain_ci95"] is None
    assert by[1, False]["gain"] is None
    assert by[0, True]["gain"] == -0.5
