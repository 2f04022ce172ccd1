"""Contract: a model that follows its catalogue keeps the rows of old tokens bit for bit, and the logits of old tokens
with them; new rows differ from each other; the folder has the new vocabulary, tokenizer and catalogue, loads, and is
the same from the same parent. A catalogue that is no later state is refused.

Not checked here: updates that begin with it (tests/launch/continual/test_command.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.catalogue import Catalogue
from data.codes import Codes
from data.errors import RequestError
from tests.tiny_model import write_tiny_model
from trainer.initial_model import CATALOGUE, check_fits
from trainer.model_growth import grow_model, has_grown
from trainer.prompt_card import PromptCard

PATHS = [[0, 0], [0, 1], [1, 0], [1, 1]]


def catalogue(paths: list[list[int]], sizes: list[int]) -> Catalogue:
    return Catalogue.from_codes(Codes.from_lists(paths, sizes))


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    folder = write_tiny_model(tmp_path / "parent", catalogue(PATHS, [2, 2]))
    PromptCard(history=4, exclude_seen=True, max_prompt_tokens=16).write(folder)
    return folder


def test_old_rows_and_logits_stay(parent: Path, tmp_path: Path) -> None:
    later = catalogue([*PATHS, [0, 2], [1, 3]], [2, 4])
    assert has_grown(parent, later)
    grown = grow_model(parent, later, tmp_path / "grown", seed=1)
    check_fits(grown, later)
    assert PromptCard.read(grown) == PromptCard.read(parent)
    assert AutoTokenizer.from_pretrained(grown).convert_tokens_to_ids("<b_3>") == later.vocabulary.code_token(1, 3)
    old, new = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (parent, grown))
    rows = old.config.vocab_size
    assert (rows, new.config.vocab_size) == (8, 10)
    for part in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(old, part)().weight, getattr(new, part)().weight
        assert torch.equal(after[:rows], before)
        assert not torch.equal(after[rows], after[rows + 1])
    layers = new.model.layers.state_dict()
    assert all(torch.equal(before, layers[name]) for name, before in old.model.layers.state_dict().items())
    tokens = torch.tensor([[1, 4, 6, 5, 7]])
    with torch.no_grad():
        assert torch.allclose(new(tokens).logits[..., :rows], old(tokens).logits, rtol=0, atol=1e-6)
    again = grow_model(parent, later, tmp_path / "again", seed=1)
    assert (again / "model.safetensors").read_bytes() == (grown / "model.safetensors").read_bytes()


def test_retired_items_change_the_catalogue_alone(parent: Path, tmp_path: Path) -> None:
    own = Catalogue.load(parent / CATALOGUE)
    assert not has_grown(parent, own)
    later = own.retire([2])
    grown = grow_model(parent, later, tmp_path / "grown", seed=1)
    check_fits(grown, later)
    old, new = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (parent, grown))
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize(
    "later",
    [
        catalogue([[0, 1], [0, 0], [1, 0], [1, 1]], [2, 2]),
        catalogue([*PATHS, [2, 0]], [3, 2]),
        catalogue(PATHS[:3], [2, 2]),
    ],
)
def test_another_catalogue_is_refused(parent: Path, later: Catalogue) -> None:
    with pytest.raises(RequestError, match="windlass data extend"):
        has_grown(parent, later)
