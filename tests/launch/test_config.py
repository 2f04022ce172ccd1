"""Contract: a recipe and overrides give a checked job; every mistake is a RequestError that names field, value and
what is legal; `train --help` prints every key with its docstring.

Not checked here: that the trainers honour the values.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data.errors import RequestError
from launch.config import job_from, load_job, read_recipe, recipe_header, recipe_names, recipe_path, to_yaml
from launch.setting_names import keys
from launch.train_arguments import help_text, split_arguments
from trainer.data_checks import check_catalogue
from trainer.jobs import JOBS, RlJob, SftJob


def rl(**changes: Any) -> dict[str, Any]:
    """A minimal RL recipe."""
    return {"job": "rl", "data": {"dataset": "d"}, "limits": {"max_steps": 1}, **changes}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_has_a_header(name: str) -> None:
    """The recipes that ship are legal, and a resolved configuration is legal again and the same."""
    path = recipe_path(name)
    assert len(recipe_header(path)) > 20
    job = load_job(name)
    assert job_from(yaml.safe_load(to_yaml(job))) == job


def test_overrides_reach_the_job() -> None:
    job = job_from(
        rl(),
        [
            "--learner.lr",
            "1e-4",
            "--rollout.width=8",
            "--evaluation.k",
            "[1, 10]",
            "--batch-prompts",
            "96",
            "--objective.std-mode",
            "none",
            "--rollout.max_model_len",
            "none",
            "--data.codes",
            "007",
        ],
    )
    assert isinstance(job, RlJob)
    assert job.learner.lr == 1e-4
    assert (job.rollout.width, job.evaluation.k, job.batch_prompts) == (8, (1, 10), 96)
    assert job.objective.std_mode == "none"
    assert job.rollout.max_model_len is None
    assert job.data.codes == "007"
    assert job.data.dataset.is_absolute()


@pytest.mark.parametrize(
    ("arguments", "where", "words"),
    [
        (["--batch_promts", "3"], "batch_promts", "unknown key; legal: did you mean batch_prompts"),
        (["--lr", "1"], "lr", "did you mean learner.lr"),
        (["--learner.lr", "abc"], "learner.lr", '"abc"; legal: number above 0'),
        (["--learner.lr", "nan"], "learner.lr", "legal: number above 0"),
        (["--seed", "1.5"], "seed", "1.5; legal: integer from 0"),
        (["--seed", "true"], "seed", "true; legal: integer"),
        (["--data.exclude_seen", "1"], "data.exclude_seen", "1; legal: true or false"),
        (["--objective.ratio", "word"], "objective.ratio", '"word"; legal: one of token, item, sequence'),
        (["--rollout.width", "0"], "rollout.width", "0; legal: integer from 1"),
        (["--rollout.width", "1"], "rollout.width", "1; legal: 2 or more"),
        (["--batch_prompts", "60"], "batch_prompts", "60; legal: 32 or 64 (a multiple of rollout.shard_size, 32)"),
        (["--objective.minibatches", "5"], "batch_prompts", "legal: 60 or 65 (a multiple of objective.minibatches"),
        (["--learner.row_tokens", "64"], "learner.row_tokens", "legal: 272 or more"),
        (["--rollout.max_model_len", "100"], "rollout.max_model_len", "more than data.max_prompt_tokens, 256"),
        (["--rollout.dtype", "float32"], "rollout.dtype", "bfloat16 like learner.dtype"),
        (["--checkpoints.every", "15"], "checkpoints", "legal: every 10 or 20"),
        (["--evaluation.metric", "ndcg@7"], "evaluation", "legal with this k: ndcg@1"),
        (["--limits.max_steps", "null"], "limits", "at least one of max_steps, max_epochs, max_hours"),
        (["--learner", "3"], "learner", "3; legal: section with ranks"),
        (["--learner.deep", "3"], "learner.deep", "unknown key"),
        (["--seed"], "seed", "no value"),
        (["--rollout_only", "a", "--train_only", "b"], "train_only", "only one of"),
        (["--job", "rocket"], "job", "one of sft, rl, ranker"),
    ],
)
def test_mistakes_name_field_value_and_legal(arguments: list[str], where: str, words: str) -> None:
    with pytest.raises(RequestError) as error:
        job_from(rl(), arguments)
    assert error.value.where == where
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("job: rl\nseed: 1\nseed: 2\n", "given twice"),
        ("[1, 2]", "holds list"),
        ("job: [", "a YAML mapping"),
        ("", "holds NoneType"),
        ("1: 2", "a YAML mapping of sections"),
    ],
)
def test_damaged_recipes_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=words):
        read_recipe(path)


def test_recipe_names_are_suggested() -> None:
    with pytest.raises(RequestError, match="did you mean ml100k-sft"):
        recipe_path("ml100k-sfd")


@given(st.binary(max_size=200))
def test_random_bytes_never_escape_as_another_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.yaml"
    path.write_bytes(content)
    with contextlib.suppress(RequestError):
        job_from(read_recipe(path))


def test_catalogue_bounds_name_the_numbers() -> None:
    job = job_from(rl(rollout={"width": 40}, evaluation={"k": [1, 30], "metric": "hr@1"}))
    assert isinstance(job, RlJob)
    check_catalogue(job, n_items=40, depth=3)
    with pytest.raises(RequestError, match=r"rollout.width: 40; legal: 2 to 39"):
        check_catalogue(job, n_items=39, depth=3)
    with pytest.raises(RequestError, match=r"evaluation.k: .*at most 29"):
        check_catalogue(job, n_items=29, depth=3)
    tight = job_from(rl(data={"dataset": "d", "max_prompt_tokens": 510}, rollout={"max_model_len": 511}))
    assert isinstance(tight, RlJob)
    with pytest.raises(RequestError, match=r"rollout.max_model_len: 511; legal: at least 513"):
        check_catalogue(tight, n_items=100, depth=3)


def test_help_prints_every_key_with_its_docstring() -> None:
    text = help_text()
    squeezed = " ".join(text.split())
    for name, model in JOBS.items():
        for key in keys(model):
            assert key.help, f"{name}: {key.name} has no docstring"
            if key.name != "job":
                assert f"--{key.name}  (" in text
                assert " ".join(key.help.split())[:40] in squeezed


def test_help_with_a_recipe_shows_its_values() -> None:
    text = help_text("ml100k-rl")
    assert "--objective.std_mode  (one of population, sample, none; sample)" in text
    assert "--ranker." not in text


def test_train_arguments_are_split() -> None:
    assert split_arguments(["r", "--run-dir", "x", "--a.b", "-1", "--c=2"]) == (
        "r",
        "x",
        False,
        ["--a.b", "-1", "--c=2"],
    )
    with pytest.raises(RequestError, match="one recipe"):
        split_arguments(["r", "s"])


def test_scientific_notation_without_a_dot_is_a_number() -> None:
    """YAML 1.1 reads 1e-4 as text; a learning rate in a recipe is written that way."""
    job = job_from(yaml.safe_load("{job: sft, data: {dataset: d}, limits: {max_steps: 1}}"), ["--learner.lr", "3e-4"])
    assert isinstance(job, SftJob)
    assert job.learner.lr == 3e-4
