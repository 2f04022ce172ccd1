"""Contract of the reference policy, through the command and a real vLLM fleet: every state is answered once, by its
candidates in the order of the model's probabilities, found here by plain transformers; a second run reads the cache and
starts no engine; the model alone is evaluated as lists; another model is refused. A language model's prompt tells the
candidates, where it has room.

Not checked: the learner on top (test_laac_job.py), constrained decoding itself (tests/rollout).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.catalogue import Catalogue
from data.dataset import Dataset
from data.errors import RequestError
from data.text_tokenizer import TextTokenizer
from data.transitions import Sessions
from launch.cli import run
from tests.requirements import require
from tests.small_world import read_steps, write_dataset, write_recipe
from tests.small_world import recipe as small_recipe
from tests.tiny_language import write_language
from tests.tiny_model import write_tiny_model
from trainer.jobs import LaacJob, SftJob
from trainer.laac_settings import ReferenceSettings
from trainer.policy_data import PolicyData
from trainer.prompt_card import PromptCard
from trainer.reference_answers import ReferenceAnswers
from trainer.reference_policy import _Prompts, description, model_digest

WINDOW, CANDIDATES, ANSWERS = 3, 7, 7
# As many answers as candidates: narrower beams may lose one of the best on the way, as beams do.


def content(dataset: Dataset, model: Path, cache: Path) -> dict[str, Any]:
    """A job that asks a model for a few states."""
    reference = {"kind": "llm", "model": str(model), "cache": str(cache), "window": WINDOW, "states": 40}
    return {
        "job": "laac",
        "data": {"dataset": str(dataset.path), "history": 4, "users": 20, "min_ratings": 6, "reward": "implicit"},
        "laac": {
            "batch": 16,
            "width": 8,
            "threads": 1,
            "reference": {**reference, "candidates": CANDIDATES, "answers": ANSWERS},
        },
        "limits": {"max_steps": 4},
        "evaluation": {"rows": 10, "k": [1, 4], "metric": "ndcg@4"},
        "rollout": {"dtype": "float32", "shard_size": 32, "max_model_len": 32, "kv_cache_gib": 0.1, "threads": 1},
        "cluster": {"object_store_mib": 128},
    }


def test_a_model_answers_each_state_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("vllm", "ray", "deepspeed"):
        require(part)
    dataset = write_dataset(tmp_path / "source")
    catalogue = Catalogue.build(dataset, "default")
    model = write_tiny_model(tmp_path / "hf", catalogue, hidden=32, layers=1)
    PromptCard(history=6, exclude_seen=True, max_prompt_tokens=16).write(model)
    cache = tmp_path / "reference.parquet"
    recipe = write_recipe(tmp_path / "laac.yaml", content(dataset, model, cache))
    # In this process, which has imported what the command needs; the engine has a process of its own.
    monkeypatch.chdir(tmp_path)
    assert run(["train", str(recipe), "--run-dir", "run"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    told = summary["reference"]
    assert (told["states"], told["masked"], told["unknown"], told["repeated"]) == (40, 0, 0, 0)
    assert told["not_asked"] == summary["sessions"]["transitions"] - 40
    assert 0 < told["test_rows_before_its_boundary"] < summary["stages"]["laac"]["n"]
    assert read_steps(tmp_path / "run")[-1]["referenced"] < 1
    job = LaacJob.model_validate(content(dataset, model, cache))
    sessions = Sessions(dataset, job.data)
    asked = description(sessions, job.laac.reference, model_digest(model))
    answers = ReferenceAnswers.read(cache, asked)
    assert len(answers.event_M) == 40 + len(sessions.rows("test").event_N)
    check_against_transformers(sessions, job, catalogue, model, answers)
    # The cache is there: the model alone is evaluated, and no cluster is started.
    alone = ["train", str(recipe), "--run-dir", str(tmp_path / "alone"), "--laac.method", "reference"]
    assert run(alone) == 0
    stage = json.loads((tmp_path / "alone" / "summary.json").read_text())["stages"]["reference"]
    assert stage["invalid"]["constrained"] == 0
    assert stage["n"] == summary["stages"]["laac"]["n"]
    other = write_tiny_model(tmp_path / "other", catalogue, seed=1, hidden=32, layers=1)
    PromptCard(history=6, exclude_seen=True, max_prompt_tokens=16).write(other)
    capsys.readouterr()
    assert run([*alone[:-2], "--laac.reference.model", str(other)]) == 2
    assert run(["train", str(recipe), "--run-dir", str(tmp_path / "b"), "--laac.reference.model", str(other)]) == 2
    assert "model_digest" in capsys.readouterr().err


def test_a_language_model_is_shown_the_candidates(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "source")
    base = write_language(tmp_path / "base")
    made = SftJob.model_validate(
        small_recipe(
            dataset.path,
            "sft",
            init=str(base),
            text={"items": "titles"},
            data={"max_prompt_tokens": 240},
            learner={"row_tokens": 320, "token_budget": 640},
            rollout={"max_model_len": 320},
        )
    )
    data = PolicyData.open(made)
    PromptCard.of(made.data, made.lists, made.text).write(base)
    sessions = Sessions(dataset, LaacJob.model_validate(content(dataset, base, tmp_path / "cache")).data)
    events = sessions.transitions.event_N[-4:]
    longest = int(np.diff(data.catalogue.path_start).max())
    tokenizer = TextTokenizer.open(base, made.text.pad_token)
    lengths = []
    for shown in (True, False):
        settings = ReferenceSettings(candidates=CANDIDATES, window=WINDOW, show_candidates=shown)
        rows, prompts = _Prompts(sessions, settings, data.catalogue, base, 400).of(events, range(4))
        assert rows == [0, 1, 2, 3]
        for event, prompt in zip(events.tolist(), prompts, strict=True):
            lines = tokenizer.decode(prompt.token_ids.tolist()).replace("<|end|>", "\n").splitlines()
            assert prompt.history.tolist() == sessions.item_E[event - WINDOW : event].tolist()
            assert prompt.candidates is not None
            assert len(prompt.candidates) == CANDIDATES
            told = [item for item in prompt.candidates.tolist() if f"- {data.catalogue.titles[item]}" in lines]
            assert told == (prompt.candidates.tolist() if shown else [])
        lengths.append(max(len(prompt.token_ids) for prompt in prompts))
    told = ReferenceSettings(candidates=CANDIDATES, window=WINDOW)
    # With the answer a prompt may be as long as the engine takes; no shorter one has room for all candidates.
    _Prompts(sessions, told, data.catalogue, base, lengths[0] + longest).of(events, range(4))
    with pytest.raises(RequestError, match=r"max_prompt_tokens: .* for 7 candidates"):
        _Prompts(sessions, told, data.catalogue, base, lengths[1] + longest).of(events, range(4))


def check_against_transformers(
    sessions: Sessions, job: LaacJob, catalogue: Catalogue, model: Path, answers: ReferenceAnswers
) -> None:
    """The answers are the best candidates by the model's probability renormalised over the candidates' paths."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows = range(12)
    _, prompts = _Prompts(sessions, job.laac.reference, catalogue, model, None).of(answers.event_M, rows)
    for row, prompt in zip(rows, prompts, strict=True):
        event = int(answers.event_M[row])
        start = int(sessions.start_of(np.array([event]))[0])
        assert prompt.history.tolist() == sessions.item_E[max(start, event - WINDOW) : event].tolist()
        candidates = [] if prompt.candidates is None else prompt.candidates.tolist()
        assert len(set(candidates)) == CANDIDATES
        assert not set(candidates) & set(sessions.item_E[start:event].tolist())
        paths = {item: tuple(catalogue.tokens(item).tolist()) for item in candidates}
        score = {item: path_logp(lm, prompt.token_ids, path, list(paths.values())) for item, path in paths.items()}
        best = sorted(candidates, key=lambda item: -score[item])[:ANSWERS]
        assert answers.item_MR[row].tolist() == best


@torch.no_grad()
def path_logp(lm: Any, prompt: np.ndarray, path: tuple[int, ...], paths: list[tuple[int, ...]]) -> float:
    """Log-probability of a path, each token among those that go on to a candidate."""
    tokens = torch.tensor([[*prompt.tolist(), *path]])
    logits = lm(tokens).logits[0, len(prompt) - 1 :]
    total = 0.0
    for depth, token in enumerate(path):
        legal = sorted({other[depth] for other in paths if other[:depth] == path[:depth]})
        total += float(logits[depth, legal].log_softmax(0)[legal.index(token)])
    return total
