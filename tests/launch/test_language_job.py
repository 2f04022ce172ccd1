"""A whole job on a pretrained language model through the command line: real vLLM engine, DeepSpeed, LoRA, and items as
codes or as titles, on tiny random models with tokenizers of their own.

Checks that engine and learner agree after every push (of the adapter alone, and of merged weights), that only legal
items come out, and that checkpoints hold the merged model and the adapter. Does not check quality
(docs/results/llm.json), nor the families besides (`long`) beyond one step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.dataset import Dataset
from tests.launch.conftest import Here
from tests.requirements import require
from tests.small_world import read_steps, recipe, write_dataset, write_recipe
from tests.tiny_language import FAMILIES, write_language

LANGUAGE: dict[str, dict[str, Any]] = {
    "data": {"max_prompt_tokens": 160},
    "learner": {"row_tokens": 256, "token_budget": 1024},
    "rollout": {"max_model_len": 256},
    "evaluation": {"unconstrained_rows": 4},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    for part in ("vllm", "deepspeed", "peft"):
        require(part)
    return write_dataset(tmp_path_factory.mktemp("language_job"))


def job(dataset: Dataset, kind: str, init: Path | str, text: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A recipe; `sections` are merged over `LANGUAGE`."""
    merged: dict[str, Any] = {name: dict(section) for name, section in LANGUAGE.items()}
    for name, section in sections.items():
        merged[name] = {**merged.get(name, {}), **section} if isinstance(section, dict) else section
    return recipe(dataset.path, kind, init=str(init), text=text, **merged)


def run(windlass_here: Here, folder: Path, name: str, content: dict[str, Any]) -> Path:
    """The folder of a run."""
    write_recipe(folder / f"{name}.yaml", content)
    done = windlass_here("train", f"{name}.yaml", "--run-dir", name, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / name


def test_codes_with_lora(dataset: Dataset, tmp_path: Path, windlass_here: Here) -> None:
    base = write_language(tmp_path / "base", "qwen2")
    lora = {"lora": {"rank": 4, "alpha": 12, "push": "adapter"}, "zero_stage": 2, "lr": 1e-2}
    # A checkpoint at the end alone.
    few: dict[str, Any] = {"evaluation": {"rows": 8}, "checkpoints": {"interval": 3}}
    content = job(dataset, "rl", base, {"items": "codes"}, learner=lora, objective={"beta": 0.01}, **few)
    done = run(windlass_here, tmp_path, "rl", content)
    steps = read_steps(done)
    assert [step["weight_version"] for step in steps[1:]] == [0, 1, 2]
    for step in steps[1:]:
        assert step["constraint.violations"] == 0
        assert 0 < step["policy_gap/mean"] <= step["policy_gap/max"] < 1e-4
    # Only the adapter travels: factors of seven matrices in two layers, and the rows of 14 codes.
    parameters = 14 * 64 + 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert steps[1]["push/mib"] * 2**20 == pytest.approx(4 * parameters, rel=0.01)
    # The reference is the adapter switched off: it is the policy in the first step, and not after it.
    assert steps[1]["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[3]["kl"] > 1e-6
    _checkpoint_is_whole(done / "checkpoints" / "step-000003", done / "initial")


def _checkpoint_is_whole(checkpoint: Path, initial: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = AutoModelForCausalLM.from_pretrained(checkpoint / "hf")
    start = AutoModelForCausalLM.from_pretrained(initial)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "hf")
    ids = tokenizer("<a_1><b_2> item", return_tensors="pt").input_ids
    assert int(ids[0, 0]) == tokenizer.convert_tokens_to_ids("<a_1>")
    with torch.no_grad():
        before = start(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(start, checkpoint / "adapter")(input_ids=ids).logits
        assert (merged(input_ids=ids).logits - adapted).abs().max() < 1e-4
        assert (before - adapted).abs().max() > 1e-2
    assert json.loads((checkpoint / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.long
def test_titles_from_supervised_to_rl_and_eval(dataset: Dataset, tmp_path: Path, windlass_here: Here) -> None:
    base = write_language(tmp_path / "base", "llama")
    text = {"items": "titles", "form": "plain"}
    sft = run(windlass_here, tmp_path, "sft", job(dataset, "sft", base, text, batch_rows=16, limits={"max_steps": 12}))
    steps = read_steps(sft)
    assert steps[-1]["loss"] < steps[1]["loss"] - 0.5
    rl = run(windlass_here, tmp_path, "rl", job(dataset, "rl", sft, text, learner={"lora": {"rank": 2}}))
    assert all(step["constraint.violations"] == 0 for step in read_steps(rl)[1:])
    arguments = ("--data", str(dataset.path), "--rows", "8", "--k", "1", "5", "--rollout.dtype", "float32")
    done = windlass_here("eval", "rl", *arguments, "--unconstrained-rows", "4", "--json", "e.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "e.json").read_text())
    assert answer["invalid"]["constrained"] == 0
    # A title is not what random weights say by themselves.
    assert answer["n"] == 8


@pytest.mark.long
def test_two_ranks_resume_with_sharded_weights(dataset: Dataset, tmp_path: Path, windlass_here: Here) -> None:
    base = write_language(tmp_path / "base", "qwen3")
    learner = {"lora": {"rank": 4}, "zero_stage": 3, "ranks": 2, "dtype": "bfloat16"}
    tasks = {"title_to_code": 1.0, "code_to_title": 1.0, "next_title": 0.5}
    text = {"items": "codes", "history": "codes", "code_init": "content", "tasks": tasks}
    content = job(dataset, "sft", base, text, batch_rows=8, learner=learner, rollout={"dtype": "bfloat16"})
    run(windlass_here, tmp_path, "sft", content | {"limits": {"max_steps": 2}})
    done = run(windlass_here, tmp_path, "sft", content | {"limits": {"max_steps": 4}})
    whole = run(windlass_here, tmp_path, "whole", content | {"limits": {"max_steps": 4}})
    assert [s["loss"] for s in read_steps(done)[1:]] == [s["loss"] for s in read_steps(whole)[1:]]


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_through_the_engine(
    family: str, dataset: Dataset, tmp_path: Path, windlass_here: Here
) -> None:
    base = write_language(tmp_path / "base", family)
    done = run(windlass_here, tmp_path, "rl", job(dataset, "rl", base, {"items": "codes"}, limits={"max_steps": 1}))
    step = read_steps(done)[1]
    assert step["constraint.violations"] == 0
    assert step["policy_gap/max"] < 1e-4


@pytest.mark.long
def test_the_packaged_model_is_read(dataset: Dataset, tmp_path: Path, windlass_here: Here) -> None:
    """SmolLM2 from its GGUF file: zero steps write the initial model, extended by code tokens."""
    from transformers import AutoTokenizer

    require("language-model")
    require("gguf")
    # In float32 a model of 30 layers rounds by more than the probe's fixed limit, which is for small ones.
    types = {"learner": {"dtype": "bfloat16"}, "rollout": {"dtype": "bfloat16"}}
    content = job(dataset, "sft", "smollm2-135m", {"items": "codes"}, limits={"max_steps": 0}, **types)
    content["evaluation"] = {**content["evaluation"], "rows": 2, "unconstrained_rows": 0}
    done = run(windlass_here, tmp_path, "sft", content)
    tokenizer = AutoTokenizer.from_pretrained(done / "initial")
    assert len(tokenizer) == 49_152 + 14
    config = json.loads((done / "initial" / "config.json").read_text())
    assert config["vocab_size"] == 49_216
    assert "quantization_config" not in config
