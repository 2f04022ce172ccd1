"""Contract: on a real engine, AUC and its windows are those of a plain loop over the candidates' log-probabilities; the
windows of beams are the catalogue's; the legal mass is that of the model's own logits; rows that cannot be scored are
counted; an evaluation holds these values and those of a feedback log only where they are asked for.

Not checked here: the candidates (test_row_scores.py), the measures of exposure (tests/reward/test_exposure.py), fleets
and files of a run (tests/launch/test_correlate.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from data.catalogue import Catalogue
from data.dataset import Samples
from data.feedback import FeedbackLog, PropensityKind, single_item_log
from data.prompts import PromptBuilder
from data.records import Decode, DecodeSpec
from reward.exposure import Exposures
from rollout.engine import build_engine
from rollout.reference_engine import ReferenceEngine
from rollout.settings import EngineKind, RolloutSettings
from tests.data.tiny import samples as make_samples
from tests.tiny_model import tiny_catalogue, write_tiny_model
from trainer.evaluation import Evaluation, Evaluator
from trainer.run_settings import NegativeSource, ScoreSettings
from trainer.scored_evaluation import ScoredEvaluation, ScoredRows, legal_mass

ITEMS, ROWS = 14, 12
EVERYTHING = ITEMS // 2


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors on shared cores: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return tiny_catalogue(items=ITEMS, levels=(3, 3, 3))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> ReferenceEngine:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), catalogue, hidden=32, layers=1)
    built = build_engine(RolloutSettings(engine=EngineKind.REFERENCE, dtype="float32"), folder)
    assert isinstance(built, ReferenceEngine)
    return built


@pytest.fixture(scope="module")
def rows() -> Samples:
    """Histories of five items; the first row's target was seen."""
    rng = np.random.default_rng(1)
    histories = [rng.choice(ITEMS, 5, replace=False).tolist() for _ in range(ROWS)]
    targets = [int(rng.choice(np.setdiff1d(np.arange(ITEMS), history))) for history in histories]
    targets[0] = histories[0][0]
    return make_samples(histories, targets)


def scored(engine: ReferenceEngine, catalogue: Catalogue, rows: Samples, source: NegativeSource, n: int) -> ScoredRows:
    return ScoredEvaluation(
        catalogue=catalogue,
        builder=PromptBuilder(catalogue, history=4, exclude_seen=True, max_prompt_tokens=32),
        samples=rows,
        rows=np.arange(ROWS),
        settings=ScoreSettings(rows=ROWS, negatives=n, source=source),
        ks=(1, 2, 5, 50),
        batch=5,
        seed=0,
    ).run(engine)


def likelihoods(engine: ReferenceEngine, catalogue: Catalogue, rows: Samples) -> np.ndarray:
    """[N, I] log-probability of every item, from the model's logits."""
    builder = PromptBuilder(catalogue, history=4, exclude_seen=True, max_prompt_tokens=32)
    found = np.zeros((ROWS, ITEMS))
    for row, prompt in enumerate(builder.build(rows).prompts):
        for item in range(ITEMS):
            path = catalogue.tokens(item)
            token_1T = torch.from_numpy(np.concatenate([prompt.token_ids, path]).astype(np.int64))[None]
            with torch.no_grad():
                logp_TV = engine.model(input_ids=token_1T).logits[0].double().log_softmax(-1)
            found[row, item] = sum(
                float(logp_TV[len(prompt.token_ids) - 1 + t, token]) for t, token in enumerate(path.tolist())
            )
    return found


def test_windows_of_beams_are_those_of_the_plain_loop(
    engine: ReferenceEngine, catalogue: Catalogue, rows: Samples
) -> None:
    found = scored(engine, catalogue, rows, NegativeSource.BEAM, EVERYTHING)
    logp_NI = likelihoods(engine, catalogue, rows)
    # The reachable row whose target was seen is the only one without scores.
    assert found.scores.unreachable == 1
    assert found.scores.sample_id_N.tolist() == list(range(1, ROWS))
    builder = PromptBuilder(catalogue, history=4, exclude_seen=True, max_prompt_tokens=32)
    groups = engine.generate(builder.build(rows).prompts, DecodeSpec(decode=Decode.BEAM, width=EVERYTHING + 1))
    for place, row in enumerate(range(1, ROWS)):
        target = int(rows.target_N[row])
        beams = [item for item in groups.item_PG[row].tolist() if item != target][:EVERYTHING]
        ordered = sorted((logp_NI[row, item] for item in beams), reverse=True)
        wins = [logp_NI[row, target] > score for score in ordered]
        expected = {"auc": np.mean(wins)}
        for k in (1, 2, 5):
            expected[f"opauc@{k}"] = np.mean(wins[:k])
            expected[f"wpauc@{k}"] = float(wins[k - 1])
        assert {name: found.metrics[name].value_N[place] for name in found.metrics} == pytest.approx(expected)
    assert found.values["wpauc@5"] == pytest.approx(found.metrics["wpauc@5"].value_N.mean())


def test_auc_of_random_negatives_is_that_of_the_plain_loop(
    engine: ReferenceEngine, catalogue: Catalogue, rows: Samples
) -> None:
    found = scored(engine, catalogue, rows, NegativeSource.RANDOM, 100)
    assert found.scores.score_NM.shape == (ROWS - 1, 1 + EVERYTHING)
    logp_NI = likelihoods(engine, catalogue, rows)
    for place, row in enumerate(range(1, ROWS)):
        scores = found.scores.score_NM[place]
        assert scores[0] == pytest.approx(logp_NI[row, rows.target_N[row]], abs=1e-4)
        seen = rows.history(row, 99)
        permitted = [logp_NI[row, item] for item in range(ITEMS) if item not in {*seen, int(rows.target_N[row])}]
        for score in scores[1:]:
            assert np.abs(np.array(permitted) - score).min() < 1e-4
        assert found.metrics["auc"].value_N[place] == pytest.approx(np.mean(scores[0] > scores[1:]))
    assert "opauc@50" not in found.values


def test_legal_mass_is_that_of_the_logits(engine: ReferenceEngine, catalogue: Catalogue, rows: Samples) -> None:
    builder = PromptBuilder(catalogue, history=4, exclude_seen=False, max_prompt_tokens=32)
    prompts = builder.build(rows).prompts
    groups = engine.generate(prompts, DecodeSpec(decode=Decode.BEAM, width=1))
    paths = [catalogue.tokens(item).tolist() for item in range(ITEMS)]
    mass_P = legal_mass(engine, prompts, groups)
    for row, prompt in enumerate(prompts):
        tokens = groups.token_PGT[row, 0, : groups.length_PG[row, 0]].tolist()
        with torch.no_grad():
            token_1T = torch.tensor([[*prompt.token_ids.tolist(), *tokens]])
            probability_TV = engine.model(input_ids=token_1T).logits[0].double().softmax(-1)
        steps = []
        for t in range(len(tokens)):
            legal = {path[t] for path in paths if path[:t] == tokens[:t]}
            steps.append(float(probability_TV[len(prompt.token_ids) - 1 + t, sorted(legal)].sum()))
        assert mass_P[row] == pytest.approx(np.mean(steps), abs=1e-5)
    assert mass_P.max() < 1


@dataclass
class OneSplit:
    """A dataset of the given test rows."""

    rows: Samples

    def samples(self, split: str) -> Samples:
        assert split == "test"
        return self.rows

    def train_counts(self) -> np.ndarray:
        return np.arange(ITEMS)


def evaluate(engine: ReferenceEngine, catalogue: Catalogue, rows: Samples, **more: Any) -> Evaluation:
    builder = PromptBuilder(catalogue, history=4, exclude_seen=True, max_prompt_tokens=32)
    common: dict[str, Any] = {"split": "test", "rows": ROWS, "ks": (1, 5), "batch": 8, "seed": 0}
    return Evaluator(OneSplit(rows), catalogue, builder, **common, **more).run(engine)  # type: ignore[arg-type]


def first_items(engine: ReferenceEngine, catalogue: Catalogue, rows: Samples) -> list[int]:
    """What each user is recommended first."""
    builder = PromptBuilder(catalogue, history=4, exclude_seen=True, max_prompt_tokens=32)
    groups = engine.generate(builder.build(rows).prompts, DecodeSpec(decode=Decode.BEAM, width=5))
    found: list[int] = groups.item_PG[:, 0].tolist()
    return found


def shown(items: list[int]) -> FeedbackLog:
    n = len(items)
    return single_item_log(
        request_id=[str(i) for i in range(n)],
        user_id_N=np.arange(n, dtype=np.int32),
        timestamp_N=np.zeros(n, np.int64),
        history=[np.zeros(0, np.int32)] * n,
        exposed_N=np.array(items, np.int32),
        response_N=np.zeros(n, np.float32),
        logp0_N=np.full(n, -1, np.float32),
        propensity_kind=PropensityKind.SAMPLE,
        policy_version="v",
        decode=["sample"] * n,
        temperature=1.0,
        catalogue_digest="d",
    )


def test_an_evaluation_holds_what_was_asked_for(engine: ReferenceEngine, catalogue: Catalogue, rows: Samples) -> None:
    plain = evaluate(engine, catalogue, rows)
    assert plain.further == {}
    whole = evaluate(
        engine,
        catalogue,
        rows,
        scores=ScoreSettings(rows=5, negatives=4, source=NegativeSource.RANDOM),
        exposures=Exposures.of(shown(first_items(engine, catalogue, rows))),
    )
    assert whole.items.values == plain.items.values
    assert whole.further["repeat_exposure"] == 1.0
    assert {"auc", "opauc@1", "wpauc@1", "legal_mass", "exposure_gap@1", "exposure_divergence@5"} <= set(whole.further)
    assert "opauc@5" not in whole.further
    assert whole.metrics()["auc"] == whole.further["auc"]
    assert whole.scored is not None
    assert len(whole.scored.mass_N) == 5
