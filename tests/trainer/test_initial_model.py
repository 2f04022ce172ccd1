"""Contract: a preset's file depends on its seed alone; with codebooks its code embeddings start at their geometry; a
continued run starts from the model it began with, whatever became of the folder that `init` names.

Not checked here: that training from codebooks is better (docs/results), and that vLLM loads the folder
(tests/launch/test_whole_job.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data.errors import RequestError
from tests.small_world import recipe
from tests.tiny_model import tiny_catalogue
from trainer.initial_model import SHAPES, own_initial_model, write_preset
from trainer.jobs import PRESETS, RlJob, SftJob


def embedding(folder: Path) -> torch.Tensor:
    weight: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach()
    return weight


def test_code_embeddings_start_at_the_codebooks(tmp_path: Path) -> None:
    catalogue = tiny_catalogue()
    vocabulary = catalogue.vocabulary
    random = np.random.default_rng(0)
    books = [random.standard_normal((size, 40)).astype(np.float32) * 7 for size in vocabulary.level_sizes]
    books[0][1] = books[0][0]
    for name, codebooks in (("random", None), ("codes", books), ("again", books)):
        write_preset("mini", catalogue, seed=1, dtype=torch.float32, target=tmp_path / name, codebooks=codebooks)
    noise, first, again = (embedding(tmp_path / name) for name in ("random", "codes", "again"))
    assert torch.equal(first, again)
    special = vocabulary.code_token(0, 0)
    assert torch.equal(first[:special], noise[:special])
    assert torch.equal(first[special], first[special + 1])
    for level, size in enumerate(vocabulary.level_sizes):
        start = vocabulary.code_token(level, 0)
        rows = first[start : start + size]
        assert rows.std() == pytest.approx(SHAPES["mini"]["initializer_range"], rel=1e-4)
        distance = torch.pdist(torch.from_numpy(books[level]))
        assert np.corrcoef(distance.numpy(), torch.pdist(rows).numpy())[0, 1] > 0.5


def test_a_continued_run_keeps_its_initial_model(tmp_path: Path) -> None:
    catalogue = tiny_catalogue()

    def begin(resumed: bool) -> torch.Tensor:
        folder = own_initial_model(
            str(tmp_path / "sft"),
            catalogue,
            seed=9,
            dtype=torch.float32,
            target=tmp_path / "run" / "initial",
            resumed=resumed,
        )
        assert folder == tmp_path / "run" / "initial"
        return embedding(folder)

    def change(seed: int) -> None:
        write_preset("mini", catalogue, seed=seed, dtype=torch.float32, target=tmp_path / "sft")

    change(1)
    first = begin(resumed=False)
    change(2)
    assert torch.equal(begin(resumed=True), first)
    assert not torch.equal(begin(resumed=False), first)


def test_presets_are_named_once() -> None:
    assert set(PRESETS) == set(SHAPES)


def test_codebooks_need_a_preset(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="init_embeddings"):
        SftJob.model_validate(recipe(tmp_path, "sft", init=str(tmp_path), init_embeddings="codes"))


def test_latest_rows_belong_to_rl(tmp_path: Path) -> None:
    content = recipe(tmp_path, "rl", data={"latest_rows": 5})
    assert RlJob.model_validate(content).data.latest_rows == 5
    with pytest.raises(ValueError, match="latest_rows"):
        SftJob.model_validate(recipe(tmp_path, "sft", data={"latest_rows": 5}))
