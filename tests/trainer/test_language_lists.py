"""Contract: a language model ranks candidates in titles or in codes: the engine's lists are permutations of the
prompt's candidates in their own tokens and their log-probabilities those of transformers over the legal tokens, also
behind free text, whose end is a token of its own; supervised rows are the template's prompt and the ideal list; a
saved model is asked as it was trained.

Tiny random models on the reference engine. Not checked here: what prompts say (tests/data/test_ranking_writers.py),
training and vLLM (tests/launch/test_list_job.py, long).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.dataset import Dataset
from data.errors import RequestError
from data.ideal_lists import ideal_list
from data.list_constraint import ListConstraint
from data.records import FORMAT_SEGMENT, Decode, DecodeSpec, Groups, Prompt
from data.vocabulary import LIST_WORD
from rollout.engine import build_engine
from rollout.list_violations import ListViolationCounter
from rollout.settings import RolloutSettings
from tests.small_world import recipe, write_dataset
from tests.tiny_language import write_language
from trainer.initial_model import own_initial_model
from trainer.jobs import SftJob
from trainer.list_checkpoint import ListRows, open_list_model
from trainer.list_jobs import ideal_rows
from trainer.policy_data import PolicyData
from trainer.prompt_card import PromptCard

LISTS: dict[str, Any] = {
    "needs": [{"name": "interest"}, {"name": "niche"}],
    "candidates": 4,
    "positives": 2,
    "length": 3,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # More rows than tokens: those that pad the matrices are nobody's.
    return write_language(tmp_path_factory.mktemp("base"), "llama", rows=384)


def job(dataset: Dataset, base: Path, text: dict[str, Any], **lists: Any) -> SftJob:
    content = recipe(
        dataset.path,
        "sft",
        init=str(base),
        text=text,
        lists=LISTS | lists,
        data={"max_prompt_tokens": 240},
        learner={"row_tokens": 320, "token_budget": 640},
        rollout={"max_model_len": 320},
        evaluation={"k": [1, 3], "metric": "ndcg@3"},
    )
    return SftJob.model_validate(content)


def written(made: SftJob, data: PolicyData, folder: Path) -> Path:
    """The model's folder as a checkpoint of the job has it."""
    assert data.language is not None
    hf_dir = own_initial_model(
        made.init,
        data.catalogue,
        seed=1,
        dtype=torch.float32,
        target=folder,
        resumed=False,
        language=(data.language, made.text),
    )
    PromptCard.of(made.data, made.lists, made.text).write(hf_dir)
    return hf_dir


@pytest.mark.parametrize(
    ("text", "lists"),
    [
        ({"items": "titles", "form": "plain"}, {}),
        ({"items": "codes"}, {}),
        ({"items": "titles"}, {"text_tokens": 5}),
    ],
)
def test_lists_are_permutations_in_the_models_tokens(
    dataset: Dataset, base: Path, tmp_path: Path, text: dict[str, Any], lists: dict[str, Any]
) -> None:
    made = job(dataset, base, text, **lists)
    data = PolicyData.open(made)
    assert data.lists is not None
    assert data.catalogue.vocabulary.further_words == ((LIST_WORD,) if lists else ())
    hf_dir = written(made, data, tmp_path / "initial")
    asked = open_list_model(hf_dir, dataset, ListRows(split="test", rows=3, ks=(1, 3), seed=0))
    prompts = [prompt for batch in asked.asked.values() for prompt in batch.prompts]
    assert {prompt.need for prompt in prompts} == {"interest", "niche"}
    mine = data.lists.evaluation("test", "niche", 3, 0).prompts
    assert [p.token_ids.tolist() for p in prompts if p.need == "niche"] == [p.token_ids.tolist() for p in mine]
    settings = RolloutSettings(engine="reference", dtype="float32", max_model_len=320, width=3, threads=1)
    engine = build_engine(settings, hf_dir)
    spec = DecodeSpec(decode=Decode.SAMPLE, width=3, seed=2, lists=made.lists.spec)
    groups = engine.generate(prompts, spec)
    engine.close()
    assert sum(ListViolationCounter(data.catalogue).count(prompts, groups).values()) == 0
    assert groups.item_PGK is not None
    assert groups.item_PGK.shape == (len(prompts), 3, 3)
    constraint = data.constraint()
    assert isinstance(constraint, ListConstraint)
    assert constraint.vocabulary_size == data.catalogue.vocabulary.tokens < data.catalogue.vocabulary.size
    model = AutoModelForCausalLM.from_pretrained(hf_dir).eval()
    for row in (0, len(prompts) - 1):
        expected = logp_of(model, prompts[row], groups, row, constraint)
        assert groups.logp_PGT[row, 0, : len(expected)] == pytest.approx(expected, abs=2e-4)
    if lists:
        assert groups.segment_PGT is not None
        assert (groups.segment_PGT == FORMAT_SEGMENT).any(2).all()
        assert AutoTokenizer.from_pretrained(hf_dir).convert_tokens_to_ids(LIST_WORD) == constraint.begin_token


@torch.no_grad()
def logp_of(model: Any, prompt: Prompt, groups: Groups, row: int, constraint: ListConstraint) -> list[float]:
    """Log-probabilities of the first list's tokens, each among those that are legal there."""
    answer = groups.token_PGT[row, 0, : groups.length_PG[row, 0]].astype(np.int64)
    ids = torch.from_numpy(np.concatenate([prompt.token_ids.astype(np.int64), answer]))
    logits_TV = model(input_ids=ids[None]).logits[0, len(prompt.token_ids) - 1 : -1]
    state = constraint.start([prompt.constraint_items])
    found = []
    for token, logits_V in zip(answer.tolist(), logits_TV, strict=True):
        legal = constraint.legal(state)
        known = legal.token_NC[0][legal.legal_NC[0]].tolist()
        found.append(float(logits_V[known].log_softmax(0)[known.index(token)]))
        state = constraint.advance(state, torch.tensor([0]), torch.tensor([token]))
    assert bool(constraint.done(state).all())
    return found


def test_supervised_rows_are_the_prompt_and_the_ideal_list(dataset: Dataset, base: Path) -> None:
    made = job(dataset, base, {"items": "titles", "form": "plain", "instruction": "Rank."})
    data = PolicyData.open(made)
    assert data.language is not None
    rows = ideal_rows(made, data)
    by_text = {}
    for prompt in rows.feed.prompts:
        by_text[data.language.tokenizer.decode(prompt.token_ids.tolist())] = prompt
    tokens, learned = rows.feed.next()[0]
    text, answer = (data.language.tokenizer.decode(tokens[part].tolist()) for part in (~learned, learned))
    prompt = by_text[text]
    titles = data.catalogue.titles
    assert text.startswith("Rank.\nThe customer wants: ")
    assert text.endswith("".join(f"- {titles[item]}\n" for item in prompt.candidates.tolist()))
    assert answer == "".join(titles[item] for item in ideal_list(prompt, 3).tolist())


def test_what_a_list_job_of_a_language_model_may_not_say(dataset: Dataset, base: Path) -> None:
    with pytest.raises(RequestError, match=r"text\.needs: trend; legal: among interest, niche, the needs"):
        job(dataset, base, {"items": "codes", "needs": {"trend": "hits"}})
    with pytest.raises(RequestError, match=r"text\.tasks: .*; legal: next_item alone with lists\.needs"):
        job(dataset, base, {"items": "codes", "tasks": {"title_to_code": 1.0}})
    made = job(dataset, base, {"items": "titles", "template": "{% for x in history %}{{ x }}{% endfor %}"})
    with pytest.raises(RequestError, match=r"text\.template: does not show all candidates"):
        PolicyData.open(made)
    small = made.model_copy(update={"text": made.text.model_copy(update={"template": None})})
    small = small.model_copy(update={"data": made.data.model_copy(update={"max_prompt_tokens": 110})})
    data = PolicyData.open(small)
    with pytest.raises(RequestError, match=r"data\.max_prompt_tokens: 110; legal: at least \d+, for 4 candidates"):
        ideal_rows(small, data)
