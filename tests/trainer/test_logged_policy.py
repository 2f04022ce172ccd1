"""Log-probabilities of logged items: those of everything that is legal sum to one, they are what an engine logs when it
samples, at every temperature, with exclusions and paths of different lengths, and what is not legal has none.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data.catalogue import Catalogue
from data.records import Decode, DecodeSpec
from rollout.reference_engine import ReferenceEngine
from rollout.settings import RolloutSettings
from tests.tiny_model import random_prompts, write_tiny_model
from trainer import logged_policy
from trainer.logged_policy import logged_scores

ITEMS = 12


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    """Paths of one to three tokens."""
    paths = [[0, 0, n] for n in range(4)] + [[1, n] for n in range(5)] + [[2 + n] for n in range(3)]
    return Catalogue.from_codes(paths)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), catalogue, hidden=32, layers=1)


def test_probabilities_of_all_items_sum_to_one(model: Path, catalogue: Catalogue) -> None:
    for prompt in random_prompts(catalogue, [3, 7], excluded=2):
        scores = logged_scores(
            model, catalogue, [prompt] * ITEMS, np.arange(ITEMS, dtype=np.int32), np.full(ITEMS, 0.7), batch=5
        )
        assert np.isneginf(scores.logp_N[prompt.exclusions]).all()
        assert np.isfinite(np.delete(scores.logp_N, prompt.exclusions)).all()
        assert np.exp(scores.logp_N).sum() == pytest.approx(1, abs=1e-6)


def test_they_are_what_an_engine_logs_and_scores(model: Path, catalogue: Catalogue) -> None:
    engine = ReferenceEngine(RolloutSettings.model_validate({"dtype": "float32"}), model)
    prompts = random_prompts(catalogue, [2, 5, 5, 9, 3, 5], excluded=3)
    temperature = np.array([0.5, 1.0, 0.5, 2.0, 1.0, 1.0])
    item_N, logged_N = np.zeros(6, np.int32), np.zeros(6)
    for row, prompt in enumerate(prompts):
        spec = DecodeSpec(decode=Decode.SAMPLE, width=1, temperature=float(temperature[row]), seed=row)
        groups = engine.generate([prompt], spec)
        item_N[row], logged_N[row] = groups.item_PG[0, 0], groups.sequence_logp_PG[0, 0]
    scores = logged_scores(model, catalogue, prompts, item_N, temperature, batch=2)
    np.testing.assert_allclose(scores.logp_N, logged_N, atol=1e-5)
    served = engine.score([prompt.token_ids for prompt in prompts], [catalogue.tokens(int(item)) for item in item_N])
    for one, other in zip(scores.token_logp, served, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_logits_stay_within_the_limit(model: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large vocabulary takes fewer rows at once, one at least, and the scores stay what they were."""
    prompts = random_prompts(catalogue, [4] * 6, excluded=1)
    arguments = (model, catalogue, prompts, np.zeros(6, np.int32), np.ones(6))
    whole = logged_scores(*arguments, batch=6)
    logits: list[int] = []
    softmax = torch.Tensor.log_softmax

    def counted(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        logits.append(tensor.numel())
        return softmax(tensor, dim)

    for limit in (4 * 4 * catalogue.vocabulary.size, 1):
        monkeypatch.setattr(logged_policy, "LOGITS", limit)
        monkeypatch.setattr(torch.Tensor, "log_softmax", counted)
        parts = logged_scores(*arguments, batch=6)
        monkeypatch.undo()
        np.testing.assert_allclose(parts.logp_N, whole.logp_N, atol=1e-5)
        assert max(logits) <= max(limit, 4 * catalogue.vocabulary.size)
        logits.clear()
