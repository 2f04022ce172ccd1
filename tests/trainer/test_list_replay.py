"""Contract: the learner replays the legal sets of lists from the engine's constraint, so its renormalised
log-probabilities are those the engine returned, with lists of items of unequal path length and with free text.

Not checked: the learner's trees, which do not know what a completion is.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from data.catalogue import Catalogue
from data.constraint import LegalSets, legal_log_softmax
from data.records import Decode, DecodeSpec, ListSpec, Prompt
from data.vocabulary import LIST_WORD, list_words
from rollout.engine import build_engine
from rollout.list_decoding import list_constraint
from rollout.settings import EngineKind, RolloutSettings
from tests.tiny_model import random_prompts, write_tiny_model
from trainer.legal import replay
from trainer.trees import Completions

CODES = [[0], [1, 0], [1, 1], [1, 1, 2], [2, 0, 1], [2, 0, 2], [3, 1]]
SETS = [[0, 3, 4, 6], [1, 2, 3], [6, 5, 4, 2, 0]]


@pytest.mark.parametrize("text", [0, 4])
def test_the_learner_has_the_policy_of_the_engine(tmp_path: Path, text: int) -> None:
    catalogue = Catalogue.from_codes(CODES).with_words(list_words(["interest"]))
    folder = write_tiny_model(tmp_path, catalogue, spread=2.0)
    engine = build_engine(RolloutSettings(engine=EngineKind.REFERENCE, dtype="float32"), folder, engine_id="lists")
    prompts: list[Prompt] = [
        dataclasses.replace(prompt, candidates=np.array(some, np.int32))
        for prompt, some in zip(random_prompts(catalogue, [9, 14, 5]), SETS, strict=True)
    ]
    lists = ListSpec(candidates=5, length=3, text_tokens=text)
    spec = DecodeSpec(decode=Decode.SAMPLE, width=6, temperature=1.2, seed=4, lists=lists)
    groups = engine.generate(prompts, spec)
    completions = Completions.of_groups(prompts, groups)
    constraint = list_constraint(catalogue.trie(), lists, catalogue, catalogue.vocabulary.size)
    table = replay(constraint, completions, range(len(prompts)))
    assert table.legal_PGT[groups.token_mask_PGT].all()
    begin = catalogue.vocabulary.word_token(LIST_WORD)
    for row, prompt in enumerate(prompts):
        for member in range(6):
            length = int(groups.length_PG[row, member])
            tokens = groups.token_PGT[row, member, :length].astype(np.int64)
            assert (begin in tokens) == (text > 0)
            ids = torch.from_numpy(np.concatenate([prompt.token_ids, tokens]))[None]
            with torch.inference_mode():
                logits_TV = engine.model(input_ids=ids).logits[0, len(prompt.token_ids) - 1 : -1]  # type: ignore[attr-defined]
            for token, number in enumerate(table.set_PGT[row, member, :length]):
                some = table.token_values[table.start_S[number] : table.start_S[number + 1]]
                legal = LegalSets(torch.from_numpy(some)[None], torch.ones((1, len(some)), dtype=torch.bool))
                logp_C = legal_log_softmax(logits_TV[token : token + 1], legal, 1.2)[0]
                place = int(np.flatnonzero(some == tokens[token])[0])
                assert float(logp_C[place]) == pytest.approx(float(groups.logp_PGT[row, member, token]), abs=1e-4)
