"""Dumps of rollouts: as many steps as were asked for, continued where they were cut off, never two dumps in one folder.

A generator that repeats the target stands for the fleet. Does not check the processes: docs/training.md's commands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import RequestError
from data.feed import Feed
from data.records import DecodeSpec, Finish, Groups, Prompt
from reward.scoring import RewardScorer
from rollout.fleet import RolloutFleet
from tests.small_world import recipe, write_dataset
from tests.tiny_language import write_language
from trainer.group_dump import read_step, steps_in
from trainer.initial_model import check_fits
from trainer.interruption import Interruption
from trainer.jobs import RlJob
from trainer.policy_data import PolicyData
from trainer.policy_jobs import planned_steps
from trainer.rollout_only import check_folder, dump_rollouts, dumped


@dataclasses.dataclass
class Targets:
    """A fake engine: its only completion is the target."""

    data: PolicyData

    def generate(self, prompts: Sequence[Prompt], spec: DecodeSpec) -> Groups:
        items = np.array([[prompt.target] for prompt in prompts], np.int32)
        tokens = np.stack([self.data.catalogue.tokens(item) for item in items[:, 0]])[:, None]
        return Groups(
            prompt_id_P=np.array([prompt.prompt_id for prompt in prompts]),
            valid_PG=np.ones_like(items, np.bool_),
            token_PGT=tokens,
            length_PG=np.full(items.shape, tokens.shape[2], np.int32),
            item_PG=items,
            logp_PGT=np.zeros(tokens.shape, np.float32),
            finish_PG=np.full(items.shape, Finish.ITEM.value),
            weight_version_P=np.zeros(len(prompts), np.int64),
            engine_id_P=np.full(len(prompts), "fake"),
            spec=spec,
            constraint="item_trie",
            catalogue_digest=self.data.catalogue.digest,
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PolicyData:
    dataset = write_dataset(tmp_path_factory.mktemp("dump") / "source")
    return PolicyData.open(RlJob.model_validate(recipe(dataset.path, "rl")))


def dump(data: PolicyData, folder: Path, *, done: int, steps: int) -> list[int]:
    job = RlJob.model_validate(recipe(data.dataset.path, "rl", rollout_only=str(folder)))
    feed = Feed(data.dataset.samples("train"), data.builder, 8, job.seed, fingerprint=data.dataset.fingerprint)
    rewards = RewardScorer(job.reward, None)
    written = dumped(job, feed, Targets(data), rewards, Interruption(), done=done, steps=steps)
    return [step for step, _ in written]


def test_a_dump_that_was_cut_off_is_continued_with_the_same_prompts(data: PolicyData, tmp_path: Path) -> None:
    epoch = len(data.dataset.samples("train")) // 8
    steps = epoch + 2
    assert dump(data, tmp_path / "whole", done=0, steps=steps) == list(range(1, steps + 1))
    dump(data, tmp_path / "cut", done=0, steps=epoch)
    assert dump(data, tmp_path / "cut", done=epoch, steps=steps) == [epoch + 1, epoch + 2]
    for step in range(1, steps + 1):
        whole, cut = (read_step(tmp_path / name, step, data.catalogue.digest) for name in ("whole", "cut"))
        assert [p.prompt_id for p in whole[0]] == [p.prompt_id for p in cut[0]]
        assert whole[1].groups.spec == cut[1].groups.spec


def test_two_dumps_are_never_mixed(data: PolicyData, tmp_path: Path) -> None:
    check_folder(tmp_path / "absent", 0)
    dump(data, tmp_path, done=0, steps=3)
    assert steps_in(tmp_path) == [1, 2, 3]
    check_folder(tmp_path, 2)
    with pytest.raises(RequestError, match=r"step-000002.parquet of another dump"):
        check_folder(tmp_path, 0)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps": 0}, 0),
        ({"max_steps": None, "max_epochs": 1.5}, 15),
        ({"max_steps": None, "max_hours": 1.0}, 10),
        ({"max_steps": 4, "max_epochs": 1.0}, 4),
    ],
)
def test_every_limit_counts(limits: dict[str, float | None], steps: int) -> None:
    job = RlJob.model_validate(recipe(Path("none"), "rl", limits=limits))
    assert planned_steps(job, 10) == steps


class Started(Exception):
    """The fleet was asked for."""


def test_a_dump_of_a_pretrained_model_begins_with_its_extended_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, base = write_dataset(tmp_path / "source"), write_language(tmp_path / "base")
    content = recipe(
        dataset.path,
        "rl",
        init=str(base),
        text={"items": "codes"},
        data={"max_prompt_tokens": 240},
        learner={"row_tokens": 320, "token_budget": 640},
        rollout={"max_model_len": 320},
        rollout_only=str(tmp_path / "dump"),
    )
    job = RlJob.model_validate(content)
    data = PolicyData.open(job)
    folders: list[Path] = []

    def start(_: object, hf_dir: Path, __: object) -> None:
        folders.append(hf_dir)
        raise Started

    monkeypatch.setattr(RolloutFleet, "start", start)
    rewards: Any = None
    feed: Any = None
    with pytest.raises(Started):
        dump_rollouts(job, data, feed, rewards, tmp_path / "run", Interruption(), steps=1)
    check_fits(folders[0], data.catalogue)
