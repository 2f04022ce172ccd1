"""Jobs of ranked lists through the command line on the real parts: a vLLM engine, DeepSpeed, a critic on Ray Serve.

Checks exit codes, that lists are valid and engine and learner agree, that the critic is asked, what the checkpoint
says of its lists, and (long) that lists come after free text, that a supervised run cut off and continued, and runs of
credit after it, one of them a batch ahead, end at the weights of undisturbed ones, and that a language model learns
lists of titles, by LoRA too, and is evaluated on them. What lands on which token: tests/trainer/test_list_loop.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from reward.critic import Critic, CriticRanker, CriticShape
from tests.launch.conftest import Here
from tests.requirements import require
from tests.small_world import ITEMS, read_steps, recipe, windlass, write_dataset, write_recipe
from tests.tiny_language import write_language
from trainer.prompt_card import PromptCard

LISTS: dict[str, Any] = {
    "needs": [{"name": "interest"}, {"name": "trend"}, {"name": "niche", "instruction": ["trend", "interest"]}],
    "held_out": "niche",
    "candidates": 6,
    "positives": 3,
    "feedback": 0.6,
}
SECTIONS: dict[str, Any] = {
    "lists": LISTS,
    "data": {"max_prompt_tokens": 48},
    "learner": {"row_tokens": 96},
    "rollout": {"decode": "sample", "width": 4, "max_model_len": 96},
    "evaluation": {"k": [1, 5], "metric": "ndcg@5", "rows": 6, "test_rows": 6},
}
CREDIT: dict[str, Any] = {
    "objective": {"ratio": "item", "credit": {"kind": "items", "uncertainty": {"variance": "propagated"}}},
    "reward": {"item_match": 0.0, "rank_penalty": 0.0, "ranker": "critic"},
}
AHEAD: dict[str, Any] = CREDIT["objective"] | {"truncation": {"level": "item"}}


def job(dataset: Path, kind: str, **sections: Any) -> dict[str, Any]:
    merged: dict[str, Any] = {**SECTIONS}
    for name, value in sections.items():
        merged[name] = merged.get(name, {}) | value if isinstance(value, dict) else value
    return recipe(dataset, kind, **merged)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, a critic and recipes."""
    for part in ("vllm", "deepspeed"):
        require(part)
    folder = tmp_path_factory.mktemp("list_job")
    dataset = write_dataset(folder / "source").path
    torch.manual_seed(0)
    shape = CriticShape(n_items=ITEMS, needs=("interest", "trend"), width=4, hidden=8, history=6)
    CriticRanker(Critic(shape)).save(folder / "critic")
    write_recipe(folder / "sft.yaml", job(dataset, "sft", batch_rows=16))
    write_recipe(folder / "lists.yaml", job(dataset, "rl", **CREDIT))
    write_recipe(folder / "ahead.yaml", job(dataset, "rl", max_staleness=1, **CREDIT | {"objective": AHEAD}))
    write_recipe(folder / "text.yaml", job(dataset, "rl", **CREDIT | {"lists": LISTS | {"text_tokens": 5}}))
    return folder


def weights_of(run: Path) -> bytes:
    newest = max((run / "checkpoints").glob("step-*"))
    return (newest / "hf" / "model.safetensors").read_bytes()


def test_credit_for_lists_on_the_real_fleet(folder: Path, windlass_here: Here) -> None:
    done = windlass_here("train", "lists.yaml", "--run-dir", "runs/lists", cwd=folder)
    assert done.returncode == 0, done.stderr
    run = folder / "runs" / "lists"
    steps = read_steps(run)
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    for step in steps[1:]:
        assert step["constraint.violations"] == step["credit/not_a_list_share"] == step["lists/estimates_failed"] == 0
        assert step["policy_gap/max"] < 1e-4
        assert step["lists/observed_share"] < 1
        assert step["uncertainty/items"] > 0
        assert 0 < step["legal_mass"] <= 1
        assert step["system/reward_requests"] >= 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["reward"] == {"backend": "ray-serve", "requests": 3}
    assert summary["prompts"]["training"] > 50
    assert {"ndcg@5", "ndcg@5/interest", "ndcg@5/niche"} <= set(summary["test"])
    assert summary["test"]["violations"] == summary["test"]["invalid"]["constrained"] == 0
    card = PromptCard.read(max((run / "checkpoints").glob("step-*")) / "hf")
    assert [need.name for need in card.lists.needs] == ["interest", "trend", "niche"]


@pytest.mark.long
def test_lists_after_free_text(folder: Path) -> None:
    done = windlass("train", "text.yaml", "--run-dir", "runs/text", cwd=folder)
    assert done.returncode == 0, done.stderr
    for step in read_steps(folder / "runs" / "text")[1:]:
        assert step["constraint.violations"] == step["credit/not_a_list_share"] == 0
        # A random model says `<list>` hardly ever; texts that the limit ended are counted, not lost.
        assert 0 < step["lists/text_cut"] <= 8 * 4
        assert step["tokens/policy"] > 8 * 4 * (6 * 2 + 1)
        assert step["policy_gap/max"] < 1e-4


@pytest.mark.long
def test_a_list_run_that_is_cut_off_ends_at_the_same_weights(folder: Path) -> None:
    for name, start in (("sft", None), ("lists", "runs/sft-whole"), ("ahead", "runs/sft-whole")):
        further = [] if start is None else ["--init", start]
        whole = windlass("train", f"{name}.yaml", "--run-dir", f"runs/{name}-whole", *further, cwd=folder)
        assert whole.returncode == 0, whole.stderr
        command = ["train", f"{name}.yaml", "--run-dir", f"runs/{name}-cut", *further]
        killed = windlass(*command, cwd=folder, WINDLASS_FAULT="step:3")
        assert killed.returncode != 0
        again = windlass(*command, cwd=folder)
        assert again.returncode == 0, again.stderr
        assert weights_of(folder / "runs" / f"{name}-whole") == weights_of(folder / "runs" / f"{name}-cut")
        steps = [
            [
                {key: value for key, value in step.items() if not key.startswith(("time/", "perf/", "system/"))}
                for step in read_steps(folder / "runs" / f"{name}-{kind}")
            ]
            for kind in ("whole", "cut")
        ]
        assert np.array_equal(steps[0], steps[1])


@pytest.mark.long
def test_a_language_model_ranks_titles(folder: Path, windlass_here: Here) -> None:
    base = write_language(folder / "base", "smollm")
    source = yaml.safe_load((folder / "sft.yaml").read_text())["data"]["dataset"]
    language: dict[str, Any] = {
        "init": str(base),
        "text": {"items": "titles", "needs": {"interest": "a favourite"}},
        "lists": LISTS | {"feedback": 1.0, "length": 3},
        "data": {"max_prompt_tokens": 240},
        "learner": {"row_tokens": 320, "token_budget": 1280},
        "rollout": {"decode": "sample", "width": 4, "max_model_len": 320},
        "evaluation": {"k": [1, 3], "metric": "ndcg@3", "rows": 6, "test_rows": 6},
    }
    sft = job(Path(source), "sft", **language, batch_rows=16, limits={"max_steps": 8})
    write_recipe(folder / "titles-sft.yaml", sft)
    lora = {"lora": {"rank": 2, "push": "adapter"}, "lr": 1e-2}
    write_recipe(
        folder / "titles.yaml",
        job(
            Path(source),
            "rl",
            **(language | {"init": "runs/titles-sft", "learner": language["learner"] | lora}),
            objective={"ratio": "item", "credit": {"kind": "items"}},
            reward={"item_match": 0.0, "rank_penalty": 0.0},
        ),
    )
    for name in ("titles-sft", "titles"):
        done = windlass_here("train", f"{name}.yaml", "--run-dir", f"runs/{name}", cwd=folder)
        assert done.returncode == 0, done.stderr
    losses = [step["loss"] for step in read_steps(folder / "runs" / "titles-sft")[1:]]
    assert losses[-1] < losses[0] - 0.5
    for step in read_steps(folder / "runs" / "titles")[1:]:
        assert step["constraint.violations"] == step["credit/not_a_list_share"] == 0
        assert step["policy_gap/max"] < 1e-4
    card = PromptCard.read(max((folder / "runs" / "titles" / "checkpoints").glob("step-*")) / "hf")
    assert card.text.needs == {"interest": "a favourite"}
    engine = ("--rollout.dtype", "float32", "--rollout.kv-cache-gib", "0.1", "--cluster.object-store-mib", "128")
    places = ("eval", "runs/titles", "--data", source, "--lists", "--rows", "6", "--k", "1", "3")
    done = windlass_here(*places, *engine, "--json", "titles.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "titles.json").read_text())
    assert found["violations"] == found["invalid"]["constrained"] == 0
    summary = json.loads((folder / "runs" / "titles" / "summary.json").read_text())
    assert found["needs"]["niche"]["n"] == 6
    assert {"ndcg@3", "ndcg@3/niche"} <= set(summary["test"])
